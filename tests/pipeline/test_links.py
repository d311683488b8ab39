"""Checkpoints that were moved to another disk and linked back, aliases, and links of others."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import (
    CheckpointEngine,
    CheckpointExistsError,
    CheckpointNotFoundError,
    SaveError,
    StorageError,
    Trust,
    UntrustedCheckpointError,
)
from dcp_async.storage.local.storage import LocalStorage
from tests.support.doubles import assert_same

OLD, NEW = "step-00000001", "step-00000002"
FOLLOW = Trust(follow_links=True)


def state(step: int) -> dict[str, Any]:
    return {"w": torch.full((100,), float(step)), "n": step}


@pytest.fixture
async def disk(root: Path, tmp_path: Path) -> Path:
    """Another disk; the root has two checkpoints."""
    async with CheckpointEngine(root) as engine:
        for step in (1, 2):
            await engine.save(state(step), step=step)
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def move(path: Path, disk: Path) -> None:
    """Move a directory or a file to the other disk and link it back."""
    shutil.move(path, disk / path.name)
    path.symlink_to(disk / path.name)


def move_all_data(root: Path, disk: Path, name: str) -> None:
    for path in (root / name).glob("*.distcp"):
        move(path, disk)


async def names(engine: CheckpointEngine) -> list[str]:
    return [info.checkpoint_id async for info in engine.checkpoints()]


async def assert_no_older_one(engine: CheckpointEngine, link: str, *words: str) -> None:
    """Every verb that looks for the newest says what it does not read, and why."""
    target = state(0)
    for ask in (engine.latest, lambda: engine.load(target), engine.read, lambda: names(engine)):
        with pytest.raises(UntrustedCheckpointError) as caught:
            await ask()
        for word in (link, *words):
            assert word in str(caught.value)
    assert_same(target, state(0))


async def assert_is_newest(engine: CheckpointEngine, name: str) -> None:
    latest = await engine.latest()
    assert latest is not None
    assert latest.checkpoint_id == name
    assert (await names(engine))[-1] == name
    target = state(0)
    report = await engine.load(target)
    assert report.checkpoint_id == name
    assert target["n"] == report.step


@pytest.mark.parametrize("what", ["directory", "data"])
async def test_a_newest_checkpoint_that_was_moved_is_no_reason_to_give_an_older_one(
    root: Path, disk: Path, what: str
) -> None:
    if what == "directory":
        move(root / NEW, disk)
    else:
        move_all_data(root, disk, NEW)
    async with CheckpointEngine(root) as engine:
        await assert_no_older_one(engine, f"{root / NEW}", "follow_links=True", str(disk))
        with pytest.raises(UntrustedCheckpointError, match="follow_links=True"):
            await engine.read(NEW)
        assert_same(await engine.read(OLD), state(1))


@pytest.mark.parametrize("what", ["directory", "data", "both"])
async def test_a_moved_checkpoint_is_followed_where_the_option_allows_it(
    root: Path, disk: Path, what: str
) -> None:
    if what != "directory":
        move_all_data(root, disk, NEW)
    if what != "data":
        move(root / NEW, disk)
    async with CheckpointEngine(root, trust=FOLLOW) as engine:
        await assert_is_newest(engine, NEW)
        assert_same(await engine.read(NEW), state(2))
        assert_same(await engine.read(2), state(2))
        info = await engine.latest()
        assert info is not None
        assert set((await info.metadata()).state_dict_metadata) == {"w", "n"}
    storage = LocalStorage(root, follow_links=True)
    async with CheckpointEngine(storage) as engine:
        await assert_is_newest(engine, NEW)
    await storage.close()


async def test_the_way_to_a_moved_file_may_have_several_links(root: Path, disk: Path) -> None:
    """The disk itself may be reached by one."""
    mount = disk.with_name("mount")
    mount.symlink_to(disk)
    shutil.move(root / NEW, disk / NEW)
    (disk / "now").symlink_to(NEW)
    (root / NEW).symlink_to(mount / "now")
    async with CheckpointEngine(root, trust=FOLLOW) as engine:
        await assert_is_newest(engine, NEW)
    async with CheckpointEngine(root) as engine:
        await assert_no_older_one(engine, NEW)


@pytest.mark.parametrize("what", ["directory", "data"])
async def test_an_older_checkpoint_that_was_moved_is_in_nobodys_way(
    root: Path, disk: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    if what == "directory":
        move(root / OLD, disk)
    else:
        move_all_data(root, disk, OLD)
    caplog.set_level(logging.WARNING)
    async with CheckpointEngine(root) as engine:
        await assert_is_newest(engine, NEW)
        assert caplog.records != []
        assert await names(engine) == [NEW]
        told = [record for record in caplog.records if OLD in record.getMessage()]
        assert len(told) == 1
        with pytest.raises(UntrustedCheckpointError, match="follow_links"):
            await engine.load(state(0), OLD)
        response = await engine.save(state(3))
        assert (await response.upload_completion).step == 3


async def test_an_older_one_behind_a_link_is_not_passed_over_when_the_newest_is_damaged(
    root: Path, disk: Path
) -> None:
    async with CheckpointEngine(root) as engine:
        await engine.save(state(3), step=3)
    move(root / NEW, disk)
    for file in (root / "step-00000003").glob("*.distcp"):
        file.unlink()
    async with CheckpointEngine(root) as engine:
        await assert_no_older_one(engine, NEW)


def pretend_owner(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let somebody else own ``path``, as far as this process can tell."""
    inode = path.lstat().st_ino
    for name in ("lstat", "fstat"):
        real = getattr(os, name)

        def status(*args: Any, real: Any = real, **options: Any) -> Any:
            found = real(*args, **options)
            if found.st_ino != inode:
                return found
            fields = list(found)
            fields[4] = found.st_uid + 1
            return os.stat_result(fields)

        monkeypatch.setattr(os, name, status)


