"""Tensors of a class of their own, however deep in what an object holds, stay of that class where a load
gives the object its state: distributed ones, and subclasses of which stock's `.metadata` does not tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dcp_async import CheckpointEngine, Trust
from tests.support.saves import Value

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Marked(torch.Tensor):
    """A subclass without anything of its own."""


PLACES: dict[str, Callable[[torch.Tensor], Any]] = {
    "beside others": lambda tensor: {"n": 1, "t": tensor},
    "in a dict": lambda tensor: {"a": {"t": tensor}},
    "two dicts down": lambda tensor: {"a": {"b": {"t": tensor}, "n": 1}},
    "in a list": lambda tensor: [1, tensor],
    "in a list in a dict": lambda tensor: {"a": [1, tensor]},
    "in a dict in a list": lambda tensor: {"a": [{"t": tensor}]},
}


def the_tensor(value: Any) -> torch.Tensor:
    todo = [value]
    while not isinstance(value := todo.pop(), torch.Tensor):
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value


@pytest.mark.parametrize("place", PLACES)
async def test_a_subclass_in_an_objects_state_that_stock_saved_stays_one(root: Path, place: str) -> None:
    def value(fill: float) -> Value:
        return Value(PLACES[place](torch.full((2, 3), fill).as_subclass(Marked)))

    dcp.save({"v": value(1)}, checkpoint_id=root / "step-00000001", no_dist=True)
    target = value(0)
    async with CheckpointEngine(root, trust=Trust(safe_globals=(Marked,))) as engine:
        await engine.load({"v": target})
    loaded = the_tensor(target.value)
    assert type(loaded) is Marked
    assert loaded.tolist() == [[1] * 3] * 2


@pytest.mark.parametrize("is_stocks", [False, True], ids=["ours", "stock's"])
@pytest.mark.parametrize("place", PLACES)
async def test_a_distributed_tensor_in_an_objects_state_stays_one(
    root: Path, mesh: DeviceMesh, place: str, is_stocks: bool
) -> None:
    def value(fill: float) -> Value:
        return Value(PLACES[place](distribute_tensor(torch.full((4, 2), fill), mesh, [Shard(0)])))

    target = value(0)
    async with CheckpointEngine(root) as engine:
        if is_stocks:
            dcp.save({"v": value(1)}, checkpoint_id=root / "step-00000001", no_dist=True)
        else:
            response = await engine.save({"v": value(1)})
            await response.upload_completion
        await engine.load({"v": target})
    loaded = the_tensor(target.value)
    assert isinstance(loaded, DTensor)
    assert loaded.placements == (Shard(0),)
    assert loaded.to_local().tolist() == [[1] * 2] * 4
