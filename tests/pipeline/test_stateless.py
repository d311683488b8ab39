"""An object that has no state is not missing in a checkpoint that was written before it was added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import PerRank, RNGState
from dcp_async.errors import IncompatibleStateError
from dcp_async.sync import CheckpointEngine
from tests.pipeline.test_asked_by_need import Lazy, Plain


class Switched:
    """Has no state, and refuses any call but being asked."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing was saved of it")


def stateless() -> list[Any]:
    return [
        torch.amp.GradScaler("cpu", enabled=False),
        Switched(),
        PerRank(Switched()),
        {"inner": [Switched(), Switched()]},
        Plain(inner=Switched()),
    ]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("by_stock", [True, False])
def test_what_has_no_state_is_not_missing(root: Path, number: int, strict: bool, by_stock: bool) -> None:
    state: dict[str, Any] = {"x": torch.zeros(1), "added": stateless()[number]}
    if by_stock:
        dcp.save({"x": torch.ones(1)}, checkpoint_id=root / "step-1", no_dist=True)
    with CheckpointEngine(root) as engine:
        if not by_stock:
            engine.save({"x": torch.ones(1)}, step=1)
            engine.wait()
        report = engine.load(state, strict=strict)
    assert state["x"].item() == 1
    assert report.missing == ()


@pytest.mark.parametrize(
    "added",
    [
        torch.amp.GradScaler("cpu"),
        RNGState(),
        Plain(n=1),
        Plain(n=[]),
        PerRank(Plain(t=torch.zeros(1))),
    ],
    ids=["scaler", "rng", "number", "empty", "own"],
)
def test_what_has_some_is(root: Path, added: Any) -> None:
    with CheckpointEngine(root) as engine:
        engine.save({"x": 1}, step=1)
        engine.wait()
        with pytest.raises(IncompatibleStateError, match="missing in the checkpoint: added"):
            engine.load({"x": 0, "added": added})
        report = engine.load({"x": 0, "added": added}, strict=False)
    assert [name.partition(".")[0] for name in report.missing] == ["added"]


def test_one_that_takes_what_other_ranks_saved_is_not_asked(root: Path) -> None:
    lazy = Lazy()
    with CheckpointEngine(root) as engine:
        # as ranks 1 and 2 would have
        engine.save({"p": {PerRank.key(rank): Lazy({"position": rank}) for rank in (1, 2)}}, step=1)
        engine.wait()
        engine.load({"p": PerRank(lazy, on_resize=lambda states: states[0])})
    assert lazy.now == {"position": 1}
