"""Each Stateful of a state is asked once per capture, by one rank alone and by one of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dcp_async import PerRank, RNGState
from dcp_async.state.capture import capture


class Generators(RNGState):
    def __init__(self, asked: list[str]) -> None:
        self.asked = asked

    def _snapshot(self) -> dict[str, Any]:
        self.asked.append("generators")
        return {"torch": torch.get_rng_state()}


class Giving:
    """Its state is another object."""

    def __init__(self, asked: list[str], name: str, inner: Any) -> None:
        self.asked, self.name, self.inner = asked, name, inner

    def state_dict(self) -> Any:
        self.asked.append(self.name)
        return self.inner

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError


def _same_twice(asked: list[str]) -> dict[str, Any]:
    inner = Giving(asked, "inner", {"x": 1})
    return {"a": Giving(asked, "a", inner), "b": Giving(asked, "b", {"x": 2})}


STATES: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "one gives another": _same_twice,
    "three in a row": lambda asked: {
        "a": Giving(asked, "a", Giving(asked, "b", Giving(asked, "c", {"x": torch.ones(1)})))
    },
    "one in a PerRank gives another": lambda asked: {
        "own": PerRank(Giving(asked, "a", Giving(asked, "b", {"x": 1})))
    },
    "one gives generators": lambda asked: {"a": Giving(asked, "a", Generators(asked))},
    "generators beside a PerRank whose key begins alike": lambda asked: {
        "a": PerRank(3),
        "a.b": Generators(asked),
    },
    "a Stateful with them there": lambda asked: {
        "a": PerRank(3),
        "a.b": Giving(asked, "a", {"rng": Generators(asked)}),
    },
}


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("rank", [0, 1])
def test_each_is_asked_once(kind: str, rank: int) -> None:
    alone: list[str] = []
    first = capture(STATES[kind](alone), None, rank=rank)
    asked: list[str] = []
    state = STATES[kind](asked)
    captured = capture(state, None, rank=rank, world_size=2)
    assert captured.structure.names == first.structure.names
    assert sorted(asked) == sorted(alone) == sorted(set(alone))
    capture(state, captured.known, rank=rank, world_size=2)
    assert sorted(asked) == sorted(alone * 2)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_each_is_asked_once_where_the_structure_proves_to_be_new(kind: str, world_size: int) -> None:
    asked: list[str] = []
    state = STATES[kind](asked)
    known = capture(state, None, world_size=world_size).known
    state["new"] = [{"x": torch.ones(1)}, 1]
    asked.clear()
    again = capture(state, known, world_size=world_size)
    assert again.is_new
    assert sorted(asked) == sorted(set(asked))
    assert again.tree == capture(state, None, world_size=world_size).tree
    assert capture(state, again.known, world_size=world_size).tree is None


BESIDE: dict[str, Callable[[], dict[str, Any]]] = {
    "a dotted key": lambda: {"a": PerRank(3), "a.b": Generators([])},
    "below a dotted key": lambda: {"a": PerRank({"x": 1}), "a.b": {"c": Generators([])}},
    "a dotted key in a mapping": lambda: {"m": {"a": PerRank(3), "a.b": Generators([])}},
}


@pytest.mark.parametrize("kind", BESIDE)
def test_generators_beside_what_is_per_rank_are_each_ranks_own(kind: str) -> None:
    names = [set(capture(BESIDE[kind](), None, rank=rank).structure.names) for rank in (0, 1)]
    assert names[0].isdisjoint(names[1])


def test_generators_inside_of_what_is_per_rank_are_named_once() -> None:
    state = {"a": PerRank({"x": [Generators([])], "y": PerRank(1)}), "z": PerRank(Generators([]))}
    names = capture(state, None, rank=1, world_size=2).structure.names
    assert set(names) == {
        "a.rank_1.x.0.torch",
        "a.rank_1.y.rank_1",
        "z.rank_1.torch",
    }
