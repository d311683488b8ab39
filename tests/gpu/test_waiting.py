"""Whoever waits for a device sleeps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from dcp_async import CheckpointEngine, StagingOptions
from tests.support.devices import keep_busy, synchronize


async def test_waiting_for_a_busy_queue_burns_no_core(tmp_path: Path, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("nothing else is kept busy")
    async with CheckpointEngine(tmp_path, staging=StagingOptions(overlap=True)) as engine:
        weights = torch.ones(1024, device=device)
        await (await engine.save({"w": weights}, step=0)).upload_completion
        synchronize(device)
        keep_busy(device, 1000)
        response = await engine.save({"w": weights}, step=1)
        cpu, wall = time.process_time(), time.monotonic()
        await response.upload_completion
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    assert cpu < 0.4 * wall