@pytest.mark.parametrize("whose", ["link", "target"])
@pytest.mark.parametrize("what", ["directory", "data"])
async def test_nothing_of_somebody_else_is_followed(
    root: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, what: str, whose: str
) -> None:
    if what == "directory":
        move(root / NEW, disk)
        link, target = root / NEW, disk / NEW
    else:
        move_all_data(root, disk, NEW)
        (link,), (target,) = (root / NEW).glob("*.distcp"), disk.glob("*.distcp")
    pretend_owner(monkeypatch, link if whose == "link" else target)
    async with CheckpointEngine(root, trust=FOLLOW) as engine:
        await assert_no_older_one(engine, NEW, "owner")
        assert_same(await engine.read(OLD), state(1))


async def test_a_link_to_a_disk_that_is_not_there_is_told(root: Path, disk: Path) -> None:
    move(root / NEW, disk)
    shutil.rmtree(disk)
    for trust in (Trust(), FOLLOW):
        async with CheckpointEngine(root, trust=trust) as engine:
            for ask in (engine.latest, lambda e=engine: names(e), engine.read):
                with pytest.raises(StorageError, match="mounted"):
                    await ask()
            with pytest.raises(StorageError, match="mounted"):
                await engine.read(NEW)
            assert_same(await engine.read(OLD), state(1))


async def test_links_that_are_no_checkpoints_are_in_nobodys_way(root: Path, disk: Path) -> None:
    (disk / "logs").mkdir()
    (disk / "file9").touch()
    (root / "logs-99").symlink_to(disk / "logs")
    (root / "model-99.safetensors").symlink_to(disk / "file9")
    (root / "null-99").symlink_to("/dev/null")
    (root / "data").symlink_to("/nowhere")
    (root / "step-00000077").symlink_to("step-00000076")  # whose checkpoint was deleted
    (root / "loop").symlink_to("loop")
    async with CheckpointEngine(root) as engine:
        await assert_is_newest(engine, NEW)
        assert await names(engine) == [OLD, NEW]
        with pytest.raises(CheckpointNotFoundError):
            await engine.read("step-00000077")


@pytest.mark.parametrize("alias", ["last", "step-00000099", "a/b"])
async def test_a_link_to_a_sibling_is_an_alias(root: Path, disk: Path, alias: str) -> None:
    if alias == "a/b":  # of an alias
        (root / "b").symlink_to(NEW)
        alias, target = "a", "b"
    else:
        target = NEW
    (root / alias).symlink_to(target)
    async with CheckpointEngine(root) as engine:
        await assert_is_newest(engine, NEW)
        assert await names(engine) == [OLD, NEW]
        report = await engine.load(state(0), alias)
        assert report.checkpoint_id == NEW
        assert_same(await engine.read(alias), state(2))


async def test_a_link_to_a_checkpoint_deeper_in_the_root_is_one_by_its_own_name(
    root: Path, disk: Path
) -> None:
    (root / "runs" / "a").mkdir(parents=True)
    shutil.move(root / NEW, root / "runs" / "a" / NEW)
    (root / "best-2").symlink_to(f"runs/a/{NEW}")
    async with CheckpointEngine(root) as engine:
        await assert_is_newest(engine, "best-2")


@pytest.mark.parametrize("follow", [False, True])
async def test_nothing_is_saved_swept_or_removed_through_a_link(root: Path, disk: Path, follow: bool) -> None:
    move(root / NEW, disk)
    (root / "alias").symlink_to(OLD)
    leftover = disk / NEW / "__0_0-0123456789abcdef.distcp"
    leftover.touch()
    async with CheckpointEngine(root, trust=Trust(follow_links=follow)) as engine:
        before = sorted(os.listdir(disk / NEW)), sorted(os.listdir(root / OLD))
        for name in (NEW, "alias"):
            for replace in (False, True):
                with pytest.raises(SaveError) as caught:
                    await (await engine.save(state(7), checkpoint_id=name, replace=replace)).upload_completion
                assert not isinstance(caught.value, CheckpointExistsError)
                assert "link" in str(caught.value)
        await (await engine.save(state(8), step=8)).upload_completion
        assert (sorted(os.listdir(disk / NEW)), sorted(os.listdir(root / OLD))) == before
    storage = LocalStorage(root, follow_links=follow)
    await storage.remove(NEW)
    await storage.remove("alias")
    await storage.close()
    assert leftover.exists()
    assert (root / OLD / ".metadata").exists()
    assert not (root / NEW).is_symlink()
    assert not (root / "alias").is_symlink()
