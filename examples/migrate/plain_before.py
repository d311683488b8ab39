"""A trainer of one process on stock torch.distributed.checkpoint; plain_after.py is the same on dcp_async.

python plain_before.py checkpoints/plain 20
"""

from __future__ import annotations

import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

SAVE_EVERY = 2


class AppState(Stateful):
    """The wrapper of PyTorch's tutorial."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optim"],
        )


def train(root: Path, steps: int) -> dict[int, float]:
    """Train to ``steps``, from the newest checkpoint; the loss of each step that was taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    state = {"app": AppState(model, optimizer), "scheduler": scheduler}

    start = newest(root)
    if start:
        dcp.load(state, checkpoint_id=root / f"step-{start:08}", no_dist=True)

    losses = {}
    saving: Future[Any] | None = None
    for step in range(start + 1, steps + 1):
        losses[step] = train_step(step, model, optimizer)
        scheduler.step()
        if step % SAVE_EVERY == 0:
            if saving is not None:
                saving.result()  # two at once would mix, and who does not look misses an error
            saving = dcp.async_save(state, checkpoint_id=root / f"step-{step:08}", no_dist=True)  # type: ignore[assignment]  # a response only if a stager is given
    if saving is not None:
        saving.result()
    return losses


def newest(root: Path) -> int:
    """The step of the newest checkpoint that has a `.metadata`; 0 if there is none."""
    return max((int(path.parent.name[5:]) for path in root.glob("step-*/.metadata")), default=0)


def train_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    loss = nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    print(train(Path(sys.argv[1]), int(sys.argv[2])))
