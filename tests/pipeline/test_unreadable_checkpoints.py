"""A checkpoint that can't be read for now is no reason to know nothing of the others: only the verb that
wants this very one raises. What is passed over is passed over by all verbs that look for the newest."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import (
    CheckpointEngine,
    CheckpointNotFoundError,
    StorageError,
    Trust,
    UntrustedCheckpointError,
)
from dcp_async.storage.local.storage import LocalStorage

OLD, MIDDLE, NEW = "step-00000001", "step-00000002", "step-00000003"


def state(step: int) -> dict[str, Any]:
    return {"w": torch.full((100,), float(step)), "n": step}


async def save(root: Path, *steps: int) -> None:
    async with CheckpointEngine(root) as engine:
        for step in steps:
            await engine.save(state(step), step=step)


async def names(engine: CheckpointEngine) -> list[str]:
    return [info.checkpoint_id async for info in engine.checkpoints()]


def break_blocks(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """Let the medium fail wherever one of ``paths`` is opened."""
    inodes, real = {path.stat().st_ino for path in paths}, os.open

    def guarded(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        fd = real(path, flags, *rest, **options)
        if os.fstat(fd).st_ino in inodes:
            os.close(fd)
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return fd

    monkeypatch.setattr(os, "open", guarded)


@pytest.mark.parametrize("file", [".metadata", "manifest-*.json", "*.distcp", "everything"])
async def test_a_bad_block_of_an_older_checkpoint_is_in_nobodys_way(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    await save(root, 1, 2, 3)
    paths = [*(root / OLD).iterdir(), root / OLD] if file == "everything" else (root / OLD).glob(file)
    break_blocks(monkeypatch, *paths)
    caplog.set_level(logging.WARNING)
    async with CheckpointEngine(root) as engine:
        for _ in range(2):
            latest = await engine.latest()
            assert latest is not None
            assert latest.checkpoint_id == NEW
            assert await names(engine) == [MIDDLE, NEW]
        told = [record.getMessage() for record in caplog.records if OLD in record.getMessage()]
        assert len(told) == 1, told
        assert "Input/output error" in told[0]
        target = state(0)
        report = await engine.load(target)
        assert (report.checkpoint_id, report.skipped, target["n"]) == (NEW, (), 3)
        with pytest.raises(StorageError, match="Input/output error"):
            await engine.load(target, OLD)
        assert (await (await engine.save(state(4))).upload_completion).step == 4


@pytest.mark.parametrize("file", [".metadata", "manifest-*.json"])
async def test_a_bad_block_of_the_newest_checkpoint_is_told_by_whoever_looks_for_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    await save(root, 1, 2, 3)
    break_blocks(monkeypatch, *(root / NEW).glob(file))
    async with CheckpointEngine(root) as engine:
        for ask in (engine.latest, lambda: engine.load(state(0)), engine.read, lambda: names(engine)):
            with pytest.raises(StorageError, match="Input/output error"):
                await ask()
        assert (await engine.load(state(0), 2)).checkpoint_id == MIDDLE
        assert (await (await engine.save(state(4))).upload_completion).step == 4


async def test_a_name_that_may_not_tell_the_step_is_put_in_order_with_a_warning(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save(root, 1, 2)
    async with CheckpointEngine(root) as engine:
        await engine.save(state(9), step=9, checkpoint_id="best")
    break_blocks(monkeypatch, *(root / "best").glob("manifest-*.json"))
    caplog.set_level(logging.WARNING)
    async with CheckpointEngine(root) as engine:
        assert (await engine.load(state(0))).checkpoint_id == MIDDLE
    (told,) = [record.getMessage() for record in caplog.records if "best" in record.getMessage()]
    assert "put in order by its name and time" in told


class Command:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


class Harmless:
    pass


FOREIGN: dict[str, Any] = {
    "a command": Command(),
    "a class": Harmless(),
    "one inside": {"state_dict_metadata": [Harmless()]},
}


@pytest.mark.parametrize("what", FOREIGN)
async def test_a_metadata_file_that_names_what_no_checkpoint_needs_is_passed_over_by_all_verbs(
    root: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    await save(root, 1, 2, 3)
    (root / NEW / ".metadata").write_bytes(pickle.dumps(FOREIGN[what]))
    caplog.set_level(logging.WARNING)
    async with CheckpointEngine(root) as engine:
        latest = await engine.latest()
        assert latest is not None
        assert latest.checkpoint_id == MIDDLE
        assert await names(engine) == [OLD, MIDDLE]
        assert len([record for record in caplog.records if NEW in record.getMessage()]) == 1
        target = state(0)
        report = await engine.load(target)
        assert (report.checkpoint_id, report.skipped, target["n"]) == (MIDDLE, (NEW,), 2)
        assert (await engine.read())["n"] == 2
        for ref in (NEW, 3):
            with pytest.raises(UntrustedCheckpointError, match="which no checkpoint needs"):
                await engine.read(ref)
            with pytest.raises(UntrustedCheckpointError, match="which no checkpoint needs"):
                await engine.load(target, ref)


async def test_where_no_checkpoint_is_fit_the_newest_says_why(root: Path) -> None:
    await save(root, 1, 2)
    for name in (OLD, MIDDLE):
        (root / name / ".metadata").write_bytes(pickle.dumps(Harmless()))
    async with CheckpointEngine(root) as engine:
        assert await engine.latest() is None
        with pytest.raises(UntrustedCheckpointError, match=MIDDLE):
            await engine.load(state(0))


async def test_a_leaf_that_is_not_trusted_is_no_reason_to_give_an_older_checkpoint(root: Path) -> None:
    await save(root, 1)
    async with CheckpointEngine(root, trust=Trust(unsafe=True)) as engine:
        await engine.save({**state(2), "n": Harmless()}, step=2)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(UntrustedCheckpointError, match="Harmless"):
            await engine.load(state(0))
        with pytest.raises(UntrustedCheckpointError, match="Harmless"):
            await engine.read()


class Vanishing:
    """A storage from which ``names`` are removed right before they are opened to be read; to be put in order
    they were opened when the engine was."""

    def __init__(self, inner: LocalStorage) -> None:
        self._inner = inner
        self._vanishing: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def vanish(self, *names: str) -> None:
        self._vanishing.update(names)

    async def open(self, name: str) -> Any:
        if name in self._vanishing:
            self._vanishing.remove(name)
            await self._inner.remove(name)
        return await self._inner.open(name)


@pytest.mark.parametrize("gone", [(NEW,), (NEW, MIDDLE), (NEW, MIDDLE, OLD)], ids=len)
async def test_a_newest_checkpoint_that_is_removed_before_it_is_open_is_no_end_of_the_search(
    root: Path, gone: tuple[str, ...]
) -> None:
    for verb in ("load", "read"):
        await save(root, 1, 2, 3)
        storage = LocalStorage(root)
        vanishing: Any = Vanishing(storage)
        async with CheckpointEngine(vanishing) as engine:
            vanishing.vanish(*gone)
            target = state(0)
            call = engine.load(target) if verb == "load" else engine.read()
            if len(gone) == 3:
                with pytest.raises(CheckpointNotFoundError, match="no checkpoint is committed"):
                    await call
                assert target["n"] == 0
            else:
                found = await call
                assert (target if verb == "load" else found)["n"] == 3 - len(gone)  # type: ignore[index]
        await storage.close()
        shutil.rmtree(root)


async def test_a_checkpoint_that_was_asked_for_by_name_and_is_gone_is_not_replaced_by_an_older_one(
    root: Path,
) -> None:
    await save(root, 1, 2, 3)
    storage = LocalStorage(root)
    vanishing: Any = Vanishing(storage)
    async with CheckpointEngine(vanishing) as engine:
        vanishing.vanish(NEW)
        with pytest.raises(CheckpointNotFoundError, match=NEW):
            await engine.load(state(0), NEW)
    await storage.close()
