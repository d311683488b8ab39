"""An FSDP2 trainer on stock torch.distributed.checkpoint; fsdp2_after.py is the same on dcp_async.

torchrun --nproc-per-node 2 fsdp2_before.py checkpoints/fsdp2 20
"""

from __future__ import annotations

import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

SAVE_EVERY = 2


def train(root: Path, steps: int) -> dict[int, float]:
    """Train to ``steps``, from the newest checkpoint; the loss of each step that was taken. Ranks: all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    group = dist.new_group(backend="gloo")  # saves run collectives, which must not meet those of training

    start = newest(root)
    if start:
        model_state, optim_state = get_state_dict(model, optimizer)
        state = {"app": {"model": model_state, "optim": optim_state}}
        dcp.load(state, checkpoint_id=root / f"step-{start:08}")
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optim_state)

    losses = {}
    saving: Future[Any] | None = None
    for step in range(start + 1, steps + 1):
        losses[step] = train_step(step, model, optimizer)
        if step % SAVE_EVERY == 0:
            if saving is not None:
                saving.result()
            model_state, optim_state = get_state_dict(model, optimizer)
            saving = dcp.async_save(  # type: ignore[assignment]  # a response only if a stager is given
                {"app": {"model": model_state, "optim": optim_state}},
                checkpoint_id=root / f"step-{step:08}",
                process_group=group,
            )
    if saving is not None:
        saving.result()
    dist.barrier()  # the coordinator writes `.metadata` last
    return losses


def newest(root: Path) -> int:
    """The step of the newest checkpoint that has a `.metadata`; 0 if there is none."""
    return max((int(path.parent.name[5:]) for path in root.glob("step-*/.metadata")), default=0)


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
    print(train(Path(sys.argv[1]), int(sys.argv[2])))
    dist.destroy_process_group()
