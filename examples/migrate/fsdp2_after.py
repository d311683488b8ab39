"""The trainer of fsdp2_before.py on dcp_async: what that one saved is resumed here, and the reverse.

torchrun --nproc-per-node 2 fsdp2_after.py checkpoints/fsdp2 20
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dcp_async import AppState, CheckpointEngine

SAVE_EVERY = 2


async def train(root: Path, steps: int) -> dict[int, float]:
    """Train to ``steps``, from the newest checkpoint; the loss of each step that was taken. Ranks: all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"app": AppState(model, optimizer)}

    losses = {}
    async with CheckpointEngine(root) as engine:  # runs no collectives, so it needs no group of its own
        start = (await engine.load(state)).next_step if await engine.latest() else 1
        for step in range(start, steps + 1):
            losses[step] = train_step(step, model, optimizer)
            if step % SAVE_EVERY == 0:
                await engine.save(state, step=step)
    return losses


def train_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    seed = step * dist.get_world_size() + dist.get_rank()
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(asyncio.run(train(Path(sys.argv[1]), int(sys.argv[2]))))
    dist.destroy_process_group()
