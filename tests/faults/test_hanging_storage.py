"""A storage that does not answer: every verb ends, and says which call of the storage did not."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from dcp_async import CheckpointEngine, CheckpointError, SaveError, StorageError, Timeouts
from dcp_async.storage.local.storage import LocalStorage
from tests.support.doubles import (
    PATIENCE,
    assert_same,
    chain,
    committed,
    on_thread,
    open_descriptors,
    random_tensor,
)

STATE = {"w": random_tensor(torch.float32, (100, 100), 1), "n": 1}
SOON = Timeouts(storage=0.3, exit_grace=0.3)
LATEST = 25.0
"""Seconds within which whatever waits must have ended, on a machine that others use."""

VERBS = {
    "create": "begin",
    "list": "list",
    "sweep": "sweep",
    "open": "open",
    "write": "put",
    "sync": "seal",
    "verify": "verify",
    "publish": "commit",
    "remove": "abort",
    "read": "metadata",
    "read manifest": "manifest",
    "size": "size",
    "read data": "read_into",
    "close": "close",
}


class Hanging:
    """Passes everything on but ``verb``, which hangs and takes no notice of its cancellation."""

    def __init__(self, inner: Any, script: dict[str, Any]) -> None:
        self._inner, self._script = inner, script

    def __repr__(self) -> str:
        return f"<hanging {self._inner!r}>"

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in VERBS.values():
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            if name == self._script["verb"]:
                await self._hang()
            found = await value(*args, **kwargs)
            return Hanging(found, self._script) if name in ("begin", "open") else found

        return call

    async def _hang(self) -> None:
        self._script["calls"] += 1
        released: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._script["held"].append((asyncio.get_running_loop(), released))
        while not released.done():
            try:
                await asyncio.shield(released)
            except asyncio.CancelledError:
                self._script["ignored"] += 1
        raise OSError(5, "the connection is gone")


class Disk:
    """A storage that hangs on demand."""

    def __init__(self, root: Path) -> None:
        self.script: dict[str, Any] = {"verb": "", "calls": 0, "held": [], "ignored": 0}
        self.local = LocalStorage(root)
        self.storage: Any = Hanging(self.local, self.script)

    def hang(self, verb: str) -> None:
        self.script["verb"] = verb

    def heal(self) -> None:
        self.script["verb"] = ""
        for loop, future in self.script["held"]:
            if not loop.is_closed():
                loop.call_soon_threadsafe(lambda future=future: future.done() or future.set_result(None))
        self.script["held"].clear()


@pytest_asyncio.fixture
async def disk(root: Path) -> AsyncIterator[Disk]:
    made = Disk(root)
    yield made
    made.heal()
    await made.local.close()


async def saved(engine: CheckpointEngine, step: int) -> None:
    await (await engine.save(STATE, step=step)).upload_completion


async def until(condition: Callable[[], object]) -> None:
    """Of what another thread does, and tells nobody."""
    while not condition():  # noqa: ASYNC110 - no event is told
        await asyncio.sleep(0.01)


def names(error: BaseException, verb: str) -> bool:
    """Whether a StorageError behind ``error`` names the verb, the path and the seconds."""
    found = [link for link in chain(error) if isinstance(link, StorageError)]
    return any(
        link.verb == verb and link.path and "0.3 s" in str(link) and verb in str(link) for link in found
    )


@pytest.mark.parametrize("verb", ["create", "write", "sync", "verify", "publish"])
async def test_a_save_names_the_call_that_hangs(root: Path, disk: Disk, verb: str) -> None:
    async with CheckpointEngine(disk.storage, timeouts=SOON) as engine:
        disk.hang(VERBS[verb])
        with pytest.raises(SaveError, match=verb) as caught:
            await asyncio.wait_for(saved(engine, 1), LATEST)
        assert names(caught.value, verb)
        disk.heal()
        if verb != "write":  # the only staging buffer is lost to that call
            await (await engine.save(STATE, step=2)).upload_completion
            assert_same(await engine.read(2), STATE)
    assert ("step-00000002" in committed(root)) == (verb != "write")


@pytest.mark.parametrize("verb", ["sweep", "remove"])
async def test_a_save_does_not_mind_tidying_up_that_hangs(root: Path, disk: Disk, verb: str) -> None:
    async with CheckpointEngine(disk.storage, timeouts=SOON) as engine:
        disk.hang(VERBS[verb])
        response = await asyncio.wait_for(engine.save(STATE, step=1), LATEST)
        await asyncio.wait_for(response.upload_completion, LATEST)
        assert disk.script["calls"]
        disk.heal()


LOADS = [
    ("load", "open", "open"),
    ("load", "read", "read"),
    ("load", "read manifest", "read"),
    ("load", "size", "open"),
    ("load", "read data", "read"),
    ("read", "open", "open"),
    ("read", "read", "read"),
    ("read", "read data", "read"),
    ("latest", "list", "list"),
    ("latest", "read manifest", "read"),
    ("checkpoints", "list", "list"),
    ("open", "list", "list"),
]


async def look(engine: CheckpointEngine, how: str) -> Any:
    if how == "load":
        return await engine.load({"w": torch.zeros(100, 100), "n": 0}, 1)
    if how == "read":
        return await engine.read(1)
    if how == "latest":
        return await engine.latest()
    return [info async for info in engine.checkpoints()]


@pytest.mark.parametrize(("how", "verb", "told"), LOADS)
async def test_whoever_reads_is_told_which_call_hangs(
    root: Path, disk: Disk, how: str, verb: str, told: str
) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save(STATE, step=1)).upload_completion
    engine = CheckpointEngine(disk.storage, timeouts=SOON)
    if how == "open":
        disk.hang(VERBS[verb])
        with pytest.raises(CheckpointError) as caught:
            await asyncio.wait_for(engine.open(), LATEST)
    else:
        async with engine:
            disk.hang(VERBS[verb])
            with pytest.raises(CheckpointError) as caught:
                await asyncio.wait_for(look(engine, how), LATEST)
            disk.heal()
    assert names(caught.value, told), chain(caught.value)


async def test_a_reader_that_can_not_be_closed_spoils_no_load(root: Path, disk: Disk) -> None:
    async with CheckpointEngine(disk.storage, timeouts=SOON) as engine:
        await (await engine.save(STATE, step=1)).upload_completion
        disk.hang("close")
        assert_same(await asyncio.wait_for(engine.read(1), LATEST), STATE)
        disk.heal()


@pytest.mark.parametrize("how", ["load", "read", "latest", "checkpoints"])
@pytest.mark.parametrize("end", ["abort", "cancelled block"])
async def test_ending_the_engine_does_not_wait_for_reads_that_hang(
    root: Path, disk: Disk, how: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_async.engine.lifetime._ABORT_SECONDS", 0.3)
    async with CheckpointEngine(root) as engine:
        await (await engine.save(STATE, step=1)).upload_completion
    hung = CheckpointEngine(disk.storage, timeouts=Timeouts(exit_grace=0.3))  # the storage has ten minutes
    await hung.open()
    disk.hang("list" if how in ("latest", "checkpoints") else "open")
    looking = asyncio.ensure_future(look(hung, how))
    await until(lambda: disk.script["calls"])
    if end == "abort":
        await asyncio.wait_for(hung.abort(), LATEST)
    else:
        await asyncio.wait_for(hung.__aexit__(asyncio.CancelledError, None, None), LATEST)
    with pytest.raises(CheckpointError):
        await asyncio.wait_for(looking, LATEST)


async def test_what_a_late_call_keeps_open_is_closed_once_it_returns(root: Path, disk: Disk) -> None:
    before = set(open_descriptors())
    async with CheckpointEngine(disk.storage, timeouts=SOON) as engine:
        await (await engine.save(STATE, step=1)).upload_completion
        for verb in ("metadata", "read_into"):
            disk.hang(verb)
            with pytest.raises(StorageError):
                await asyncio.wait_for(engine.read(1), LATEST)
            disk.heal()
        disk.hang("seal")
        with pytest.raises(SaveError):
            await (await engine.save(STATE, step=2)).upload_completion
        disk.heal()
        await until(lambda: not any(str(root) in path for path in opened_since(before)))
    assert committed(root) == ["step-00000001"]


def opened_since(before: set[int]) -> list[str]:
    return [path for number, path in open_descriptors().items() if number not in before]


# --- files that hang for real ---------------------------------------------------------------------


class Fifo:
    """A data file in whose place lies a FIFO without a writer: whoever opens it by its path hangs."""

    def __init__(self, path: Path) -> None:
        path.unlink()
        os.mkfifo(path)
        self.path = path

    def release(self) -> None:
        """Whoever hangs there sees a writer come and go."""
        for thread in threading.enumerate():
            while thread.name.startswith("dcp_async-fs") and thread.is_alive():
                os.close(os.open(self.path, os.O_RDWR | os.O_NONBLOCK))
                thread.join(0.05)


def blocking_open(path: Path, started: threading.Event) -> bytes:
    started.set()
    with open(path, "rb") as file:
        return file.read()


async def test_a_thread_that_hangs_in_the_kernel_is_replaced_and_named(root: Path) -> None:
    root.mkdir(exist_ok=True)
    path = root / "pipe"
    path.touch()
    fifo = Fifo(path)
    storage = LocalStorage(root, timeout=0.3)
    for _ in range(3):  # more than there are threads
        with pytest.raises(StorageError, match=r"cannot read .*pipe.* within 0.3 s") as caught:
            await storage.run("read", path, blocking_open, path, threading.Event())
        assert isinstance(caught.value, TimeoutError)
    assert await storage.run("list", root, lambda: "served") == "served"
    await asyncio.wait_for(storage.close(), PATIENCE)
    fifo.release()


async def test_abandoned_calls_of_the_kernel_end_their_waiters(root: Path) -> None:
    root.mkdir(exist_ok=True)
    path = root / "pipe"
    path.touch()
    fifo = Fifo(path)
    storage = LocalStorage(root)
    started = threading.Event()
    waiting = asyncio.ensure_future(storage.run("read", path, blocking_open, path, started))
    assert await on_thread(lambda: started.wait(PATIENCE))
    storage.abandon()
    with pytest.raises(StorageError, match="the engine ends"):
        await asyncio.wait_for(waiting, PATIENCE)
    await asyncio.wait_for(storage.close(), PATIENCE)
    fifo.release()
