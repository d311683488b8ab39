"""Whoever is changed by being asked for a state is asked only where a load can't do without."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dcp_async.errors import IncompatibleStateError
from dcp_async.sync import CheckpointEngine


class Lazy:
    """As torchdata.nodes.Loader: it starts to answer, and does not take a state after that."""

    def __init__(self, saved: dict[str, Any] | None = None, **held: Any) -> None:
        self.now = saved
        self.is_started = saved is not None
        self.__dict__.update(held)

    def state_dict(self) -> dict[str, Any]:
        self.is_started = True
        return dict(self.now or {"position": 0})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.is_started:
            self.now = state


class Plain:
    """Takes what it gets."""

    def __init__(self, **state: Any) -> None:
        self.state = state
        self.times_asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.times_asked += 1
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


SAVED: list[dict[str, Any]] = [
    {"position": 77},
    {"position": 77, "buffer": torch.ones(10)},
    {"position": 77, "buffer": torch.ones(20_000)},
    {"position": 77, "nested": {"buffers": [torch.ones(200, 200), torch.ones(3)]}},
]
HELD: list[dict[str, Any]] = [
    {},
    {"model": nn.Linear(1, 1)},
    {"models": nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8))},
    {"lazy": [nn.LazyLinear(4)]},
    {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(6))], lr=0.1)},
    {"other": torch.zeros(4)},
]


@pytest.mark.parametrize("held", HELD, ids=[" ".join(held) or "nothing" for held in HELD])
@pytest.mark.parametrize("saved", SAVED, ids=["number", "small", "large", "nested"])
@pytest.mark.parametrize("origin", ["present", "older", "stock"])
def test_it_is_not_asked_where_nothing_of_it_is_needed(
    root: Path, saved: dict[str, Any], held: dict[str, Any], origin: str
) -> None:
    if origin == "stock":
        dcp.save({"loader": Lazy(saved)}, checkpoint_id=root / "step-1", no_dist=True)
    lazy = Lazy(**held)
    with CheckpointEngine(root) as engine:
        if origin != "stock":
            # older releases did not say that it was an object's
            engine.save({"loader": saved if origin == "older" else Lazy(saved)}, step=1)
            engine.wait()
        engine.load({"loader": lazy})
    assert lazy.now is not None
    assert lazy.now["position"] == 77


class Holder:
    """DCP's tutorial's wrapper of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])


@pytest.mark.parametrize("live", [nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2))])
def test_a_model_whose_names_were_saved_is_asked_and_must_fit(root: Path, live: nn.Module) -> None:
    saved = nn.Linear(3, 5) if isinstance(live, nn.Linear) else nn.Sequential(nn.Linear(3, 5))
    with CheckpointEngine(root) as engine:
        engine.save({"app": Holder(saved)}, step=1)
        engine.wait()
        with pytest.raises(IncompatibleStateError, match="weight is"):
            engine.load({"app": Holder(live)})


def test_a_model_is_filled_in_place(root: Path) -> None:
    saved, live = nn.Linear(3, 5), nn.Linear(3, 5)
    with CheckpointEngine(root) as engine:
        engine.save({"app": Holder(saved)}, step=1)
        engine.wait()
        engine.load({"app": Holder(live)})
    assert torch.equal(saved.weight, live.weight)


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        ({"milestones": Counter({3: 1})}, {"milestones": Counter({3: 2})}),
        ({"by": {1: "a"}}, {"by": {1: ""}}),
        ({"by": {None: 1, "x": 2}}, {"by": {None: 0, "x": 0}}),
        ({"seen": [], "n": 1}, {"seen": [], "n": 0}),
        ({"seen": {}, "n": 1}, {"seen": {}, "n": 0}),
        ({"words": Counter(a=2)}, {"words": Counter(a=1)}),
    ],
    ids=str,
)
def test_what_stock_does_not_tell_is_asked(root: Path, saved: Any, live: Any) -> None:
    class Keeping(Plain):
        def __init__(self, **state: Any) -> None:
            super().__init__(**state)
            self.__dict__.update(state)

    plain = Keeping(**live)
    dcp.save({"s": Keeping(**saved)}, checkpoint_id=root / "step-1", no_dist=True)
    with CheckpointEngine(root) as engine:
        engine.load({"s": plain})
    assert plain.state == saved
    assert {key: type(value) for key, value in plain.state.items()} == {
        key: type(value) for key, value in saved.items()
    }
