"""What the page cache holds of a file, and that loads leave it as they found it."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp_async import CheckpointEngine
from dcp_async._concurrency.threads import StuckThreadError
from dcp_async.storage.local import page_cache
from dcp_async.storage.local.files import ReadFile
from dcp_async.storage.local.page_cache import absent_ranges, give_back, overlaps
from dcp_async.storage.local.reader import LocalReader
from dcp_async.storage.local.storage import LocalStorage
from tests.support.doubles import assert_same, data_files, random_tensor

MIB = 1 << 20


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """Of a file of 8 MiB and a bit that has reached the disk."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * MIB + 5))
    opened = os.open(path, os.O_RDWR)
    os.fsync(opened)
    os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_RANDOM)  # or reading one page would bring others
    yield opened
    os.close(opened)


def test_what_was_written_is_held_until_it_is_given_back(fd: int) -> None:
    assert absent_ranges(fd, 8 * MIB + 5) == []
    give_back(fd, [(0, 8 * MIB + 5)])
    assert absent_ranges(fd, 8 * MIB + 5) == [(0, 8 * MIB + 5)]


def test_only_what_is_absent_is_found(fd: int) -> None:
    give_back(fd, [(0, 8 * MIB + 5)])
    os.pread(fd, 2 * MIB, 4 * MIB)
    found = absent_ranges(fd, 8 * MIB + 5)
    assert found is not None
    assert sum(length for _, length in found) == 6 * MIB + 5
    assert all(high <= 4 * MIB or low >= 6 * MIB for low, high in ((a, a + n) for a, n in found))
    give_back(fd, found)
    assert absent_ranges(fd, 8 * MIB + 5) == found, "what was held still is"


def test_what_is_held_is_announced_while_it_is_in_the_processors_caches(fd: int, tmp_path: Path) -> None:
    file = ReadFile(tmp_path / "file")
    first, second = bytearray(6 * MIB), bytearray(MIB)
    told: list[int] = []

    def arrived(nbytes: int) -> None:
        told.append(nbytes)
        expected = os.pread(fd, 7 * MIB, 1)
        assert (first + second)[:nbytes] == expected[:nbytes]

    file.read([(1, memoryview(first)), (1 + 6 * MIB, memoryview(second))], arrived)
    file.close()
    assert told == [4 * MIB, 7 * MIB]


def test_empty_buffers_are_filled(fd: int, tmp_path: Path) -> None:
    file = ReadFile(tmp_path / "file")
    content = bytearray(4 * MIB)
    empty = memoryview(bytearray())
    file.read([(0, empty), (0, memoryview(content)), (4 * MIB, empty)], None)
    file.close()
    assert content == os.pread(fd, 4 * MIB, 0)


async def read_once(reader: LocalReader, file: str) -> None:
    with pytest.raises(StuckThreadError):
        await reader.read_into(file, [])


async def give_back_once(reader: LocalReader, file: str) -> None:
    await reader.give_back()


@pytest.mark.parametrize(("runs_in", "call"), [("run_bulk", read_once), ("run", give_back_once)])
async def test_a_descriptor_that_a_hanging_call_may_still_use_is_never_closed(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    runs_in: str,
    call: Callable[[LocalReader, str], Awaitable[None]],
) -> None:
    async def hang(*args: object) -> None:
        raise StuckThreadError("it hangs")

    async with CheckpointEngine(root) as engine:
        await (await engine.save({"w": torch.zeros(9)}, step=1)).upload_completion
    storage = LocalStorage(root)
    reader = await storage.open("step-00000001")
    (path,) = data_files(root / "step-00000001")
    await reader.size(path.name)
    (opened,) = reader._files.values()
    with monkeypatch.context() as patch:
        patch.setattr(storage, runs_in, hang)
        await call(reader, path.name)
    await reader.close()
    os.fstat(opened.fd)
    opened.close()
    await storage.close()


def test_what_the_disk_must_bring_is_not_announced(fd: int, tmp_path: Path) -> None:
    give_back(fd, [(0, 8 * MIB + 5)])
    file = ReadFile(tmp_path / "file")
    told: list[int] = []
    content = bytearray(8 * MIB + 5)
    file.read([(0, memoryview(content))], told.append)
    file.close()
    assert (told, bytes(content)) == ([], (tmp_path / "file").read_bytes())


async def test_where_the_system_does_not_tell_loads_work(
    fd: int, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_cache, "_CACHESTAT", 100_000)
    assert absent_ranges(fd, 8 * MIB + 5) is None
    file = ReadFile(tmp_path / "file")
    told: list[int] = []
    file.read([(0, memoryview(bytearray(8 * MIB)))], told.append)
    file.give_back()
    file.close()
    assert not told, "it may be the disk that brings it"
    state = {"w": random_tensor(torch.float32, (1024, 1024), 1)}
    async with CheckpointEngine(root) as engine:
        await (await engine.save(state, step=1)).upload_completion
        loaded = {"w": torch.zeros(1024, 1024)}
        await engine.load(loaded)
    assert_same(loaded, state)


def test_of_an_empty_file_nothing_is_absent(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as file:
        assert absent_ranges(file.fileno(), 0) == []


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
async def test_a_load_leaves_the_cache_as_it_found_it(root: Path, is_warm: bool) -> None:
    state = {"w": random_tensor(torch.float32, (1024, 1024), 1)}
    async with CheckpointEngine(root) as engine:
        await (await engine.save(state, step=1)).upload_completion
        (path,) = data_files(root / "step-00000001")
        opened = os.open(path, os.O_RDWR)
        try:
            nbytes = path.stat().st_size
            if is_warm:
                path.read_bytes()
            else:
                os.fsync(opened)
                give_back(opened, [(0, nbytes)])
            before = absent_ranges(opened, nbytes)
            assert before == ([] if is_warm else [(0, nbytes)])
            loaded = {"w": torch.zeros(1024, 1024)}
            await engine.load(loaded)
            assert_same(loaded, state)
            assert absent_ranges(opened, nbytes) == before
        finally:
            os.close(opened)


RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=6)


@given(absent=RANGES, read=RANGES)
def test_what_is_given_back_was_absent_and_read(
    absent: list[tuple[int, int]], read: list[tuple[int, int]]
) -> None:
    disjoint, end = [], 0
    for gap, length in absent:  # ascending, as absent_ranges gives them
        disjoint.append((end + gap, length))
        end += gap + length
    expected = bytes_of(disjoint) & bytes_of(read)
    found = overlaps(disjoint, [(start, start + length) for start, length in read])
    assert bytes_of(found) == expected
    assert sum(length for _, length in found) == len(expected), "each byte once"


def bytes_of(ranges: Iterable[tuple[int, int]]) -> set[int]:
    return {at for start, length in ranges for at in range(start, start + length)}


async def test_what_others_brought_in_stays_if_it_was_not_read_here(root: Path) -> None:
    state = {"a": random_tensor(torch.float32, (1024, 1024), 1), "b": torch.zeros(4)}
    async with CheckpointEngine(root) as engine:
        await (await engine.save(state, step=1)).upload_completion
        (path,) = data_files(root / "step-00000001")
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            give_back(file.fileno(), [(0, path.stat().st_size)])
            assert [info.nbytes async for info in engine.checkpoints()] == [path.stat().st_size]
            path.read_bytes()  # another program's
            await engine.load({"b": torch.ones(4)}, strict=False)
            assert absent_ranges(file.fileno(), path.stat().st_size) == []
