"""Containers in circles, or deeper than anything could go over, are refused by name; those that are merely
shared, or a few hundred deep, are saved."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, PerRank, RNGState, SaveError
from dcp_async.state import CaptureError, capture
from dcp_async.state.depth import MAX_DEPTH
from tests.support.doubles import assert_same


class Owner:
    """A Stateful that gives what it was given."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner

    def state_dict(self) -> Any:
        return self.inner

    def load_state_dict(self, state: Any) -> None:
        self.inner = state


def _dict_in_itself() -> Any:
    made: dict[str, Any] = {"w": torch.ones(1)}
    made["me"] = made
    return made


def _list_in_itself() -> Any:
    made: list[Any] = [torch.ones(1)]
    made.append(made)
    return made


def _list_of_leaves_in_itself() -> Any:
    made: list[Any] = [1]
    made.append(made)
    return made


def _two_in_each_other() -> Any:
    first: dict[str, Any] = OrderedDict(w=torch.ones(1))
    second: dict[str, Any] = UserDict(first=first)  # type: ignore[assignment]
    first["second"] = [second]
    return first


def _stateful_in_its_state() -> Any:
    owner = Owner()
    owner.inner = {"w": torch.ones(1), "me": owner}
    return owner


def _stateful_that_is_its_state() -> Any:
    owner = Owner()
    owner.inner = owner
    return owner


def _statefuls_of_each_other() -> Any:
    first, second = Owner(), Owner()
    first.inner, second.inner = {"b": second}, [{"a": first}]
    return first


def _per_rank_in_itself() -> Any:
    made: dict[str, Any] = {}
    made["own"] = PerRank(made)
    return made


CIRCLES: list[Callable[[], Any]] = [
    _dict_in_itself,
    _list_in_itself,
    _list_of_leaves_in_itself,
    _two_in_each_other,
    _stateful_in_its_state,
    _stateful_that_is_its_state,
    _statefuls_of_each_other,
    _per_rank_in_itself,
]


def nested(depth: int, wrap: Callable[[Any], Any], core: Any) -> Any:
    for _ in range(depth):
        core = wrap(core)
    return core


WRAPS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "dict": (lambda inner: {"k": inner}, torch.ones(1)),
    "dict of a leaf": (lambda inner: {"k": inner}, 1),
    "list": (lambda inner: [inner], torch.ones(1)),
    "dict and list": (lambda inner: {"k": [inner]}, torch.ones(1)),
    "int keys": (lambda inner: {1: inner}, torch.ones(1)),
}
LEAVES: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda inner: (inner,),
    "list of leaves": lambda inner: [inner],
    "tuple of dict": lambda inner: ({"k": inner},),
}


@pytest.mark.parametrize("make", CIRCLES)
async def test_a_circle_is_refused_by_name(root: Path, make: Callable[[], Any]) -> None:
    value = make()
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=r"x\S* is circular: it is x\S* once more") as caught:
            await engine.save({"before": torch.ones(1), "x": value})
        assert len(str(caught.value)) < 400
        with pytest.raises((CaptureError, SaveError), match="circular"):
            await engine.save({"a": {"x": value}})
        await (await engine.save({"before": torch.ones(1)})).upload_completion
        # a Stateful of which nothing was saved is not asked
        with pytest.raises(Exception, match=r"circular|missing in the checkpoint: x"):
            await engine.load({"before": torch.zeros(1), "x": value})


async def test_a_state_in_itself_is_refused(root: Path) -> None:
    state: dict[str, Any] = {"w": torch.ones(1)}
    state["all"] = {"state": state}
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=r"all\.state is circular: it is the state itself once more"):
            await engine.save(state)


@pytest.mark.parametrize("make", [_list_of_leaves_in_itself, _dict_in_itself, _stateful_in_its_state])
async def test_what_becomes_a_circle_between_saves_is_refused(root: Path, make: Callable[[], Any]) -> None:
    state: dict[str, Any] = {"w": torch.ones(1), "x": [1, [2]]}
    async with CheckpointEngine(root) as engine:
        for step in range(2):
            await (await engine.save(state, step=step)).upload_completion
        state["x"] = make()
        with pytest.raises(SaveError, match=r"x\S* is circular"):
            await engine.save(state, step=2)


@pytest.mark.parametrize("case", WRAPS)
async def test_containers_without_end_are_refused_by_name(root: Path, case: str) -> None:
    wrap, core = WRAPS[case]
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=rf"x\.\S*\.\.\.\S*: .* more than {MAX_DEPTH} deep") as caught:
            await engine.save({"x": nested(2000, wrap, core)})
        assert len(str(caught.value)) < 700


@pytest.mark.parametrize("case", LEAVES)
async def test_a_leaf_without_end_is_refused_by_name(root: Path, case: str) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=r"x.*(deep|deeply)"):
            await engine.save({"x": nested(2000, LEAVES[case], 1)})


@pytest.mark.parametrize("case", WRAPS)
async def test_a_few_hundred_levels_are_saved_loaded_and_read(root: Path, case: str) -> None:
    wrap, core = WRAPS[case]
    depth = MAX_DEPTH // len("ab" if case == "dict and list" else "a") - 1
    state = {"x": nested(depth, wrap, core), "s": Owner(nested(depth - 1, wrap, core))}
    async with CheckpointEngine(root) as engine:
        for step in range(2):
            await (await engine.save(state, step=step)).upload_completion
        found = await engine.read()
        for _ in range(depth):
            found["x"] = next(iter(found["x"].values())) if isinstance(found["x"], dict) else found["x"][0]
        while isinstance(found["x"], (dict, list)):
            found["x"] = next(iter(found["x"].values())) if isinstance(found["x"], dict) else found["x"][0]
        assert_same(found["x"], core)
        blank = torch.zeros(1) if isinstance(core, torch.Tensor) else 0
        target = {"x": nested(depth, wrap, blank), "s": Owner(nested(depth - 1, wrap, blank))}
        await engine.load(target)
        inner: Any = target["s"]
        inner = inner.inner
        while isinstance(inner, (dict, list)):
            inner = next(iter(inner.values())) if isinstance(inner, dict) else inner[0]
        assert_same(inner, core)


async def test_containers_that_are_shared_are_no_circle(root: Path) -> None:
    shared = {"w": torch.ones(2), "l": [1, {"n": 2}]}
    state = {"a": shared, "b": [shared, {"c": shared}], "d": Owner({"e": shared})}
    async with CheckpointEngine(root) as engine:
        await (await engine.save(state)).upload_completion
        assert_same(await engine.read(), {"a": shared, "b": [shared, {"c": shared}], "d": {"e": shared}})


def test_generators_side_by_side_lie_no_deeper_than_one() -> None:
    many = capture({"own": [RNGState() for _ in range(MAX_DEPTH + 50)]}, None)
    assert "own.249.rank_0.torch" in many.structure.order
