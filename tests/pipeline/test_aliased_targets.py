"""Targets that share memory take what was saved of each, or are refused by name before the first byte."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner

from dcp_async import CheckpointEngine, IncompatibleStateError
from dcp_async.catalog import Contents
from tests.support.doubles import assert_same, frozen

Pair = tuple[torch.Tensor, torch.Tensor]


def _whole() -> Pair:
    base = torch.zeros(6)
    return base, base


def _overlapping() -> Pair:
    base = torch.zeros(8)
    return base[:6], base[2:]


def _inside() -> Pair:
    base = torch.zeros(8)
    return base, base[3:4]


def _transposed() -> Pair:
    base = torch.zeros(3, 3)
    return base, base.t()


def _other_dtype() -> Pair:
    base = torch.zeros(4)
    return base, base.view(torch.int32)


def _strided() -> Pair:
    base = torch.zeros(9)
    return base[::2], base[4:]


SHARED: dict[str, Callable[[], Pair]] = {
    "the same tensor": _whole,
    "overlapping slices": _overlapping,
    "a slice of the other": _inside,
    "a transposed view": _transposed,
    "a view of another dtype": _other_dtype,
    "a strided view": _strided,
}


def _apart(pair: Pair) -> Pair:
    """The same shapes with different values, each in memory of its own."""
    one, other = (torch.arange(tensor.numel()).reshape(tensor.shape) for tensor in pair)
    return (one + 1).to(pair[0].dtype), (other + 100).to(pair[1].dtype)


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"atomic": True}], ids=str)
@pytest.mark.parametrize("way", SHARED)
async def test_what_differs_is_refused_before_the_first_byte(
    root: Path, way: str, options: dict[str, Any]
) -> None:
    one, other = SHARED[way]()
    saved = dict(zip("ab", _apart((one, other)), strict=True))
    before = torch.zeros(2)
    async with CheckpointEngine(root) as engine:
        await engine.save({"deep": saved, "x": torch.ones(2)})
        await engine.wait()
        with pytest.raises(IncompatibleStateError, match=r"deep\.a and deep\.b share memory.*nothing was"):
            await engine.load({"deep": {"a": one, "b": other}, "x": before}, **options)
    assert not one.any()
    assert not other.any()
    assert not before.any()


@pytest.mark.parametrize("way", SHARED)
async def test_what_was_saved_of_one_memory_comes_back_into_one(root: Path, way: str) -> None:
    one, other = SHARED[way]()
    one.copy_(_apart((one, other))[0])
    expected = (one.clone(), other.clone())
    async with CheckpointEngine(root) as engine:
        await engine.save({"a": one, "b": other})
        await engine.wait()
        one.zero_()
        other.zero_()
        await engine.load({"a": one, "b": other})
    assert_same((one, other), expected)


async def test_neighbours_in_one_memory_share_nothing(root: Path) -> None:
    base = torch.zeros(4, 4)
    saved = {"left": torch.ones(4, 2), "right": torch.full((4, 2), 2.0), "none": torch.ones(0)}
    async with CheckpointEngine(root) as engine:
        await engine.save(saved)
        await engine.wait()
        await engine.load({"left": base[:, :2], "right": base[:, 2:], "none": base[4:, 0]})
    assert_same(base, torch.cat([saved["left"], saved["right"]], dim=1))


class Tied(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


async def test_a_tied_module_takes_what_stock_wrote_twice_and_refuses_what_was_not_tied(root: Path) -> None:
    tied, untied, fresh = Tied(tied=True), Tied(tied=False), Tied(tied=True)
    dcp.save({"m": tied.state_dict()}, checkpoint_id=root / "step-1", no_dist=True)
    async with CheckpointEngine(root) as engine:
        await engine.save({"m": untied}, step=2)
        await engine.wait()
        before = frozen(fresh)
        with pytest.raises(IncompatibleStateError, match=r"m\.embed\.weight and m\.head\.weight share"):
            await engine.load({"m": fresh}, 2)
        assert_same(frozen(fresh), before)
        await engine.load({"m": fresh}, "step-1")
    assert_same(frozen(fresh), frozen(tied))


class Holder:
    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.a, self.b = a, b

    def state_dict(self) -> dict[str, Any]:
        return {"a": self.a, "b": self.b}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.a, self.b = state["a"], state["b"]


async def test_a_stateful_gets_new_tensors_where_its_own_share_memory(root: Path) -> None:
    one, other = _apart(_overlapping())
    fresh = Holder(*_overlapping())
    async with CheckpointEngine(root) as engine:
        await engine.save({"h": Holder(one, other)})
        await engine.wait()
        await engine.load({"h": fresh})
    assert_same((fresh.a, fresh.b), (one, other))


ROOTS: dict[str, Callable[[], dict[str, Any]]] = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda: collections.defaultdict(list),
    "Counter": collections.Counter,
}


@pytest.mark.parametrize("kind", ROOTS)
async def test_the_root_is_read_back_as_what_it_was(root: Path, kind: str) -> None:
    state = ROOTS[kind]()
    state.update({"b": 2, "a": 1})
    async with CheckpointEngine(root) as engine:
        await engine.save(dict(state), step=1)
        await engine.save(state, step=2)  # the same names, so that a plan could be taken for both
        await engine.wait()
        found = await engine.read(2)
        assert type(await engine.read(1)) is dict
        part = await engine.read(2, keys=["a"])
    assert type(found) is type(state)
    assert list(found.items()) == [("b", 2), ("a", 1)]
    assert type(part) is type(state)


async def test_tied_targets_that_stock_wrote_inside_of_leaves_cost_no_look_at_all_names_each(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    look = vars(Contents)["names"].fget

    def counted(contents: Contents) -> Any:
        nonlocal looks
        looks += 1
        return look(contents)

    async def looks_of_a_load(name: str, count: int) -> int:
        nonlocal looks
        saved = {f"p{number}": torch.ones(2) for number in range(count)}
        whole = DefaultSavePlanner(flatten_state_dict=False)
        dcp.save({"a": saved, "b": saved}, checkpoint_id=root / name, no_dist=True, planner=whole)
        state = {f"p{number}": torch.zeros(2) for number in range(count)}
        looks = 0
        await engine.load({"a": state, "b": state}, name)
        assert_same(state, saved)
        return looks

    monkeypatch.setattr(Contents, "names", property(counted))
    async with CheckpointEngine(root) as engine:
        assert await looks_of_a_load("many", 20) == await looks_of_a_load("few", 2)
