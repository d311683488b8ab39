"""Removing a checkpoint from a local storage: in an order that survives a kill, and not while it is read."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from dcp_async._names import METADATA, REMOVED, data_file, manifest_file
from dcp_async.errors import StorageError
from dcp_async.storage import InUseError, LocalStorage
from dcp_async.storage.local.read_lease import ReadLease

UID, OTHER = "0" * 16, "1" * 16
NAME = "step-00000001"


@pytest_asyncio.fixture
async def storage(tmp_path: Path) -> AsyncIterator[LocalStorage]:
    made = LocalStorage(tmp_path)
    yield made
    await made.close()


def write(directory: Path, *names: str) -> Path:
    directory.mkdir()
    for name in names:
        (directory / name).write_bytes(b"content")
    return directory


OURS = (data_file(0, 0, UID), data_file(1, 0, UID), manifest_file(UID), METADATA)
STOCKS = ("__0_0.distcp", "__1_0.distcp", METADATA)
RANKS = ("__0_0.distcp", "__1_0.distcp", "__0.metadata", "__1.metadata")
KINDS = {"ours": OURS, "stock's": STOCKS, "stock's of ranks": RANKS, "both": (*RANKS, METADATA)}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_checkpoint_of_any_kind_goes_with_its_directory(
    storage: LocalStorage, tmp_path: Path, kind: str
) -> None:
    directory = write(tmp_path / NAME, *KINDS[kind])
    await storage.remove(NAME)
    assert not directory.exists()


async def test_what_others_put_there_stays(storage: LocalStorage, tmp_path: Path) -> None:
    directory = write(tmp_path / NAME, *OURS, "README", "model.safetensors")
    await storage.remove(NAME)
    assert {path.name for path in directory.iterdir()} == {"README", "model.safetensors"}


@pytest.mark.parametrize("names", [(), ("README",)], ids=["no directory", "no checkpoint"])
async def test_what_is_no_checkpoint_can_not_be_removed(
    storage: LocalStorage, tmp_path: Path, names: tuple[str, ...]
) -> None:
    if names:
        write(tmp_path / NAME, *names)
    with pytest.raises(StorageError, match="no such checkpoint") as caught:
        await storage.remove(NAME)
    assert caught.value.errno == 2


class KilledError(BaseException):
    """Nothing that is written here catches it."""


def dying_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever changes a name raises from the ``call``-th on, as if the process were dead."""
    calls = itertools.count(1)
    for name in ("rename", "unlink", "rmdir"):

        def change(*args: object, _real: Callable[..., None] = getattr(os, name), **kwargs: object) -> None:
            if next(calls) >= call:
                raise KilledError
            _real(*args, **kwargs)

        monkeypatch.setattr(os, name, change)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_removal_that_is_killed_leaves_a_whole_checkpoint_or_none_and_is_finished(
    storage: LocalStorage, tmp_path: Path, kind: str
) -> None:
    survived = 0
    for call in itertools.count(1):
        directory = write(tmp_path / NAME, *KINDS[kind])
        before = {path.name for path in directory.iterdir()}
        with pytest.MonkeyPatch.context() as patch:
            dying_at(call, patch)
            try:
                await storage.remove(NAME)
                break
            except KilledError:
                pass
        (stored,) = await storage.list()
        if stored.committed:
            # rank 0's means nothing beside a `.metadata`
            lost = before - {path.name for path in directory.iterdir()}
            assert all(name.endswith(".metadata") for name in lost)
            assert METADATA not in lost
            survived += 1
            await storage.remove(NAME)
        await storage.sweep(named=lambda metadata, uids: uids)
        assert not directory.exists(), f"killed at {call}: {os.listdir(directory)}"
    assert survived >= 1
    assert call > len(KINDS[kind])


async def test_what_is_saved_under_the_name_of_a_half_removed_one_stays(
    storage: LocalStorage, tmp_path: Path
) -> None:
    directory = write(tmp_path / NAME, "__0_0.distcp", data_file(0, 0, UID), REMOVED)
    await storage.sweep(named=lambda metadata, uids: uids)
    assert not directory.exists()
    write(tmp_path / NAME, "__1_0.distcp", data_file(0, 0, UID), REMOVED)
    for name in (METADATA, "__0_0.distcp", data_file(0, 0, OTHER), manifest_file(OTHER)):
        (directory / name).write_bytes(b"new")
        os.utime(directory / name, ns=(2**62, 2**62))  # younger than the marker
    await storage.sweep(named=lambda metadata, uids: uids & {OTHER})
    assert {path.name for path in directory.iterdir()} == {
        METADATA,
        "__0_0.distcp",
        data_file(0, 0, OTHER),
        manifest_file(OTHER),
    }


@pytest.mark.parametrize("kind", ["ours", "stock's of ranks"])
async def test_a_checkpoint_is_in_use_while_a_reader_has_it(
    storage: LocalStorage, tmp_path: Path, kind: str
) -> None:
    directory = write(tmp_path / NAME, *KINDS[kind])
    readers = [await storage.open(NAME) for _ in range(2)]
    for reader in readers:
        await (reader.metadata() if METADATA in KINDS[kind] else reader.rank_metadata())
    for reader in readers:
        with pytest.raises(InUseError, match="is being read") as caught:
            await storage.remove(NAME, unless_read=True)
        assert caught.value.errno == 16
        assert {path.name for path in directory.iterdir()} == set(KINDS[kind])
        await reader.close()
    await storage.remove(NAME, unless_read=True)
    assert not directory.exists()


async def test_whoever_removes_it_by_name_is_not_kept_from_it(storage: LocalStorage, tmp_path: Path) -> None:
    directory = write(tmp_path / NAME, *OURS)
    reader = await storage.open(NAME)
    await reader.metadata()
    assert await reader.size(OURS[0]) == 7
    await storage.remove(NAME)
    content = bytearray(7)
    await reader.read_into(OURS[0], [(0, memoryview(content))])
    assert content == b"content"
    await reader.close()
    assert not directory.exists()


@contextlib.contextmanager
def child(act: Callable[[], object]) -> Iterator[int]:
    """A forked process that has done ``act`` and does nothing more; it is killed in the end."""
    done, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        act()
        os.write(told, b".")
        signal.pause()
    try:
        assert os.read(done, 1) == b"."
        yield pid
    finally:
        os.close(done)
        os.close(told)
        end(pid)


def end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
async def test_a_reader_of_another_process_keeps_it_until_it_dies(
    storage: LocalStorage, tmp_path: Path
) -> None:
    directory = write(tmp_path / NAME, *OURS)
    # to read alone: a root may be read-only
    with child(lambda: ReadLease(os.open(directory / METADATA, os.O_RDONLY))) as pid:
        with pytest.raises(InUseError):
            await storage.remove(NAME, unless_read=True)
        end(pid)
        await storage.remove(NAME, unless_read=True)
    assert not directory.exists()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
async def test_a_lease_ends_although_a_forked_child_has_it_too(storage: LocalStorage, tmp_path: Path) -> None:
    write(tmp_path / NAME, *OURS)
    reader = await storage.open(NAME)
    await reader.metadata()
    with child(lambda: None):
        with pytest.raises(InUseError):
            await storage.remove(NAME, unless_read=True)
        await reader.close()
        await storage.remove(NAME, unless_read=True)
