"""Planners of a user's: ones that DCP's own documentation shows, and one that notes what it is asked.

Enters: what a planner is called with. Leaves: for ``Recording`` the order of the calls, which is compared
with the one that stock makes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

Calls = list[tuple[Any, ...]]


class RecordingSave(DefaultSavePlanner):
    """Notes each call, by what tells it from others."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = []

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.calls.append(("set_up_planner", sorted(state_dict), storage_meta is not None, is_coordinator))
        super().set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        self.calls.append(("create_local_plan",))
        return super().create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        self.calls.append(("create_global_plan", [_items(plan) for plan in all_plans]))
        return super().create_global_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self.calls.append(("finish_plan", _items(new_plan)))
        return super().finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> Any:
        self.calls.append(("resolve_data", _key(write_item.index)))
        return super().resolve_data(write_item)

    def lookup_object(self, index: MetadataIndex) -> Any:
        self.calls.append(("lookup_object", _key(index)))
        return super().lookup_object(index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        self.calls.append(("transform_object", _key(write_item.index)))
        return super().transform_object(write_item, object)


class RecordingLoad(DefaultLoadPlanner):
    """Notes each call, by what tells it from others."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = []

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        names = sorted(metadata.state_dict_metadata)
        self.calls.append(("set_up_planner", sorted(state_dict), names, is_coordinator))
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> Any:
        self.calls.append(("create_local_plan",))
        return super().create_local_plan()

    def create_global_plan(self, global_plan: Any) -> Any:
        self.calls.append(("create_global_plan", [_reads(plan) for plan in global_plan]))
        return super().create_global_plan(global_plan)

    def finish_plan(self, new_plan: Any) -> Any:
        self.calls.append(("finish_plan", _reads(new_plan)))
        return super().finish_plan(new_plan)

    def load_bytes(self, read_item: Any, value: Any) -> None:
        self.calls.append(("load_bytes", _key(read_item.dest_index), value.tell()))
        super().load_bytes(read_item, value)

    def resolve_tensor(self, read_item: Any) -> Any:
        self.calls.append(("resolve_tensor", _key(read_item.dest_index)))
        return super().resolve_tensor(read_item)

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self.calls.append(("commit_tensor", _key(read_item.dest_index), tuple(tensor.shape)))
        super().commit_tensor(read_item, tensor)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        self.calls.append(("lookup_tensor", _key(index)))
        return super().lookup_tensor(index)

    def transform_tensor(self, read_item: Any, tensor: torch.Tensor) -> torch.Tensor:
        self.calls.append(("transform_tensor", _key(read_item.dest_index)))
        made: torch.Tensor = super().transform_tensor(read_item, tensor)
        return made


def _key(index: MetadataIndex) -> tuple[str, Any]:
    return index.fqn, None if index.offset is None else tuple(index.offset)


def _items(plan: SavePlan) -> list[tuple[Any, ...]]:
    return [(*_key(item.index), item.type.name) for item in plan.items]


def _reads(plan: Any) -> list[tuple[Any, ...]]:
    return [(*_key(item.dest_index), *_key(item.storage_index), item.type.name) for item in plan.items]


class Renaming(DefaultSavePlanner):
    """DCP's first example: everything is saved below another key."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        renamed = {f"foo_{key}": value for key, value in state_dict.items()}
        super().set_up_planner(renamed, storage_meta, is_coordinator)


class Half(DefaultSavePlanner):
    """DCP's second example: tensors of 16 bits, in the plan and in the data."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None and item.tensor_data.properties.dtype is torch.float32:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        value = super().resolve_data(write_item)
        if isinstance(value, torch.Tensor) and value.dtype is torch.float32:
            return value.to(torch.float16)
        return value


class HalfUntold(DefaultSavePlanner):
    """Tensors of 16 bits in the data alone, as many a planner has it."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        value = super().transform_object(write_item, object)
        return value.half() if write_item.type is not WriteItemType.BYTE_IO else value


class ExtraData(DefaultSavePlanner):
    """DCP's last example: what each rank says ends up in the metadata."""

    data: Any = "of one rank"

    def create_local_plan(self) -> SavePlan:
        return dataclasses.replace(super().create_local_plan(), planner_data=self.data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = self._create_global_plan(all_plans)
        data: Any = [plan.planner_data for plan in all_plans]
        return plans, dataclasses.replace(metadata, planner_data=data)

    def _create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        bare = [dataclasses.replace(plan, planner_data={}) for plan in all_plans]
        made: tuple[list[SavePlan], Metadata] = super()._create_global_plan(bare)
        return made
