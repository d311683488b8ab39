"""The trainer of plain_before.py on dcp_async: what that one saved is resumed here, and the reverse.

python plain_after.py checkpoints/plain 20
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import torch
from torch import nn

from dcp_async import AppState, CheckpointEngine

SAVE_EVERY = 2


async def train(root: Path, steps: int) -> dict[int, float]:
    """Train to ``steps``, from the newest checkpoint; the loss of each step that was taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    state = {"app": AppState(model, optimizer), "scheduler": scheduler}

    losses = {}
    async with CheckpointEngine(root) as engine:
        start = (await engine.load(state)).next_step if await engine.latest() else 1
        for step in range(start, steps + 1):
            losses[step] = train_step(step, model, optimizer)
            scheduler.step()
            if step % SAVE_EVERY == 0:
                await engine.save(state, step=step)  # the upload goes on; the next save waits for it
    return losses  # leaving the block has waited for the last upload


def train_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    loss = nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    print(asyncio.run(train(Path(sys.argv[1]), int(sys.argv[2]))))
