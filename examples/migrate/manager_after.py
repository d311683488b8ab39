"""The trainer of manager_before.py on dcp_async: what that one saved is resumed here, and the reverse.

python manager_after.py checkpoints/manager 20
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from dcp_async import AppState, AsyncSaveResponse, StagingOptions
from dcp_async.sync import CheckpointEngine

INTERVAL = 2


class CheckpointManager:
    """Saves every INTERVAL steps, stages beside the next step's forward and backward, loads the newest."""

    def __init__(self, folder: Path, states: dict[str, Any]) -> None:
        self._states = states
        self._engine = CheckpointEngine(folder, staging=StagingOptions(overlap=True)).open()
        self._response: AsyncSaveResponse | None = None

    def save(self, step: int, *, last_step: bool = False) -> None:
        if step % INTERVAL == 0 or last_step:
            self._response = self._engine.save(
                self._states, step=step, checkpoint_id=f"step-{step}", replace=True
            )

    def load(self) -> bool:
        if self._engine.latest() is None:
            return False
        self._engine.load(self._states)
        return True

    def maybe_wait_for_staging(self) -> None:
        if self._response is not None:
            self._response.staging_completion.result()

    def close(self) -> None:
        self._engine.close()


@dataclass(kw_only=True)
class TrainState(Stateful):
    """What the loop itself has to remember."""

    step: int = 0
    ntokens_seen: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step), "ntokens_seen": torch.tensor(self.ntokens_seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.ntokens_seen = int(state_dict["step"]), int(state_dict["ntokens_seen"])


def train(root: Path, steps: int) -> dict[int, float]:
    """Train to ``steps``, from the newest checkpoint; the loss of each step that was taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    train_state = TrainState()
    manager = CheckpointManager(
        root, {"app": AppState(model, optimizer), "lr_scheduler": scheduler, "train_state": train_state}
    )
    losses = {}
    try:
        manager.load()
        while train_state.step < steps:
            train_state.step += 1
            losses[train_state.step] = train_step(train_state, model, optimizer, manager)
            scheduler.step()
            manager.save(train_state.step, last_step=train_state.step == steps)
    finally:
        manager.close()
    return losses


def train_step(
    train_state: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    manager: CheckpointManager,
) -> float:
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(train_state.step))
    train_state.ntokens_seen += inputs.numel()
    loss = nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
    manager.maybe_wait_for_staging()
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    print(train(Path(sys.argv[1]), int(sys.argv[2])))
