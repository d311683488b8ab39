"""What one rank has for all: saved once, as if it stood there by itself, and loaded by every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import CheckpointEngine, FromRank, PerRank, RNGState
from dcp_async.errors import CheckpointError
from dcp_async.sync import CheckpointEngine as BlockingEngine
from tests.distributed.engine_agent import EngineAgent, Outcome, described
from tests.distributed.harness import World


class Scheduler:
    """Counts who asks it, as one would notice who runs collectives."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.num_asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.num_asked += 1
        return {"value": self.value, "history": [self.value] * 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def make_state(value: int, source: int = 1) -> dict[str, Any]:
    return {
        "w": torch.arange(6.0),
        "own": PerRank(value),
        "count": FromRank(value, source),
        "scheduler": FromRank(Scheduler(value), source),
        "gathered": FromRank({"mean": torch.full((3,), float(value)), "names": [f"n{value}"]}, source),
        "more": [torch.zeros(1), FromRank(("tuple", value), source), {"deep": FromRank(value, source)}],
    }


def held(state: dict[str, Any]) -> dict[str, Any]:
    """The plain values in it."""
    return {
        "own": state["own"].value,
        "count": state["count"].value,
        "scheduler": state["scheduler"].value.value,
        "mean": state["gathered"].value["mean"].tolist(),
        "names": state["gathered"].value["names"],
        "tuple": state["more"][1].value,
        "deep": state["more"][2]["deep"].value,
    }


def expected(value: int, own: int) -> dict[str, Any]:
    return {
        "own": own,
        "count": value,
        "scheduler": value,
        "mean": [float(value)] * 3,
        "names": [f"n{value}"],
        "tuple": ("tuple", value),
        "deep": value,
    }


class FromRankAgent(EngineAgent):
    async def save_from(self, root: str, source: int) -> Outcome:
        """Save twice, with another value on each rank; how often the scheduler was asked."""
        async with CheckpointEngine(root) as engine:
            for step in (1, 2):
                state = make_state(100 * step + self._rank, source)
                await (await engine.save(state, step=step)).upload_completion
            return {"num_asked": state["scheduler"].value.num_asked}

    async def load_from(self, root: str) -> Outcome:
        async with CheckpointEngine(root) as engine:
            state = make_state(-1, 0)
            await engine.load(state)
            return held(state)

    async def refuse(self, root: str, what: str) -> Outcome:
        """Save what can't be saved."""
        values: dict[str, Any] = {
            "no such rank": FromRank(1, 2),
            "nobody's": FromRank(1, 1 - self._rank),
        }
        async with CheckpointEngine(root) as engine:
            try:
                response = await engine.save({"w": torch.ones(2), "a": values[what]}, step=9)
                await response.upload_completion
            except CheckpointError as error:
                return described(error)
            return {"kind": "committed"}


def test_one_ranks_value_is_saved_and_every_rank_loads_it(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=FromRankAgent) as world:
        asked = world.all("save_from", root=str(root), source=1)
        assert asked == [{"num_asked": 0}, {"num_asked": 1}]
        assert world.all("load_from", root=str(root)) == [expected(201, 200), expected(201, 201)]

        for outcome in world.all("refuse", root=str(root), what="no such rank"):
            assert "a: FromRank(..., 2), and there are 2 ranks" in outcome["text"]
        for outcome in world.all("refuse", root=str(root), what="nobody's"):
            assert outcome["kind"] == "SaveError", outcome
            assert "FromRank" in outcome["text"]

    # by stock, under the names that the values have by themselves
    target: dict[str, Any] = {
        "w": torch.zeros(6),
        "count": 0,
        "scheduler": {"value": 0, "history": [0] * 3},
        "gathered": {"mean": torch.zeros(3), "names": []},
    }
    dcp.load(target, checkpoint_id=root / "step-00000002", no_dist=True)
    assert (target["count"], target["scheduler"]) == (201, {"value": 201, "history": [201] * 3})
    assert (target["gathered"]["mean"].tolist(), target["gathered"]["names"]) == ([201.0] * 3, ["n201"])

    # by another number of ranks, and without any object
    with BlockingEngine(root) as engine:
        state = make_state(-1, 0)
        state["own"] = PerRank(-1, on_resize=list)
        engine.load(state)
        assert held(state) == expected(201, 0) | {"own": [200, 201]}
        read = engine.read()
        assert read["more"][1:] == [("tuple", 201), {"deep": 201}]
        assert read["count"] == 201


def test_alone_it_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    with BlockingEngine(tmp_path / "run") as engine:
        engine.save(make_state(7, 0), step=1).upload_completion.result()
        state = make_state(-1, 0)
        engine.load(state)
        assert held(state) == expected(7, 7)
        plain = {"w": torch.zeros(6), "count": -1}
        engine.load(plain)
        assert plain["count"] == 7
        rng = torch.get_rng_state()
        engine.save({"rng": FromRank(RNGState())}, step=2).upload_completion.result()
        torch.rand(3)
        engine.load({"rng": FromRank(RNGState())}, 2)
        assert torch.equal(torch.get_rng_state(), rng)


def test_what_is_loaded_in_part(tmp_path: Path) -> None:
    with BlockingEngine(tmp_path / "run") as engine:
        engine.save(make_state(7, 0), step=1)
        state = make_state(-1, 0)
        engine.load(state, keys=["count", "gathered"])
        assert held(state) == expected(-1, -1) | {"count": 7, "mean": [7.0] * 3, "names": ["n7"]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (FromRank(FromRank(1)), "a: FromRank lies inside of PerRank or another FromRank"),
        (PerRank(FromRank(1)), "a.rank_0: FromRank lies inside of PerRank or another"),
        (FromRank({"b": PerRank(1)}), "a.b: PerRank is every rank's, and lies in FromRank"),
        (FromRank(1, 1), "a: FromRank(..., 1), and there are 1 ranks"),
    ],
)
def test_what_is_one_ranks_and_another_ones_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    with BlockingEngine(tmp_path / "run") as engine:
        with pytest.raises(CheckpointError) as caught:
            engine.save({"a": value}, step=1)
        assert message in str(caught.value)


@pytest.mark.parametrize(("rank", "kind"), [(-1, ValueError), (True, TypeError), ("0", TypeError)])
def test_a_rank_that_is_none_is_refused(rank: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="rank="):
        FromRank(1, rank)
