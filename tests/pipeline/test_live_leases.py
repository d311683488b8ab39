"""A save that lives is not swept, whatever it waits for; one whose files went away is never durable."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dcp_async import CheckpointEngine, SaveError
from dcp_async.storage.local import lease
from dcp_async.storage.local.lease import sweep_directory
from dcp_async.storage.local.storage import LocalStorage
from tests.support.doubles import (
    PATIENCE,
    FaultyStorage,
    assert_holds_only,
    assert_same,
    committed,
)
from tests.support.saves import STATE

AGE = 600.0
"""Seconds after which a lease that nobody touches is taken for dead."""
BEAT = 0.05
"""Seconds after which an owner touches its lease again."""


@pytest.fixture
def far_apart(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A file system whose locks do not reach other hosts; within the value, this process is another host."""
    real = fcntl.flock
    elsewhere = threading.local()

    def flock(fd: int, operation: int) -> None:
        if not getattr(elsewhere, "is_here", False):
            real(fd, operation)

    @contextlib.contextmanager
    def another_host() -> Iterator[None]:
        elsewhere.is_here = True
        try:
            yield
        finally:
            elsewhere.is_here = False

    monkeypatch.setattr(lease, "is_remote", lambda directory: True)
    monkeypatch.setattr(fcntl, "flock", flock)
    return another_host


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        threading.Event().wait(0.01)


@pytest.mark.parametrize("verb", ["put", "seal", "commit"])
async def test_a_save_that_waits_is_not_swept_by_another_host(
    root: Path, far_apart: Callable[[], Any], verb: str
) -> None:
    local = LocalStorage(root, lease_max_age=5 * BEAT)
    faulty = FaultyStorage(local)
    directory = root / "step-00000001"
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold(verb) as gate:
            response = await engine.save(STATE, step=1)
            await gate.until_arrived()

            def age_and_sweep() -> None:
                (path,) = directory.glob(".lease-*")
                for _ in range(2):
                    os.utime(path, (0, 0))  # an age that passes; the owner has to make it young again
                    until(lambda: path.stat().st_mtime > 0)
                with far_apart():
                    sweep_directory(directory, lambda metadata, uids: uids, max_age=AGE)

            await asyncio.get_running_loop().run_in_executor(None, age_and_sweep)
            assert list(directory.glob(".lease-*"))
        await response.upload_completion
        assert_same(await engine.read(1), STATE)
    await local.close()
    assert_holds_only(root, ["step-00000001"])
    until(lambda: not [t for t in threading.enumerate() if t.name == "dcp_async-lease"])


async def test_the_lease_of_a_stopped_owner_gets_old(root: Path, far_apart: Callable[[], Any]) -> None:
    """Nothing but the owner's own beat keeps it young."""
    directory = root / "step-00000001"
    directory.mkdir(parents=True)
    taken = lease.take_lease(directory, "0" * 16)
    os.utime(taken.path, (0, 0))
    with far_apart():
        sweep_directory(directory, lambda metadata, uids: uids, max_age=AGE)
    assert not taken.path.exists()
    assert not taken.is_held()
    taken.release()


def remove_data(directory: Path) -> None:
    next(directory.glob("*.distcp")).unlink()


def replace_data(directory: Path) -> None:
    path = next(directory.glob("*.distcp"))
    twin = path.with_suffix(".twin")
    shutil.copyfile(path, twin)
    os.rename(twin, path)


def cut_data(directory: Path) -> None:
    path = next(directory.glob("*.distcp"))
    os.truncate(path, path.stat().st_size - 1)


def remove_lease(directory: Path) -> None:
    next(directory.glob(".lease-*")).unlink()


def replace_lease(directory: Path) -> None:
    path = next(directory.glob(".lease-*"))
    path.rename(path.with_suffix(".old"))
    path.touch()


def remove_directory(directory: Path) -> None:
    shutil.rmtree(directory)


def replace_directory(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def link_data(directory: Path) -> None:
    path = next(directory.glob("*.distcp"))
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved").name)


@pytest.mark.parametrize(
    "hurt",
    [
        remove_data, replace_data, cut_data, link_data, remove_lease, replace_lease, remove_directory,
        replace_directory,
    ],
)  # fmt: skip
@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
async def test_a_save_whose_files_went_away_fails(
    root: Path, faulty: FaultyStorage, hurt: Callable[[Path], None], replace: bool
) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("commit") as gate:
            response = await engine.save(STATE, step=1, replace=replace)
            await gate.until_arrived()
            hurt(root / "step-00000001")
        with pytest.raises(SaveError, match="step-00000001") as caught:
            await response.upload_completion
        assert caught.value.phase == "commit"
        assert committed(root) == []
        shutil.rmtree(root / "step-00000001", ignore_errors=True)
        await (await engine.save(STATE, step=2)).upload_completion
        assert_same(await engine.read(2), STATE)
    assert_holds_only(root, ["step-00000002"])


async def test_a_swept_replace_leaves_the_older_checkpoint(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        await (await engine.save(STATE, step=1)).upload_completion
        with faulty.hold("commit") as gate:
            response = await engine.save(STATE | {"n": 2}, step=1, replace=True)
            await gate.until_arrived()
            for path in (root / "step-00000001").iterdir():
                if response.checkpoint_id and path.name.startswith(".lease-"):
                    uid = path.name.removeprefix(".lease-")
            for path in (root / "step-00000001").glob(f"*{uid}*"):
                path.unlink()
        with pytest.raises(SaveError, match="swept"):
            await response.upload_completion
        assert_same(await engine.read(1), STATE)
