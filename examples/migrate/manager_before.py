"""A checkpoint manager as torchtitan has one, on stock DCP; manager_after.py is the same on dcp_async.

python manager_before.py checkpoints/manager 20
"""

from __future__ import annotations

import sys
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.stateful import Stateful

INTERVAL = 2


class CheckpointManager:
    """Saves every INTERVAL steps, stages beside the next step's forward and backward, loads the newest."""

    def __init__(self, folder: Path, states: dict[str, Any]) -> None:
        self._folder, self._states = folder, states
        pinned = torch.accelerator.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=pinned,
                use_shared_memory=False,
                use_async_staging=pinned,  # which asserts that there is a device
                use_non_blocking_copy=pinned,
            )
        )
        self._staging: Future[Any] | None = None
        self._saving: Future[Any] | None = None

    def save(self, step: int, *, last_step: bool = False) -> None:
        if step % INTERVAL and not last_step:
            return
        self._wait_for_saving()
        response: Any = dcp.async_save(
            self._states,
            checkpoint_id=self._folder / f"step-{step}",
            async_stager=self._stager,
            no_dist=True,
        )
        if isinstance(response, AsyncSaveResponse):
            self._staging, self._saving = response.staging_completion, response.upload_completion
        else:
            self._saving = response

    def load(self) -> bool:
        steps = [int(path.parent.name[5:]) for path in self._folder.glob("step-*/.metadata")]
        if not steps:
            return False
        dcp.load(self._states, checkpoint_id=self._folder / f"step-{max(steps)}", no_dist=True)
        return True

    def maybe_wait_for_staging(self) -> None:
        if self._staging is not None:
            self._staging.result()
            self._staging = None

    def close(self) -> None:
        self._wait_for_saving()
        self._stager.close()

    def _wait_for_saving(self) -> None:
        if self._saving is not None:
            self._saving.result()
            self._saving = None


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
