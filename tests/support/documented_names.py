"""Each name that torch's page on checkpoints lists, at work through our functions, on one rank or several.

Enters: a directory that all ranks see. Leaves: nothing, or an AssertionError. A model and an optimizer are
real, and on several ranks the model's rows are shared out.
"""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
    WriteItem,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dcp_async import functional

Case = Callable[[str], Awaitable[None]]


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer that have taken a step; sharded where there are several ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    return value


def same(left: Any, right: Any) -> bool:
    left, right = whole(left), whole(right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else bool(left == right)


async def save_and_load(path: str) -> None:
    model, optimizer = trained(0)
    state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    await functional.save(state, checkpoint_id=path)
    other, its = trained(1)
    target: dict[str, Any] = dict(zip(("model", "optim"), get_state_dict(other, its), strict=True))
    await functional.load(target, checkpoint_id=path)
    set_state_dict(other, its, model_state_dict=target["model"], optim_state_dict=target["optim"])
    assert same(get_model_state_dict(other), get_model_state_dict(model))
    assert same(get_optimizer_state_dict(other, its), get_optimizer_state_dict(model, optimizer))


async def deprecated(path: str) -> None:
    model, _ = trained(0)
    target = get_model_state_dict(trained(1)[0])
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        await functional.save_state_dict(get_model_state_dict(model), FileSystemWriter(path))
        await functional.load_state_dict(target, FileSystemReader(path))
    assert same(target, get_model_state_dict(model))


class App(Stateful):
    """As torch's tutorial has it."""

    def __init__(self, seed: int) -> None:
        self.model, self.optimizer = trained(seed)

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


async def stateful(path: str) -> None:
    app, other = App(0), App(1)
    await functional.save({"app": app}, checkpoint_id=path)
    await functional.load({"app": other}, checkpoint_id=path)
    assert same(other.state_dict(), app.state_dict())


class OwnWriter(FileSystemWriter, StorageWriter):
    """A StorageWriter of the user's."""


class OwnReader(FileSystemReader, StorageReader):
    """A StorageReader of the user's."""


async def storages(path: str) -> None:
    state, target = get_model_state_dict(trained(0)[0]), get_model_state_dict(trained(1)[0])
    await functional.save(state, storage_writer=OwnWriter(path))
    await functional.load(target, storage_reader=OwnReader(path))
    assert same(target, state)


async def file_systems(path: str) -> None:
    state, target = get_model_state_dict(trained(0)[0]), get_model_state_dict(trained(1)[0])
    await functional.save(state, storage_writer=FileSystemWriter(path))
    await functional.load(target, storage_reader=FileSystemReader(path))
    assert same(target, state)


class OwnSavePlanner(DefaultSavePlanner):
    """Looks at plans and items."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.seen.append(plan)
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        self.seen.append(write_item)
        return super().resolve_data(write_item)


class OwnLoadPlanner(DefaultLoadPlanner):
    """Looks at plans and items."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        self.seen.append(new_plan)
        return super().finish_plan(new_plan)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        self.seen.append(read_item)
        tensor: torch.Tensor = super().resolve_tensor(read_item)
        return tensor


async def planners(path: str) -> None:
    state, target = get_model_state_dict(trained(0)[0]), get_model_state_dict(trained(1)[0])
    saving, loading = OwnSavePlanner(), OwnLoadPlanner()
    await functional.save(state, checkpoint_id=path, planner=saving)
    await functional.load(target, checkpoint_id=path, planner=loading)
    assert same(target, state)
    assert isinstance(saving, SavePlanner)
    assert isinstance(loading, LoadPlanner)
    assert {type(one) for one in saving.seen} == {SavePlan, WriteItem}
    assert {type(one) for one in loading.seen} == {LoadPlan, ReadItem}


async def default_planners(path: str) -> None:
    state, target = get_model_state_dict(trained(0)[0]), get_model_state_dict(trained(1)[0])
    await functional.save(state, checkpoint_id=path, planner=DefaultSavePlanner())
    await functional.load(target, checkpoint_id=path, planner=DefaultLoadPlanner())
    assert same(target, state)


async def halves(path: str) -> None:
    model, optimizer = trained(0)
    other, its = trained(1)
    await functional.save(
        {"m": get_model_state_dict(model), "o": get_optimizer_state_dict(model, optimizer)},
        checkpoint_id=path,
    )
    target: dict[str, Any] = {"m": get_model_state_dict(other), "o": get_optimizer_state_dict(other, its)}
    await functional.load(target, checkpoint_id=path)
    set_model_state_dict(other, target["m"])
    set_optimizer_state_dict(other, its, target["o"])
    assert same(get_model_state_dict(other), get_model_state_dict(model))
    assert same(get_optimizer_state_dict(other, its), get_optimizer_state_dict(model, optimizer))


async def options(path: str) -> None:
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = trained(0)
    other, its = trained(1)
    await functional.save(get_optimizer_state_dict(model, optimizer, options=flat), checkpoint_id=path)
    target = get_optimizer_state_dict(other, its, options=flat)
    await functional.load(target, checkpoint_id=path)
    set_optimizer_state_dict(other, its, target, options=flat)
    ours = get_optimizer_state_dict(model, optimizer, options=flat)
    assert same(get_optimizer_state_dict(other, its, options=flat), ours)


CASES: dict[str, Case] = {
    **dict.fromkeys(("load", "save", "get_state_dict", "set_state_dict"), save_and_load),
    **dict.fromkeys(("load_state_dict", "save_state_dict"), deprecated),
    "Stateful": stateful,
    **dict.fromkeys(("StorageReader", "StorageWriter"), storages),
    **dict.fromkeys(
        ("LoadPlanner", "LoadPlan", "ReadItem", "SavePlanner", "SavePlan", "WriteItem"), planners
    ),
    **dict.fromkeys(("FileSystemReader", "FileSystemWriter"), file_systems),
    **dict.fromkeys(("DefaultSavePlanner", "DefaultLoadPlanner"), default_planners),
    **dict.fromkeys(("get_model_state_dict", "get_optimizer_state_dict"), halves),
    **dict.fromkeys(("set_model_state_dict", "set_optimizer_state_dict"), halves),
    "StateDictOptions": options,
}
"""Name -> what shows it working; names that work together have one case."""
