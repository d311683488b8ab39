"""A link out of the root that leads to nothing may be a checkpoint on a disk that is not mounted, whatever it
is called: no older one is given in its place without a word."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, CheckpointNotFoundError, StorageError

STATE: dict[str, Any] = {"w": torch.ones(3), "n": 7}


@pytest.mark.parametrize("name", ["best", "final model", "last"])
async def test_one_whose_name_tells_no_step_is_told_once_and_in_nobodys_way(
    root: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    async with CheckpointEngine(root) as engine:
        await engine.save(STATE, step=7)
    (root / name).symlink_to("/nowhere/run")
    caplog.set_level(logging.WARNING)
    async with CheckpointEngine(root) as engine:
        for _ in range(2):
            target = {"w": torch.zeros(3), "n": 0}
            assert (await engine.load(target)).step == 7
            latest = await engine.latest()
            assert latest is not None
            assert latest.step == 7
            assert [info.step async for info in engine.checkpoints()] == [7]
        (told,) = [record.getMessage() for record in caplog.records if f"{name!r}" in record.getMessage()]
        assert "mounted" in told
        with pytest.raises(StorageError, match="mounted"):
            await engine.read(name)


@pytest.mark.parametrize("name", ["best", "final model", "latest", "epoch-7"])
async def test_one_that_may_be_the_newest_is_an_error(root: Path, name: str) -> None:
    """Where no checkpoint has a step, time decides."""
    async with CheckpointEngine(root) as engine:
        await engine.save(STATE, checkpoint_id="first")
    (root / name).symlink_to("/nowhere/run")
    os.utime(root / name, (4e9, 4e9), follow_symlinks=False)  # clocks of file systems are coarse
    async with CheckpointEngine(root) as engine:
        for ask in (engine.latest, lambda: engine.load(dict(STATE)), engine.read):
            with pytest.raises(StorageError, match="mounted"):
                await ask()
        assert (await engine.load(dict(STATE), "first")).checkpoint_id == "first"
        await (await engine.save(STATE, step=8)).upload_completion


async def test_one_that_leads_to_a_sibling_that_is_gone_is_nothing(root: Path) -> None:
    root.mkdir()
    (root / "last").symlink_to("step-00000003")
    async with CheckpointEngine(root) as engine:
        assert await engine.latest() is None
        with pytest.raises(CheckpointNotFoundError):
            await engine.load(dict(STATE))
