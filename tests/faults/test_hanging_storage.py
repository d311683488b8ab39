"""A storage that does not answer: every verb ends, and says which call of the storage did not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
import uvloop

from dcp_async import (
    CheckpointEngine,
    CheckpointError,
    SaveError,
    Stager,
    StagingOptions,
    StorageError,
    Timeouts,
)
from dcp_async._concurrency import settle
from dcp_async.storage.local.storage import LocalStorage
from tests.support.accelerator import FakeAccelerator
from tests.support.clock import skip_time
from tests.support.doubles import (
    PATIENCE,
    assert_same,
    chain,
    committed,
    on_thread,
    open_descriptors,
    replace_loops,
)
from tests.support.saves import PART, STATE

LIMIT = 600.0
LIMITED = Timeouts(storage=LIMIT)
"""Nobody waits for it: time is skipped once the call in question hangs."""

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
    """Passes everything on but the verb that hangs, which takes no notice of its cancellation."""

    def __init__(self, inner: Any, disk: Disk) -> None:
        self._inner, self._disk = inner, disk

    def __repr__(self) -> str:
        return f"<hanging {self._inner!r}>"

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in VERBS.values():
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            if name == self._disk.verb:
                await self._disk.stand_still()
            with self._disk.at_work():
                returned = await value(*args, **kwargs)
            return Hanging(returned, self._disk) if name in ("begin", "open") else returned

        return call


class Copying(Stager):
    """Tells the disk while it copies: that has a deadline, too."""

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self._disk = disk

    async def enqueue(self, *args: Any, **kwargs: Any) -> Any:
        with self._disk.at_work():
            return await super().enqueue(*args, **kwargs)


class Disk:
    """A storage that hangs on demand, and the clock of the engine that uses it."""

    def __init__(self, root: Path) -> None:
        self.local = LocalStorage(root)
        self.storage: Any = Hanging(self.local, self)
        self.stager = Copying(self)
        self.verb = ""
        self.calls = 0
        """How many have hung."""
        self.cancelled = 0
        """How often one was asked to end."""
        self._at_work = 0
        self._is_due = False
        self._skips_time = False
        self._held: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def hang(self, verb: str, *, is_late: bool = True) -> None:
        """From here on calls of ``verb`` hang; where that ``is_late`` their deadlines pass at once."""
        self.verb, self._skips_time = verb, is_late

    def pass_deadlines(self) -> None:
        """Of the calls that hang."""
        for loop, _ in self._held[:1]:
            loop.call_soon_threadsafe(skip_time, loop, LIMIT + 1)

    def heal(self) -> None:
        self.verb = ""
        for loop, future in self._held:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, future)
        self._held.clear()

    async def stand_still(self) -> None:
        loop = asyncio.get_running_loop()
        released: asyncio.Future[None] = loop.create_future()
        self._held.append((loop, released))
        self.calls += 1
        self._is_due = self._skips_time
        loop.call_soon(self._skip)
        while not released.done():
            try:
                await asyncio.shield(released)
            except asyncio.CancelledError:
                self.cancelled += 1
        raise OSError(5, "the connection is gone")

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1
            asyncio.get_running_loop().call_soon(self._skip)

    def _skip(self) -> None:
        # Not beside a call or a copy that works: its deadline would pass, too.
        if self._is_due and not self._at_work:
            self._is_due = False
            skip_time(asyncio.get_running_loop(), LIMIT + 1)


@pytest_asyncio.fixture
async def disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Disk]:
    replace_loops(monkeypatch, asyncio.new_event_loop)
    made = Disk(root)
    async with made.stager:
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
        link.verb == verb and link.path and f"{LIMIT:g} s" in str(link) and verb in str(link)
        for link in found
    )


@pytest.mark.parametrize("verb", ["create", "write", "sync", "verify", "publish"])
async def test_a_save_names_the_call_that_hangs(root: Path, disk: Disk, verb: str) -> None:
    async with CheckpointEngine(disk.storage, staging=disk.stager, timeouts=LIMITED) as engine:
        disk.hang(VERBS[verb])
        with pytest.raises(SaveError, match=verb) as caught:
            await asyncio.wait_for(saved(engine, 1), PATIENCE)
        assert names(caught.value, verb)
        disk.heal()
        if verb != "write":  # the only staging buffer is lost to that call
            await (await engine.save(STATE, step=2)).upload_completion
            assert_same(await engine.read(2), STATE)
    assert ("step-00000002" in committed(root)) == (verb != "write")


@pytest.mark.parametrize("verb", ["sweep", "remove"])
async def test_a_save_does_not_mind_tidying_up_that_hangs(root: Path, disk: Disk, verb: str) -> None:
    async with CheckpointEngine(disk.storage, staging=disk.stager, timeouts=LIMITED) as engine:
        disk.hang(VERBS[verb])
        await asyncio.wait_for(saved(engine, 1), PATIENCE)
        assert disk.calls
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
    engine = CheckpointEngine(disk.storage, staging=disk.stager, timeouts=LIMITED)
    if how == "open":
        disk.hang(VERBS[verb])
        with pytest.raises(CheckpointError) as caught:
            await asyncio.wait_for(engine.open(), PATIENCE)
    else:
        async with engine:
            disk.hang(VERBS[verb])
            with pytest.raises(CheckpointError) as caught:
                await asyncio.wait_for(look(engine, how), PATIENCE)
            disk.heal()
    assert names(caught.value, told), chain(caught.value)


async def test_a_reader_that_can_not_be_closed_spoils_no_load(root: Path, disk: Disk) -> None:
    async with CheckpointEngine(disk.storage, staging=disk.stager, timeouts=LIMITED) as engine:
        await (await engine.save(STATE, step=1)).upload_completion
        disk.hang("close")
        assert_same(await asyncio.wait_for(engine.read(1), PATIENCE), STATE)
        disk.heal()


@pytest.mark.parametrize("how", ["load", "read", "latest", "checkpoints"])
@pytest.mark.parametrize("end", ["abort", "cancelled block"])
async def test_ending_the_engine_does_not_wait_for_reads_that_hang(
    root: Path, disk: Disk, how: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_async.engine.lifetime._ABORT_SECONDS", 0.05)
    async with CheckpointEngine(root) as engine:
        await (await engine.save(STATE, step=1)).upload_completion
    hung = CheckpointEngine(disk.storage, timeouts=Timeouts(exit_grace=0.05))
    await hung.open()
    disk.hang("list" if how in ("latest", "checkpoints") else "open", is_late=False)
    looking = asyncio.ensure_future(look(hung, how))
    await until(lambda: disk.calls)
    if end == "abort":
        await asyncio.wait_for(hung.abort(), PATIENCE)
    else:
        await asyncio.wait_for(hung.__aexit__(asyncio.CancelledError, None, None), PATIENCE)
    with pytest.raises(CheckpointError):
        await asyncio.wait_for(looking, PATIENCE)


async def test_what_a_late_call_keeps_open_is_closed_once_it_returns(root: Path, disk: Disk) -> None:
    before = set(open_descriptors())
    async with CheckpointEngine(disk.storage, staging=disk.stager, timeouts=LIMITED) as engine:
        await (await engine.save(STATE, step=1)).upload_completion
        for verb in ("metadata", "read_into"):
            disk.hang(verb)
            with pytest.raises(StorageError):
                await asyncio.wait_for(engine.read(1), PATIENCE)
            disk.heal()
        disk.hang("seal")
        with pytest.raises(SaveError):
            await saved(engine, 2)
        disk.heal()
        await until(lambda: not any(str(root) in path for path in opened_since(before)))
    assert committed(root) == ["step-00000001"]


async def test_slots_that_a_cancelled_read_which_hangs_may_still_fill_are_lost(
    root: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a save would stage into memory that the storage writes to once it answers."""
    state = {f"w{index}": torch.full((150, 150), float(index)) for index in range(8)}
    async with CheckpointEngine(root) as engine:
        await (await engine.save(state, step=1)).upload_completion
    # not pinned, for what is lost would stay so for as long as the process lives
    async with (
        Stager(StagingOptions(part_bytes=PART, pinned=False), backend=FakeAccelerator()) as stager,
        CheckpointEngine(disk.storage, staging=stager, timeouts=LIMITED) as engine,
    ):
        stand_still = disk.stand_still

        async def stand_still_with_a_slot() -> None:
            if stager.pool.leased:  # what is read of a checkpoint to open it needs none
                await stand_still()

        monkeypatch.setattr(disk, "stand_still", stand_still_with_a_slot)
        disk.hang("read_into", is_late=False)
        loading = asyncio.ensure_future(engine.read(1, device="cuda"))
        await until(lambda: disk.calls and disk.calls == stager.pool.leased)
        loading.cancel()
        await until(lambda: disk.cancelled >= disk.calls)
        disk.pass_deadlines()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(loading, PATIENCE)
        taken = b"".join(arena.taken for arena in stager.pool.arenas)
        assert (taken.count(1), taken.count(2)) == (0, disk.calls)
        disk.heal()


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
    storage = LocalStorage(root, timeout=LIMIT)
    for _ in range(3):  # more than there are threads
        started = threading.Event()
        reading = asyncio.ensure_future(storage.run("read", path, blocking_open, path, started))
        assert await on_thread(lambda: started.wait(PATIENCE))  # noqa: B023 - it is over when this returns
        skip_time(asyncio.get_running_loop(), LIMIT + 1)
        with pytest.raises(StorageError, match=r"cannot read .*pipe.* within 600 s") as caught:
            await reading
        assert isinstance(caught.value, TimeoutError)
    assert await storage.run("list", root, lambda: "served") == "served"
    await asyncio.wait_for(storage.close(), PATIENCE)
    fifo.release()


@pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
def test_a_deadline_passes_on_both_kinds_of_loop(
    root: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    root.mkdir(exist_ok=True)
    path = root / "pipe"
    path.touch()
    fifo = Fifo(path)

    async def read() -> None:
        storage = LocalStorage(root, timeout=0.1)
        with pytest.raises(StorageError, match=r"cannot read .*pipe.* within 0.1 s"):
            await storage.run("read", path, blocking_open, path, threading.Event())
        await storage.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(read())
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
