"""Keys with dots beside objects whose names they seem to continue: each gets its own, nobody another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import AppState, CheckpointEngine, IncompatibleStateError, PerRank, RNGState, SaveError
from tests.support.doubles import Net, assert_same
from tests.support.saves import Value, saved


class Holder(Value):
    """A Stateful that holds memory, so that a load asks it."""

    def __init__(self, fill: float) -> None:
        super().__init__({"k": torch.full((3,), fill)})


def ones(fill: float) -> torch.Tensor:
    return torch.full((2, 2), fill)


def app(fill: float) -> AppState:
    with torch.random.fork_rng():
        torch.manual_seed(int(fill))
        return AppState(Net())


STATES: dict[str, Callable[[float], dict[str, Any]]] = {
    "a tensor beside a Stateful": lambda fill: {"m": Holder(fill), "m.ema": ones(fill)},
    "a tensor before a Stateful": lambda fill: {"m.ema": ones(fill), "m": Holder(fill)},
    "beside one that has no state": lambda fill: {"m": Value({}), "m.ema": ones(fill)},
    "beside one that is not asked": lambda fill: {"m": Value({"count": fill}), "m.ema": ones(fill)},
    "beside one whose state is a leaf": lambda fill: {"m": Value(fill), "m.ema": ones(fill)},
    "a leaf": lambda fill: {"m": Holder(fill), "m.best": f"epoch {fill}"},
    "a mapping": lambda fill: {
        "m": Holder(fill),
        "m.ema": {"w": ones(fill), "n": fill, "l": [fill, ones(fill)]},
    },
    "a Stateful": lambda fill: {"m": Holder(fill), "m.ema": Holder(fill + 1)},
    "a Stateful that is not asked": lambda fill: {"m": Holder(fill), "m.ema": Value({"n": fill})},
    "two levels": lambda fill: {"m": Holder(fill), "m.a": Holder(fill + 1), "m.a.b": ones(fill)},
    "further down": lambda fill: {"run": {"m": Holder(fill), "m.ema": ones(fill), "n": fill}},
    "a number": lambda fill: {"run": {1: Holder(fill), 1.5: ones(fill)}},
    "a module": lambda fill: {"net": app(fill).model, "net.ema": ones(fill)},
    "an AppState": lambda fill: {"app": app(fill), "app.model": ones(fill), "app.extra.w": {"x": fill}},
    "what is PerRank": lambda fill: {"p": PerRank({"w": ones(fill)}), "p.x": ones(fill), "p.y": fill},
    "random generators": lambda fill: {"rng": RNGState(), "rng.seed": ones(fill), "rng.epoch": fill},
    "an entry of a list": lambda fill: {"run": [Holder(fill)], "run.0.x": ones(fill)},
}


def pictured(state: Any) -> Any:
    """What there is to compare, objects by their state."""
    if isinstance(state, RNGState):
        return None  # the process's, whatever state it is in
    if isinstance(state, PerRank):
        return pictured(state.value)
    if hasattr(state, "state_dict"):
        return pictured(state.state_dict())
    if isinstance(state, dict):
        return {key: pictured(value) for key, value in state.items()}
    if isinstance(state, list):
        return [pictured(value) for value in state]
    return state.clone() if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize("name", STATES)
async def test_everything_comes_back(root: Path, name: str) -> None:
    whole, target = STATES[name](1.0), STATES[name](5.0)
    expected = pictured(whole)
    async with CheckpointEngine(root) as engine:
        await saved(engine, whole)
        report = await engine.load(target)
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    assert_same(pictured(target), expected)


@pytest.mark.parametrize("name", STATES)
async def test_what_is_missing_beside_an_object_is_said(root: Path, name: str) -> None:
    """Whatever continues an object's name is left out of the checkpoint; the load must not pass over it."""
    whole, target = STATES[name](1.0), STATES[name](5.0)
    inner, wanted = (state.get("run", state) for state in (whole, target))
    inner = inner if isinstance(inner, dict) else whole
    wanted = wanted if isinstance(wanted, dict) else target
    for key in [key for key in inner if "." in str(key)]:
        del inner[key]
    async with CheckpointEngine(root) as engine:
        await saved(engine, whole)
        with pytest.raises(IncompatibleStateError) as caught:
            await engine.load(target)
    for key in [key for key in wanted if "." in str(key)]:
        assert str(key) in str(caught.value)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
async def test_what_stock_wrote_comes_back(root: Path) -> None:
    whole, target = STATES["a tensor beside a Stateful"](1.0), STATES["a tensor beside a Stateful"](5.0)
    dcp.save(whole, checkpoint_id=root / "step-00000001", no_dist=True)
    async with CheckpointEngine(root) as engine:
        await engine.load(target)
    assert_same(pictured(target), pictured(whole))


AMBIGUOUS: dict[str, dict[str, Any]] = {
    "a Stateful and a leaf": {"a": {"b": 1}, "a.b": Holder(1.0)},
    "a Stateful without state and a leaf": {"a.b": Value({}), "a": {"b": ones(1.0)}},
    "a module and a tensor": {"a.b": torch.nn.Linear(2, 2), "a": {"b": ones(1.0)}},
    "two Statefuls": {"a": {"b": Holder(1.0)}, "a.b": Holder(2.0)},
    "what is PerRank and a leaf": {"a": {"b": PerRank(1)}, "a.b": 2},
    "an entry of a list": {"a": [Holder(1.0)], "a.0": ones(1.0)},
}


@pytest.mark.parametrize("name", AMBIGUOUS)
async def test_an_object_whose_name_something_else_has_is_refused(root: Path, name: str) -> None:
    """Names are all that tells whose a saved value is: such a state came back mixed up."""
    state = AMBIGUOUS[name]
    twice = "a.0" if "list" in name else "a.b"
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=f"{twice}.*rename"):
            await saved(engine, state)
        await saved(engine, {"a": {"b": 1}})
        with pytest.raises(IncompatibleStateError, match=f"{twice}.*rename"):
            await engine.load(state)


SHARED: dict[str, dict[str, Any]] = {
    "a leaf": {"a": Value(1.5)},
    "a tensor": {"a": Value(ones(1.0))},
    "what is PerRank": {"a": Value(PerRank(1))},
    "an object": {"a": Value(Value({"x": 1}))},
    "each of several": {"a": [Value(1), Value(2)], "b": PerRank({"c": Value(3)})},
}


@pytest.mark.parametrize("name", SHARED)
async def test_an_object_may_share_its_name_with_all_that_it_has(root: Path, name: str) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, SHARED[name])
        await engine.load(SHARED[name])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
async def test_a_nested_tensor_in_an_objects_state_is_in_nobodys_way(root: Path) -> None:
    """It raises where it is asked for its shape, as a load does that looks for memory."""
    nested = torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)])
    whole, target = {"v": Value({"n": nested, "w": ones(1.0)})}, {"v": Value({"n": nested, "w": ones(0.0)})}
    async with CheckpointEngine(root) as engine:
        await saved(engine, whole)
        await engine.load(target)
    assert_same(target["v"].value["w"], ones(1.0))
    assert [part.tolist() for part in target["v"].value["n"].unbind()] == [[1, 1], [0, 0, 0]]
