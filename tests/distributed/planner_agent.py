"""What runs in each rank of a world whose saves and loads planners of the user's decide on.

Enters: a root. Leaves: what the planner was asked, by us and by stock, and how the verb ended, as plain data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_async import CheckpointEngine, CheckpointError, PlanningOptions
from tests.distributed.agent import Agent
from tests.support.planners import RecordingLoad, RecordingSave

WHOLE = torch.arange(20.0).reshape(5, 4)


class FailsOnOne(RecordingSave):
    """One rank's data is not to be had."""

    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 1:
            raise ValueError("not to be had")
        return super().resolve_data(write_item)


class FailsToPlan(RecordingLoad):
    """One rank has no plan."""

    def create_local_plan(self) -> Any:
        if dist.get_rank() == 1:
            raise ValueError("no plan")
        return super().create_local_plan()


class FailsToCommit(RecordingLoad):
    """One rank can't take what was read."""

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        if dist.get_rank() == 1:
            raise ValueError("no room")
        super().commit_tensor(read_item, tensor)


class Hoarding(RecordingSave):
    """Every rank writes what every rank holds."""

    def create_global_plan(self, all_plans: Any) -> Any:
        _, metadata = super().create_global_plan(all_plans)
        return all_plans, metadata


def state() -> dict[str, Any]:
    """Shards of rows, what all ranks hold, what each has for itself."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "rows": distribute_tensor(WHOLE, mesh, [Shard(0)]),
        "same": {"a": torch.ones(3), "b": torch.full((2,), 2.0)},
        "step": 4,
        f"own{dist.get_rank()}": (dist.get_rank(),),
    }


def blank() -> dict[str, Any]:
    """The same without its values."""
    made = state()
    made["rows"].to_local().zero_()
    return {**made, "same": {"a": torch.zeros(3), "b": torch.zeros(2)}, "step": 0}


def told(loaded: dict[str, Any]) -> dict[str, Any]:
    """A state as plain data."""
    rows = loaded["rows"].full_tensor().tolist()
    return {**loaded, "rows": rows, "same": {key: value.tolist() for key, value in loaded["same"].items()}}


class PlannerAgent(Agent):
    """Verbs of an engine with a planner."""

    async def record_save(self, root: str) -> Any:
        """The calls of ours and of stock's, and what stock reads of ours."""
        ours, stock = RecordingSave(), RecordingSave()
        async with CheckpointEngine(root, planning=PlanningOptions(save=lambda: ours)) as engine:
            await (await engine.save(state(), checkpoint_id="ours", step=1)).upload_completion
        writer = FileSystemWriter(Path(root) / "stock", sync_files=False)
        dcp.save(state(), storage_writer=writer, planner=stock)
        target = blank()
        dcp.load(target, checkpoint_id=Path(root) / "ours")
        return ours.calls, stock.calls, told(target)

    async def planned_save(self, root: str, kind: str) -> str:
        """How a save with a planner ends."""
        kinds: dict[str, Any] = {
            "one fails": FailsOnOne,
            "twice": Hoarding,
            "fine": RecordingSave,
            "unlike": RecordingSave if dist.get_rank() == 0 else _default,
        }
        # by one name: what ranks are configured with is compared by that as well
        planning = PlanningOptions(save=lambda: kinds[kind]())
        async with CheckpointEngine(root, planning=planning) as engine:
            try:
                await (await engine.save(state(), checkpoint_id="ours", step=1)).upload_completion
            except CheckpointError as error:
                return f"{type(error).__name__}: {error}"
        return "committed"

    async def record_load(self, root: str) -> Any:
        """The calls of ours and of stock's, and what ours loads."""
        ours, stock, target = RecordingLoad(), RecordingLoad(), blank()
        async with CheckpointEngine(root, planning=PlanningOptions(load=lambda: ours)) as engine:
            await engine.load(target, "ours")
        dcp.load(blank(), checkpoint_id=Path(root) / "ours", planner=stock)
        return ours.calls, stock.calls, told(target)

    async def planned_load(self, root: str, kind: str) -> str:
        """How a load with a planner ends."""
        kinds: dict[str, Any] = {"plan": FailsToPlan, "commit": FailsToCommit}
        planning = PlanningOptions(load=lambda: kinds[kind]())
        async with CheckpointEngine(root, planning=planning) as engine:
            try:
                await engine.load(blank(), "ours")
            except CheckpointError as error:
                return f"{type(error).__name__}: {error}"
        return "loaded"


def _default() -> DefaultSavePlanner:
    return DefaultSavePlanner()
