"""What a Stateful gives may be a leaf, and comes back as what was saved: never as the object itself."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dcp_async import AppState, PerRank
from dcp_async.sync import CheckpointEngine
from tests.support.doubles import assert_same
from tests.support.saves import Value

LEAVES: list[tuple[Any, Any]] = [
    (None, 1),
    (5, 4),
    (2.5, 0.0),
    (True, False),
    ("text", "x"),
    (b"bytes", b""),
    (torch.ones(3), torch.zeros(3)),
    (torch.ones(3), torch.zeros(4)),
    (torch.ones(3), None),
    (torch.ones(3).to_sparse(), None),
    (None, torch.zeros(3)),
    ([], [1]),
    ({}, {"a": 1}),
    ((1, torch.ones(2)), (0, torch.zeros(2))),
    (deque([1, 2], maxlen=3), deque()),
]


class Pair:
    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.got: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner, "other": Value({"n": 1})}

    def load_state_dict(self, got: Any) -> None:
        self.got = got


def moved(root: Path, saved: dict[str, Any], into: dict[str, Any]) -> None:
    with CheckpointEngine(root) as engine:
        engine.save(saved, step=1)
        engine.wait()
        engine.load(into)


@pytest.mark.parametrize(("saved", "live"), LEAVES, ids=repr)
def test_the_state_itself_is_a_leaf(root: Path, saved: Any, live: Any) -> None:
    value = Value(live)
    moved(root, {"s": Value(saved)}, {"s": value})
    assert_same(value.value, saved)


@pytest.mark.parametrize(("saved", "live"), LEAVES, ids=repr)
def test_a_leaf_inside_of_another_stateful(root: Path, saved: Any, live: Any) -> None:
    inner = Value(live)
    outer = Pair(inner)
    moved(root, {"s": Pair(Value(saved))}, {"s": outer})
    assert_same(inner.value, saved)
    assert outer.got["inner"] is inner


@pytest.mark.parametrize(("saved", "live"), LEAVES, ids=repr)
def test_one_of_each_rank_that_is_taken_by_another_number(root: Path, saved: Any, live: Any) -> None:
    value = Value(live)
    chosen: list[Any] = []

    def on_resize(states: list[Any]) -> Any:
        chosen.extend(states)
        return states[0]

    with CheckpointEngine(root) as engine:
        # as two ranks would have saved them
        engine.save({"p": {PerRank.key(0): Value(saved), PerRank.key(1): Value(saved)}}, step=1)
        engine.wait()
        engine.load({"p": PerRank(value, on_resize=on_resize)})
    assert_same(chosen, [saved, saved])
    assert_same(value.value, saved)


@pytest.mark.parametrize("saved", [5, "text", None, torch.ones(2)], ids=repr)
def test_a_leaf_that_stock_wrote(root: Path, saved: Any) -> None:
    value = Value(torch.zeros(2) if isinstance(saved, torch.Tensor) else saved)
    dcp.save({"s": Value(saved)}, checkpoint_id=root / "step-1", no_dist=True)
    with CheckpointEngine(root) as engine:
        engine.load({"s": value})
    assert_same(value.value, saved)


class Extended(AppState):
    def __init__(self, model: nn.Module, inner: Value) -> None:
        super().__init__(model)
        self.inner = inner

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self.inner}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.got = state_dict.pop("inner")
        super().load_state_dict(state_dict)


def test_a_leaf_inside_of_an_app_state(root: Path) -> None:
    inner = Value(4)
    app = Extended(nn.Linear(1, 1), inner)
    moved(root, {"a": Extended(nn.Linear(1, 1), Value(5))}, {"a": app})
    assert inner.value == 5
    assert app.got is inner
