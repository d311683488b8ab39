"""For people who have an accelerator: `python3 noxfile.py gpu`. Not part of `tests`."""

from __future__ import annotations

from pathlib import Path

import torch

from dcp_async import CheckpointEngine, RNGState, StagingOptions


async def test_save_holds_the_state_of_the_call_and_not_what_was_queued_later(
    tmp_path: Path, device: torch.device
) -> None:
    weights = torch.zeros(64 << 20, device=device)
    for overlap in (False, True):
        async with CheckpointEngine(tmp_path, staging=StagingOptions(overlap=overlap)) as engine:
            for step in range(3):
                weights.fill_(float(step))
                response = await engine.save({"w": weights}, step=step, replace=True)
                await response.staging_completion
                weights.add_(100.0)
                await response.upload_completion
                saved = await engine.read(step)
                assert torch.equal(saved["w"], torch.full_like(saved["w"], float(step)))


async def test_load_fills_device_tensors_and_generators(tmp_path: Path, device: torch.device) -> None:
    weights = torch.randn(1000, 1000, device=device)
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save({"w": weights, "rng": RNGState()})).upload_completion
        drawn = torch.randn(8, device=device)
        target = torch.zeros_like(weights)
        await engine.load({"w": target, "rng": RNGState()})
        assert torch.equal(target, weights)
        assert torch.equal(torch.randn(8, device=device), drawn)
