"""A checkpoint that is replaced while somebody opens it: he gets the old one or the new one, never an error,
and whoever asks for the newest is never told that there is none."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from dcp_async import CheckpointEngine, CheckpointNotFoundError, CorruptCheckpointError, LoadError
from dcp_async._concurrency.threads import BlockingThreads
from dcp_async.catalog.catalog import Catalog
from dcp_async.catalog.contents import Contents
from dcp_async.load.joint_opening import open_same
from dcp_async.storage.local.storage import LocalStorage
from tests.support.doubles import flip

NAMES = ("open", "listdir", "scandir", "stat", "lstat")


def version(number: int) -> dict[str, Any]:
    return {"w": torch.full((500,), float(number)), "n": number}


def digest(raw: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(raw).encode()


def whole(state: dict[str, Any]) -> int:
    """The version that ``state`` is; it must not be of two."""
    number: int = state["n"]
    assert torch.equal(state["w"], torch.full((500,), float(number)))
    return number


class Replacer:
    """Replaces ``best`` under a root as a save does, at once, before a call on files that a test chooses."""

    def __init__(self, root: Path, versions: list[Path]) -> None:
        self.directory = root / "best"
        self.versions = versions
        self.there = 0
        self.calls = 0
        self.at: set[int] = set()
        self.sweeps = True
        self._busy = threading.local()

    def replace(self) -> None:
        self.there += 1
        source = self.versions[self.there % len(self.versions)]
        (manifest,) = source.glob("manifest-*")
        old_uid, new_uid = manifest.name[9:25].encode(), b"%016x" % self.there
        old = set(os.listdir(self.directory)) - {".metadata"}
        metadata = (source / ".metadata").read_bytes().replace(old_uid, new_uid)
        body = manifest.read_bytes().replace(old_uid, new_uid)[:-29]
        body = re.sub(rb'(?<="metadata_digest":")[0-9a-f]+', digest(metadata), body)
        for file in source.glob("*.distcp"):
            shutil.copy(file, self.directory / file.name.replace(old_uid.decode(), new_uid.decode()))
        (self.directory / f"manifest-{new_uid.decode()}.json").write_bytes(
            body + b',"digest":"' + digest(body) + b'"}'
        )
        (self.directory / "new").write_bytes(metadata)
        os.rename(self.directory / "new", self.directory / ".metadata")
        for name in old if self.sweeps else ():
            (self.directory / name).unlink()

    def before(self) -> None:
        if not threading.current_thread().name.startswith("dcp_async") or getattr(self._busy, "now", False):
            return
        self.calls += 1
        if self.calls in self.at:
            self._busy.now = True
            self.replace()
            self._busy.now = False

    @contextlib.contextmanager
    def hooked(self, *at: int) -> Iterator[None]:
        """Counts the calls of the engine's threads, and replaces before those numbered ``at``."""
        self.calls, self.at = 0, set(at)
        real = {name: getattr(os, name) for name in NAMES}

        def hook(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.before()
                return real[name](*args, **kwargs)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in NAMES:
                patch.setattr(os, name, hook(name))
            yield


@pytest.fixture
async def replacer(root: Path, tmp_path: Path) -> Replacer:
    """``best``, and some more versions of it to put into its place."""
    versions = []
    for number in range(3):
        place = root if number == 0 else tmp_path / f"v{number}"
        async with CheckpointEngine(place) as engine:
            await engine.save(version(number), checkpoint_id="best")
        versions.append(tmp_path / f"version{number}")
        shutil.copytree(place / "best", versions[-1])
    return Replacer(root, versions)


async def by_load(engine: CheckpointEngine) -> int:
    state = {"w": torch.zeros(500), "n": -1}
    await engine.load(state)
    return whole(state)


async def by_name(engine: CheckpointEngine) -> int:
    state = {"w": torch.zeros(500), "n": -1}
    report = await engine.load(state, "best")
    assert report.skipped == ()
    return whole(state)


async def by_read(engine: CheckpointEngine) -> int:
    return whole(await engine.read("best"))


async def by_latest(engine: CheckpointEngine) -> None:
    info = await engine.latest()
    assert info is not None
    assert info.checkpoint_id == "best"


async def by_listing(engine: CheckpointEngine) -> None:
    assert [info.checkpoint_id async for info in engine.checkpoints()] == ["best"]


async def by_metadata(engine: CheckpointEngine) -> None:
    async for info in engine.checkpoints():
        metadata = await info.metadata()
        assert set(metadata.state_dict_metadata) == {"w", "n"}


VERBS = [by_load, by_name, by_read, by_latest, by_listing, by_metadata]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("sweeps", [True, False], ids=["swept", "two_manifests"])
async def test_a_replace_before_any_call_of_a_reader_shows_old_or_new(
    root: Path, replacer: Replacer, verb: Callable[[CheckpointEngine], Awaitable[Any]], sweeps: bool
) -> None:
    async with CheckpointEngine(root) as engine:
        with replacer.hooked():
            await verb(engine)
        count = replacer.calls
        assert count > 5
        replacer.sweeps = sweeps
        for k in range(1, count + 1):
            with replacer.hooked(k):
                await verb(engine)


@pytest.mark.parametrize("verb", VERBS)
async def test_a_replace_at_each_of_many_calls_is_waited_out(
    root: Path, replacer: Replacer, verb: Callable[[CheckpointEngine], Awaitable[Any]]
) -> None:
    async with CheckpointEngine(root) as engine:
        with replacer.hooked(*range(1, 40)):
            await verb(engine)
        assert replacer.there >= 5


async def test_a_checkpoint_that_is_replaced_for_ever_ends_by_the_deadline(
    root: Path, replacer: Replacer
) -> None:
    threads = BlockingThreads("test-work", 1)
    storage = LocalStorage(root)

    async def metadata_of(name: str) -> Any:
        raise AssertionError(name)

    catalog = Catalog(storage, threads, metadata_of, timeout=0.0)
    try:
        with replacer.hooked(*range(1, 10_000)), pytest.raises(LoadError, match="again and again") as caught:
            await catalog.open("best")
        assert not isinstance(caught.value, CorruptCheckpointError)
    finally:
        await storage.close()
        threads.shutdown()


async def test_a_damaged_checkpoint_that_nobody_replaces_is_still_corrupt(
    root: Path, replacer: Replacer
) -> None:
    for damage in ("unlink", "truncate", "manifest", "metadata"):
        replacer.replace()
        data = next(replacer.directory.glob("*.distcp"))
        manifest = next(replacer.directory.glob("manifest-*"))
        if damage == "unlink":
            data.unlink()
        elif damage == "truncate":
            os.truncate(data, 4096)
        elif damage == "manifest":
            flip(manifest, 30)
        else:
            flip(replacer.directory / ".metadata", 30)
        async with CheckpointEngine(root) as engine:
            with pytest.raises(CorruptCheckpointError):
                await engine.read("best")
            assert await engine.latest() is None


async def test_a_checkpoint_that_is_removed_while_it_is_opened_is_not_found(
    root: Path, replacer: Replacer
) -> None:
    """Not corrupt: nothing of it is there to be restored."""
    async with CheckpointEngine(root) as engine:
        with replacer.hooked():
            await by_read(engine)
        for k in range(1, replacer.calls + 1):
            replacer.directory.mkdir(exist_ok=True)
            replacer.replace()
            replacer.replace = lambda: shutil.rmtree(replacer.directory)  # type: ignore[method-assign]
            try:
                with replacer.hooked(k):
                    assert await by_read(engine) >= 0
            except CheckpointNotFoundError:
                pass
            del replacer.replace


# --- several ranks ----------------------------------------------------------------------------------


class Meeting:
    """A coordinator's seat for one rank: all meet at each phase, in one process."""

    def __init__(
        self, rank: int, table: dict[str, dict[int, Any]], size: int, moved: asyncio.Condition
    ) -> None:
        self.rank = rank
        self.is_coordinator = rank == 0
        self.world_size = size
        self._table = table
        self._moved = moved

    async def exchange(
        self, uid: str, phase: str, message: Any, decide: Callable[..., Awaitable[Any]]
    ) -> Any:
        async with self._moved:
            said = self._table.setdefault(phase, {})
            said[self.rank] = message
            self._moved.notify_all()
            await self._moved.wait_for(lambda: len(said) == self.world_size)
            answers = self._table.setdefault(f"answers {phase}", {})
            if self.is_coordinator:
                try:
                    found = await decide([said[rank] for rank in range(self.world_size)])
                except LoadError as error:
                    found = [error] * self.world_size
                answers |= dict(enumerate(found))
                self._moved.notify_all()
            await self._moved.wait_for(lambda: self.rank in answers)
            if isinstance(answers[self.rank], LoadError):
                raise answers[self.rank]
            return answers[self.rank]


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("times", [1, 2])
async def test_ranks_between_whose_looks_a_replace_falls_open_the_same_in_the_end(
    root: Path, replacer: Replacer, late: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_async.load.joint_opening._RETRY_SECONDS", 0.0)
    threads = BlockingThreads("test-work", 1)
    storage = LocalStorage(root)
    table: dict[str, dict[int, Any]] = {}
    moved = asyncio.Condition()
    replaced = 0

    class Late(Catalog):
        async def open(self, name: str) -> Contents:
            nonlocal replaced
            if replaced < times:  # the others have opened what is there now
                phase = f"open {replaced}" if replaced else "open"
                async with moved:
                    await moved.wait_for(lambda: len(table.get(phase, {})) == 2)
                replacer.replace()
                replaced += 1
            return await super().open(name)

    async def metadata_of(name: str) -> Any:
        raise AssertionError(name)

    async def open_on(rank: int) -> Contents:
        catalog = (Late if rank == late else Catalog)(storage, threads, metadata_of)
        seat: Any = Meeting(rank, table, 3, moved)
        return await open_same(catalog, seat, "uid", "best", timeout=60)

    try:
        opened = await asyncio.wait_for(asyncio.gather(*map(open_on, range(3))), 60)
        assert len({contents.digest for contents in opened}) == 1
        for contents in opened:
            await contents.close()
    finally:
        await storage.close()
        threads.shutdown()


@pytest.mark.parametrize("sees", ["another", "nothing", "damage"])
async def test_a_rank_that_sees_something_else_for_too_long_is_named_on_all(
    root: Path, replacer: Replacer, tmp_path: Path, sees: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if sees != "nothing":
        shutil.copytree(replacer.versions[1 if sees == "another" else 0], elsewhere / "best")
    if sees == "damage":
        next((elsewhere / "best").glob("*.distcp")).unlink()
    threads = BlockingThreads("test-work", 1)
    storages = [LocalStorage(root), LocalStorage(elsewhere), LocalStorage(root)]
    table: dict[str, dict[int, Any]] = {}
    moved = asyncio.Condition()

    async def metadata_of(name: str) -> Any:
        raise AssertionError(name)

    async def open_on(rank: int) -> Contents:
        catalog = Catalog(storages[rank], threads, metadata_of)
        seat: Any = Meeting(rank, table, 3, moved)
        return await open_same(catalog, seat, "uid", "best", timeout=0)

    try:
        outcomes = await asyncio.gather(*map(open_on, range(3)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {LoadError}
        assert all(re.search(r"rank\(s\) 1: .*same root", str(outcome)) for outcome in outcomes)
    finally:
        for storage in storages:
            await storage.close()
        threads.shutdown()
