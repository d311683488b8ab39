"""Options and fixtures of all suites: real directories, both loops inside the engine, a check for leaks."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support.doubles import (
    PATIENCE,
    FaultyStorage,
    LoopSpy,
    TrainingRun,
    faulty_storage,
    mapped_arena_bytes,
    open_descriptors,
    replace_loops,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=5, metavar="N", help="how often tests/faults kills the running example"
    )
    parser.addoption(
        "--preemptions",
        type=int,
        default=5,
        metavar="N",
        help="how many runs tests/faults tells to stop, on one rank and on four",
    )
    parser.addoption(
        "--matrix",
        choices=("full", "sample"),
        default="sample",
        help="how many pairs of layouts tests/distributed saves and loads",
    )
    parser.addoption("--long", action="store_true", help="soak for a minute where a sample takes seconds")


def pytest_configure() -> None:
    """One thread of torch's in each process: those of two test runs and their children spin for two cores."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: no collection of a test walks over it again."""
    gc.collect()
    gc.freeze()  # a full collection takes milliseconds then, and half a second without


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    value = request.config.getoption("--kills")
    assert isinstance(value, int)
    return value


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory on a real disk that the engine may create."""
    return tmp_path / "run"


@pytest_asyncio.fixture
async def faulty(root: Path) -> AsyncIterator[FaultyStorage]:
    """The local storage below `root`, ready to be told what shall go wrong."""
    async with faulty_storage(root) as storage:
        yield storage


@pytest.fixture
def training() -> Callable[..., TrainingRun]:
    return TrainingRun


@pytest.fixture(params=["asyncio", "uvloop"])
def both_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopSpy]:
    """Runs the test once with each kind of loop inside the engine; afterwards those loops must be closed."""
    if request.param == "uvloop":
        import uvloop

        spy = replace_loops(monkeypatch, uvloop.new_event_loop)
    else:
        spy = replace_loops(monkeypatch, asyncio.new_event_loop)
    yield spy
    spy.assert_closed()


class _Complaints(logging.Handler):
    """What asyncio says about tasks that nobody waited for."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture(scope="session")
def _warm_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One whole life of an engine, so that what a process makes once is not taken for a leak."""
    from dcp_async.sync import CheckpointEngine

    with CheckpointEngine(tmp_path_factory.mktemp("warm")) as engine:
        engine.save({"x": torch.ones(4)}).upload_completion.result(PATIENCE)
        engine.read()


def _record_without_frames(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """Pytest keeps the records of a test; their tracebacks would keep frames, and the pool with them."""
    record = logging.LogRecord(*args, **kwargs)
    record.msg, record.args = record.getMessage(), ()
    if record.exc_info:
        record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.exc_info = None
    return record


@pytest.fixture(scope="session")
def process_server() -> None:
    """What `tests.support.processes` forks from, whose pipes stay open from here on: no leak of a test."""
    forkserver.ensure_running()


@pytest.fixture
def no_leaks(_warm_process: None) -> Iterator[None]:
    """No thread, no descriptor, no arena and no unretrieved task may outlive the test."""
    threads = set(threading.enumerate())
    descriptors = open_descriptors()
    arena = mapped_arena_bytes()
    complaints = _Complaints()
    logger = logging.getLogger("asyncio")
    logger.addHandler(complaints)
    usual = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_record_without_frames)
    try:
        yield
    finally:
        logging.setLogRecordFactory(usual)
        logger.removeHandler(complaints)

    def left_open() -> dict[int, str]:
        now = open_descriptors()
        return {n: now[n] for n in now if descriptors.get(n) != now[n] and not _own(now[n])}

    gc.collect(1)  # the young generations: tasks of this test that nobody waited for complain now
    fresh = [thread for thread in threading.enumerate() if thread not in threads]
    for thread in fresh:
        thread.join(PATIENCE)
    if left_open() or mapped_arena_bytes() > arena:
        gc.collect()  # a tenth of a second beside torch, so only where it may make a difference
    assert [thread.name for thread in fresh if thread.is_alive()] == []
    assert left_open() == {}
    assert mapped_arena_bytes() <= arena
    assert complaints.texts == []


def _own(target: str) -> bool:
    """Descriptors that pytest or the interpreter may open at any time."""
    return target.startswith(("/dev/null", "/dev/urandom", "/dev/pts")) or target.endswith(".pyc")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone, of a group that does not communicate, so that it opens nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()
