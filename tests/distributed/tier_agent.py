"""One rank of a world that saves to two tiers: functions for processes of their own."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dcp_async import ReplicationError
from dcp_async.storage import TieredStorage
from dcp_async.sync import CheckpointEngine
from tests.buckets.agent import join, state_of


def save(store: Path, rank: int, world: int, root: Path) -> str:
    """Two checkpoints; what the last one's replication says on this rank."""
    join(store, rank, world)
    try:
        with CheckpointEngine(TieredStorage(root / "near", root / "far")) as engine:
            for step in (1, 2):
                response = engine.save(state_of(step), step=step)
                response.upload_completion.result()
            try:
                return response.replicated.result().checkpoint_id
            except ReplicationError as error:
                return str(error)
    finally:
        dist.destroy_process_group()


def load(store: Path, rank: int, world: int, root: Path) -> list[float]:
    """The values of this rank's rows' first column in the newest checkpoint."""
    join(store, rank, world)
    try:
        with CheckpointEngine(TieredStorage(root / "near", root / "far")) as engine:
            target = state_of(0)
            report = engine.load(target)
            assert report.step == target["step"] == 2
            rows = target["rows"]
            assert isinstance(rows, DTensor)
            return [float(row[0]) for row in rows.to_local()]
    finally:
        dist.destroy_process_group()
