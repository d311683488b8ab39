"""What the page cache holds of a file, and that loads leave it as they found it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dcp_async import CheckpointEngine
from dcp_async.storage.page_cache import absent_ranges, give_back
from tests.doubles import assert_same, data_files, random_tensor

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
    assert sum(length for _, length in found) == 6 * MIB + 5
    assert all(high <= 4 * MIB or low >= 6 * MIB for low, high in ((a, a + n) for a, n in found))
    give_back(fd, found)
    assert absent_ranges(fd, 8 * MIB + 5) == found, "what was held still is"


def test_of_an_empty_file_nothing_is_absent(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as file:
        assert absent_ranges(file.fileno(), 0) == []


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("verb", ["load", "read"])
async def test_a_load_leaves_the_cache_as_it_found_it(root: Path, verb: str, is_warm: bool) -> None:
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
            loaded: dict[str, torch.Tensor] = {"w": torch.zeros(1024, 1024)}
            if verb == "load":
                await engine.load(loaded)
            else:
                loaded = await engine.read("latest")
            assert_same(loaded, state)
            assert absent_ranges(opened, nbytes) == before
        finally:
            os.close(opened)
