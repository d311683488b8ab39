"""What is written has the permissions that the umask says, as with every well-behaved program."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dcp_async.sync
from dcp_async import interop
from tests.support.doubles import faulty_storage


@contextmanager
def umask(mask: int) -> Iterator[None]:
    earlier = os.umask(mask)
    try:
        yield
    finally:
        os.umask(earlier)


def modes(root: Path) -> dict[str, tuple[bool, int]]:
    """Of all that lies under a root and of itself: (is a directory, mode)."""
    found = [root, *sorted(root.rglob("*"))]
    return {
        str(path.relative_to(root)): (path.is_dir(), stat.S_IMODE(path.stat(follow_symlinks=False).st_mode))
        for path in found
    }


def check(root: Path, mask: int, num_files: int) -> None:
    told = modes(root)
    assert sum(not is_directory for is_directory, _ in told.values()) == num_files
    for name, (is_directory, mode) in told.items():
        assert oct(mode) == oct((0o777 if is_directory else 0o666) & ~mask), name


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002, 0o000])
def test_checkpoints_have_the_permissions_that_the_umask_says(root: Path, mask: int) -> None:
    state = {"w": torch.arange(6.0), "leaf": "leaf"}
    with umask(mask), dcp_async.sync.CheckpointEngine(root / "deep" / "run") as engine:
        engine.save(state, step=1, files={"config.json": b"{}"})
        engine.wait()
        engine.save(state, step=1, files={"config.json": b"{1}"}, replace=True)
    check(root / "deep", mask, num_files=5)


@pytest.mark.parametrize("mask", [0o077, 0o002])
async def test_files_that_live_only_during_a_save_have_them_too(root: Path, mask: int) -> None:
    async with faulty_storage(root) as faulty, dcp_async.CheckpointEngine(faulty) as engine:
        with umask(mask), faulty.hold("seal") as gate:
            response = await engine.save({"w": torch.arange(6.0)}, step=1)
            await gate.until_arrived()
            check(root, mask, num_files=2)  # the data and the lease
        await response.upload_completion


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_stocks_save_through_our_writer_has_them(root: Path, mask: int) -> None:
    with umask(mask):
        dcp.save(
            {"w": torch.arange(6.0)}, storage_writer=interop.FileSystemWriter(root / "one"), no_dist=True
        )
    check(root, mask, num_files=3)
