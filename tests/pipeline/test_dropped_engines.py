"""An engine that nobody refers to any more: it warns, its saves end durable, and it leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, Limits, StagingOptions, sync
from tests.support.doubles import PATIENCE, FaultyStorage, assert_holds_only, open_descriptors
from tests.support.saves import STATE

pytestmark = pytest.mark.usefixtures("both_loops")


STORAGES = ("dcp_async-fs", "dcp_async-io")


def joined(before: set[threading.Thread], *, but: tuple[str, ...] = ()) -> None:
    for thread in threading.enumerate():
        if thread not in before and not thread.name.startswith(but or "-"):
            thread.join(PATIENCE)
            assert not thread.is_alive(), thread.name


def collected(life: Callable[[], weakref.ref[Any]]) -> Any:
    """What ``life`` referred to, if it still lives."""
    reference = life()
    gc.collect()
    return reference()


@pytest.mark.parametrize("world", ["async", "sync"])
def test_a_dropped_engine_warns_and_leaves_neither_thread_nor_descriptor(root: Path, world: str) -> None:
    threads, descriptors = set(threading.enumerate()), set(open_descriptors())

    def life() -> weakref.ref[Any]:
        if world == "sync":
            blocking = sync.CheckpointEngine(root).open()
            blocking.save(STATE, step=1).upload_completion.result(PATIENCE)
            return weakref.ref(blocking)
        engine = CheckpointEngine(root)
        asyncio.run(_open_and_save(engine))
        return weakref.ref(engine)

    with pytest.warns(ResourceWarning, match=r"CheckpointEngine LocalStorage\(.* open.*dropped"):
        assert collected(life) is None
    joined(threads)
    gc.collect()
    assert set(open_descriptors()) - descriptors == set()
    assert_holds_only(root, ["step-00000001"])


async def _open_and_save(engine: CheckpointEngine) -> None:
    await engine.open()
    await (await engine.save(STATE, step=1)).upload_completion


@pytest.mark.parametrize("kept", ["nothing", "response", "info", "optimizer", "cycle"])
def test_what_its_user_keeps_does_not_keep_the_engine(root: Path, kept: str) -> None:
    threads = set(threading.enumerate())
    parameter = torch.nn.Parameter(torch.ones(4))
    optim = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    keeping: list[Any] = [optim]

    def life() -> weakref.ref[Any]:
        blocking = sync.CheckpointEngine(root, staging=StagingOptions(overlap=True)).open()
        response = blocking.save({"p": parameter, "optim": optim}, step=1)
        info = response.upload_completion.result(PATIENCE)
        keeping.append({"response": [response], "info": [info, blocking.latest()]}.get(kept))
        if kept == "cycle":
            blocking.itself = blocking  # type: ignore[attr-defined]  # of this test
        return weakref.ref(blocking)

    with pytest.warns(ResourceWarning, match="dropped"):
        assert collected(life) is None
    joined(threads)
    parameter.grad = torch.ones(4)
    optim.step()  # waits for nobody
    assert len(keeping) >= 1


def test_saves_in_flight_of_a_dropped_engine_end_durable(root: Path, faulty: FaultyStorage) -> None:
    threads = set(threading.enumerate())
    with faulty.hold("put") as gate:

        def life() -> list[Any]:
            blocking = sync.CheckpointEngine(faulty, limits=Limits(pending_saves=2)).open()
            return [blocking.save(STATE, step=step) for step in (1, 2)]

        with pytest.warns(ResourceWarning, match="2 pending"):
            responses = life()
        gate.wait_arrived()
        assert not any(response.upload_completion.done() for response in responses)
    joined(threads, but=STORAGES)  # those belong to a storage that the user made
    for response in responses:
        response.upload_completion.result(0)
    assert_holds_only(root, ["step-00000001", "step-00000002"])


@pytest.mark.parametrize("end", ["new", "closed", "aborted"])
def test_an_engine_that_is_not_open_is_dropped_quietly(root: Path, end: str) -> None:
    blocking = sync.CheckpointEngine(root)
    if end != "new":
        blocking.open()
        if end == "closed":
            blocking.close()
        else:
            blocking.abort()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del blocking
        gc.collect()


def test_an_engine_whose_constructor_failed_is_dropped_quietly() -> None:
    with pytest.raises(TypeError):
        CheckpointEngine(None)  # type: ignore[arg-type]  # that is the question
    gc.collect()
