"""A job of many ranks in one process: what each of them captures, and what stock plans for it.

In: a layout, items per rank, a number of ranks. Out: Ranks. One rank's state is built and captured by the
real code, with DTensors over a process group that only pretends (rank 0 of so many); the other ranks' are
that one with their own names and offsets.
Keeps: the last rank, derived, equals what the real code makes of its own state.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_async.state import Captured, capture
from dcp_async.state.sharding import Shard as LocalShard

LAYOUTS = {
    "fsdp": "every rank a piece of every tensor",
    "ddp": "every rank the same whole tensors",
    "expert": "every rank tensors of its own",
}
NUM_LEAVES = 8
"""Items that are no tensors: an optimizer's hyperparameters, the same on all ranks."""
ROWS, COLUMNS = 2, 4
"""The shape of a rank's tensors: planning does not look at bytes, so they may be small."""


@contextmanager
def pretending(world_size: int, rank: int) -> Iterator[DeviceMesh]:
    """A mesh over all ranks of a job of which this process is the only one."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


def tensor_names(layout: str, items: int, rank: int) -> list[str]:
    """Names as a transformer has them, below "model" and "optim.state"."""
    parts = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1")
    expert = f"experts.{rank}." if layout == "expert" else ""
    count = -(-(items - NUM_LEAVES) // 3)
    return [f"layers.{index // 5}.{expert}{parts[index % 5]}.weight" for index in range(count)]


def state_of(layout: str, items: int, mesh: DeviceMesh, rank: int) -> dict[str, Any]:
    """A model and its AdamW on ``rank``, of ``items`` leaves."""

    def tensor() -> torch.Tensor:
        local = torch.zeros(ROWS, COLUMNS)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False) if layout == "fsdp" else local

    names = tensor_names(layout, items, rank)
    wanted = items - NUM_LEAVES - len(names)
    optim: dict[str, dict[str, torch.Tensor]] = {}
    for index in range(wanted):
        optim.setdefault(names[index // 2], {})[("exp_avg", "exp_avg_sq")[index % 2]] = tensor()
    group = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    group |= {"amsgrad": False, "foreach": None, "maximize": False, "capturable": False}
    assert len(group) == NUM_LEAVES
    return {
        "model": {name: tensor() for name in names},
        "optim": {"state": optim, "param_groups": [group]},
    }


@dataclasses.dataclass(slots=True)
class Ranks:
    """A job of ``world_size`` ranks: rank 0 as it is, the others derived from it."""

    layout: str
    items: int
    world_size: int
    states: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    captured: dict[int, Captured] = dataclasses.field(default_factory=dict)
    plans: dict[int, SavePlan] = dataclasses.field(default_factory=dict)

    @classmethod
    def build(cls, layout: str, items: int, world_size: int) -> Ranks:
        """Raises AssertionError if the last rank, derived, differs from what the real code makes of it."""
        made = cls(layout, items, world_size)
        for rank in (0, world_size - 1):
            with pretending(world_size, rank) as mesh:
                state = state_of(layout, items, mesh, rank)
                made.states[rank] = state
                made.captured[rank] = capture(state, None, rank=rank)
                made.plans[rank] = stock_plan(state, is_coordinator=rank == 0)
        last = world_size - 1
        assert made.capture_of(last).structure == made.captured[last].structure
        assert made.capture_of(last).tree == made.captured[last].tree
        assert made.plan_of(last) == made.plans[last]
        return made

    def capture_of(self, rank: int) -> Captured:
        """What ``rank`` captures."""
        first = self.captured[0]
        structure, tree = first.structure, first.tree
        if self.layout == "fsdp":
            shards = {
                index: LocalShard(shard.size, (rank * ROWS, 0)) for index, shard in structure.shards.items()
            }
            structure = dataclasses.replace(structure, shards=shards)
        elif self.layout == "expert":
            names = [self._renamed(name, rank) for name in structure.tensor_names]
            order = [self._renamed(name, rank) for name in structure.order]
            containers = [
                (self._renamed(name, rank), kind, size, before)
                for name, kind, size, before in structure.containers
            ]
            structure = dataclasses.replace(structure, tensor_names=names, order=order, containers=containers)
            tree = json.loads(self._renamed(json.dumps(tree), rank))
        return Captured(
            known=dataclasses.replace(first.known, structure=structure),
            tree=tree,
            tensors=first.tensors,
            leaf_items=first.leaf_items,
            optimizers=[],
            live=first.live,
            dtensors=first.dtensors,
            pointers=first.pointers,
        )

    def plan_of(self, rank: int) -> SavePlan:
        """What stock plans on ``rank``."""
        base = self.plans[0]
        if rank == 0:
            return base
        return dataclasses.replace(
            base, items=[self._moved(item, rank) for item in base.items], planner_data=self._paths(rank)
        )

    def _paths(self, rank: int) -> Any:
        paths = self.plans[0].planner_data
        if self.layout != "expert":
            return paths
        return {
            self._renamed(name, rank): tuple(
                self._renamed(key, rank) if isinstance(key, str) else key for key in path
            )
            for name, path in paths.items()
        }

    def _moved(self, item: WriteItem, rank: int) -> WriteItem:
        if self.layout == "ddp" or item.tensor_data is None:
            return item
        if self.layout == "expert":
            return dataclasses.replace(
                item, index=MetadataIndex(self._renamed(item.index.fqn, rank), item.index.offset)
            )
        offsets = torch.Size([rank * ROWS, 0])
        chunk = ChunkStorageMetadata(offsets, item.tensor_data.chunk.sizes)
        return dataclasses.replace(
            item,
            index=MetadataIndex(item.index.fqn, offsets),
            tensor_data=dataclasses.replace(item.tensor_data, chunk=chunk),
        )

    def _renamed(self, text: str, rank: int) -> str:
        return text.replace("experts.0.", f"experts.{rank}.")


def stock_plan(state: dict[str, Any], *, is_coordinator: bool) -> SavePlan:
    """A rank's local plan, as stock makes it on every save."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, None, is_coordinator)
    return planner.create_local_plan()
