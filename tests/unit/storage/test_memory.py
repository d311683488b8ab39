"""Memory as a storage: whose it is, and when it is freed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from mmap import mmap

import pytest

from dcp_async.errors import StorageError
from dcp_async.storage import MemoryStorage

NBYTES = 32 << 20


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def held() -> Iterator[Callable[[], int]]:
    """How many checkpoints' memory is held by now."""
    before = _resident()
    yield lambda: round((_resident() - before) / NBYTES)
    MemoryStorage.clear("run")


async def _save(storage: MemoryStorage, *, replace: bool = False, commit: bool = True) -> None:
    transaction = await storage.begin("a", {"data": NBYTES}, uid="0" * 16, replace=replace)
    with mmap(-1, NBYTES) as zeros:
        await transaction.put("data", 0, memoryview(zeros))
    await transaction.seal("data")
    if commit:
        await transaction.commit(b"metadata", b"manifest", replace=replace)
    else:
        await transaction.abort()


async def test_a_named_checkpoint_is_kept_until_it_is_cleared(held: Callable[[], int]) -> None:
    storage = MemoryStorage("run")
    await _save(storage)
    await storage.close()
    del storage
    assert held() == 1
    again = MemoryStorage("run")
    assert [stored.name for stored in await again.list()] == ["a"]
    MemoryStorage.clear("run")
    assert await again.list() == []
    assert held() == 0


async def test_a_removed_checkpoint_is_freed(held: Callable[[], int]) -> None:
    storage = MemoryStorage("run")
    await _save(storage)
    await storage.remove("a")
    await storage.close()
    assert held() == 0


async def test_without_a_name_checkpoints_go_with_their_storage(held: Callable[[], int]) -> None:
    storage, other = MemoryStorage(), MemoryStorage()
    await _save(storage)
    assert await other.list() == []
    await storage.close()
    assert held() == 1
    del storage
    assert held() == 0


async def test_what_is_replaced_is_freed_when_its_last_reader_closes(held: Callable[[], int]) -> None:
    storage = MemoryStorage("run")
    await _save(storage)
    reader = await storage.open("a")
    await _save(storage, replace=True)
    assert held() == 2
    await reader.close()
    assert held() == 1
    await storage.close()


async def test_an_aborted_save_is_freed(held: Callable[[], int]) -> None:
    storage = MemoryStorage("run")
    await _save(storage, commit=False)
    await storage.close()
    assert held() == 0


async def test_a_save_in_flight_when_its_root_is_cleared_does_not_appear() -> None:
    storage = MemoryStorage("run")
    transaction = await storage.begin("a", {}, uid="0" * 16, replace=False)
    MemoryStorage.clear("run")
    with pytest.raises(StorageError, match="cleared since this save began"):
        await transaction.verify({})
    with pytest.raises(StorageError, match="cleared since this save began"):
        await transaction.commit(b"metadata", b"manifest", replace=False)
    assert await storage.list() == []


async def test_a_save_in_flight_is_listed_and_is_no_checkpoint() -> None:
    storage = MemoryStorage("run")
    transaction = await storage.begin("a", {}, uid="0" * 16, replace=False)
    assert [(stored.name, stored.committed) for stored in await storage.list()] == [("a", False)]
    await transaction.abort()
    assert await storage.list() == []


async def test_a_rank_that_follows_another_is_refused() -> None:
    storage = MemoryStorage("run")
    with pytest.raises(StorageError, match="memory of one process, and several ranks"):
        await storage.begin("a", {}, uid="0" * 16, replace=False, led_from="host")


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_is_told_that_it_sees_the_memory_of_another() -> None:
    storage = MemoryStorage("run")
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(storage.connect())
        except StorageError as error:
            os._exit(0 if "it is the memory of process" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", ["", "/run", "run/", "a//b", "a b", "a?b", "a#b", "a%20b", "a\n"])
def test_a_name_that_no_url_can_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="can't be a name of memory"):
        MemoryStorage(name)


def test_its_representation_makes_it_again() -> None:
    assert [repr(MemoryStorage()), repr(MemoryStorage("run"))] == ["MemoryStorage()", "MemoryStorage('run')"]
