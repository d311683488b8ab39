"""One rank of a world that saves and loads with stock DCP through our writer and reader.

Enters: as for rank_jobs. Leaves: a checkpoint per job, which the test then looks at; what a rank finds wrong
itself ends it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dcp_async.interop import FileSystemReader, FileSystemWriter
from tests.interop.rank_jobs import run_rank, sharded_state
from tests.interop.stock_states import SHARDED, sharded_whole
from tests.support.stock import CachingPlanner


def _blank() -> dict[str, Any]:
    """A state to load into, laid out otherwise than the one that is saved."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = sharded_whole()
    sharded = {}
    for name, (_, _, dim) in SHARDED.items():
        tensor = torch.zeros_like(whole["sharded"][name])
        other = Shard(1 - dim) if tensor.dim() == 2 else Replicate()
        sharded[name] = distribute_tensor(tensor, mesh, [other])
    return {**whole, "sharded": sharded, "replicated": torch.zeros_like(whole["replicated"])}


def _check(state: dict[str, Any], factor: float = 1) -> None:
    whole = sharded_whole()
    for name, tensor in state["sharded"].items():
        assert isinstance(tensor, DTensor)
        assert torch.equal(tensor.full_tensor(), _scaled(whole["sharded"][name], factor)), name
    assert torch.equal(state["replicated"], whole["replicated"])


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return (tensor * factor).to(tensor.dtype)


def _state(factor: float = 1) -> dict[str, Any]:
    state = sharded_state()
    for tensor in state["sharded"].values():
        local = tensor.to_local()
        local.copy_(_scaled(local, factor))
    return state


def _reshard(path: Path) -> None:
    """What our writer saves, both readers put together in another layout."""
    dcp.save(sharded_state(), checkpoint_id=path, storage_writer=FileSystemWriter(path))
    for reader in (None, FileSystemReader(path)):
        state = _blank()
        dcp.load(state, checkpoint_id=path, storage_reader=reader)
        _check(state)


def _cached(path: Path) -> None:
    """With a cached plan no rank hears of the save from the coordinator."""
    writer = FileSystemWriter(path)
    for factor in (1, 2):
        dcp.save(_state(factor), checkpoint_id=path, storage_writer=writer, planner=CachingPlanner())
        state = _blank()
        dcp.load(state, storage_reader=FileSystemReader(path))
        _check(state, factor)
    elsewhere = path.with_name("cached-elsewhere")
    dcp.save(_state(3), storage_writer=FileSystemWriter(elsewhere), planner=CachingPlanner())
    state = _blank()
    dcp.load(state, checkpoint_id=elsewhere)
    _check(state, 3)


def _beside_training(path: Path) -> None:
    """Saves that overlap, on groups of their own, and collectives on the training's."""
    groups = [dist.new_group(backend="gloo") for _ in range(2)]
    writer = FileSystemWriter(path)
    saves: list[Any] = [
        dcp.async_save(
            _state(factor),
            checkpoint_id=path.with_name(f"{path.name}-{factor}"),
            storage_writer=writer,
            process_group=group,
        )
        for factor, group in enumerate(groups, start=1)
    ]
    under_way = torch.ones(())
    while under_way:  # the ranks leave the loop together
        under_way = torch.tensor(float(not all(save.done() for save in saves)))
        dist.all_reduce(under_way)
    for factor, save in enumerate(saves, start=1):
        save.result()
        state = _blank()
        dcp.load(state, storage_reader=FileSystemReader(path.with_name(f"{path.name}-{factor}")))
        _check(state, factor)


class _FailingPlanner(DefaultSavePlanner):
    """Its data can't be had on the last rank."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise ValueError("nothing there")
        return super().resolve_data(write_item)


def _failed(path: Path) -> None:
    """A rank that fails fails the save on all, and what was there before is there still."""
    dcp.save(_state(), storage_writer=FileSystemWriter(path))
    try:
        dcp.save(_state(2), storage_writer=FileSystemWriter(path), planner=_FailingPlanner())
    except CheckpointException as error:
        cause, _ = error.failures[dist.get_world_size() - 1]
        assert "nothing there" in str(cause), cause
    else:
        raise AssertionError("it was saved")
    dist.barrier()
    state = _blank()
    dcp.load(state, storage_reader=FileSystemReader(path))
    _check(state)
    dist.barrier()
    dcp.save(_state(3), storage_writer=FileSystemWriter(path))  # which sweeps what the failed one left
    if dist.get_rank() == 0:
        names = sorted(os.listdir(path))
        assert len(names) == 2 + dist.get_world_size(), names


JOBS = {"reshard": _reshard, "cached": _cached, "beside": _beside_training, "failed": _failed}


def run(directory: Path, world_size: int, rank: int) -> None:
    """The part of one rank, in a process of its own."""
    run_rank(directory, world_size, rank, list(JOBS), JOBS)
