"""One rank of a world that saves to a bucket: a function for a process of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dcp_async.sync import CheckpointEngine
from tests.support.buckets import Server

ROWS, COLUMNS = 8, 3 << 17
BEGUN = "begun-"
"""What a process lists before it saves, so that a proxy knows where it is."""


def rows_of(step: int) -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS) + step


def state_of(step: int) -> dict[str, Any]:
    sharded = distribute_tensor(rows_of(step), init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
    return {"rows": sharded, "step": step}


def join(store: Path, rank: int, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def save_and_load(store: Path, rank: int, world: int, endpoint: str, prefix: str) -> list[float]:
    """Two checkpoints, of which the newest is loaded; the values of this rank's first row's first column."""
    join(store, rank, world)
    try:
        with CheckpointEngine(Server(endpoint).storage(prefix)) as engine:
            for step in (1, 2):
                engine.save(state_of(step), step=step).upload_completion.result()
            target = state_of(0)
            report = engine.load(target)
            assert report.step == target["step"] == 2
            rows = target["rows"]
            assert isinstance(rows, DTensor)
            return [float(row[0]) for row in rows.to_local()]
    finally:
        dist.destroy_process_group()


def save_until_killed(store: Path, rank: int, world: int, endpoint: str, prefix: str) -> None:
    """Saves step 1, then step 2; asks for an object that is not there before each."""
    if world > 1:
        join(store, rank, world)
    server = Server(endpoint)
    with CheckpointEngine(server.storage(prefix)) as engine:
        for step in (1, 2):
            asyncio.run(server.storage(f"{BEGUN}{step}").connect())
            state = state_of(step) if world > 1 else {"rows": rows_of(step), "step": step}
            engine.save(state, step=step).upload_completion.result()
