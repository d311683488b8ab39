"""Rank 0 of several may save alone: the others call nothing, and wait for nothing but its word."""

from __future__ import annotations

from pathlib import Path

import torch

from dcp_async import CheckpointEngine, Coordination
from tests.distributed.engine_agent import EngineAgent, Outcome
from tests.distributed.harness import World


class AloneAgent(EngineAgent):
    async def save_alone(self, root: str) -> Outcome:
        """Rank 0 saves by itself, while the others call nothing; then all of them load."""
        alone = Coordination(mode="local")
        if self._rank == 0:
            async with CheckpointEngine(root, coordination=alone) as engine:
                response = await engine.save({"w": torch.arange(4.0)}, step=7, files={"config.json": b"{}"})
                await response.upload_completion
        torch.distributed.barrier()
        async with CheckpointEngine(root, coordination=alone) as engine:
            state = {"w": torch.zeros(4)}
            report = await engine.load(state)
            return {"step": report.step, "w": state["w"].tolist()}


def test_rank_0_saves_alone_and_all_load_it(tmp_path: Path) -> None:
    with World(2, tmp_path, kind=AloneAgent) as world:
        expected = {"step": 7, "w": [0.0, 1.0, 2.0, 3.0]}
        assert world.all("save_alone", root=str(tmp_path / "run")) == [expected, expected]
    assert (tmp_path / "run" / "step-00000007" / "config.json").read_bytes() == b"{}"
