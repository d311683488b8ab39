"""Planners of the user's over ranks: each is called as by stock, and what fails on one fails for all."""

from __future__ import annotations

from pathlib import Path

import torch

from dcp_async import sync
from tests.distributed.harness import World
from tests.distributed.planner_agent import WHOLE, PlannerAgent
from tests.support.doubles import committed


def test_calls_come_in_stocks_order_on_every_rank(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=PlannerAgent) as world:
        outcomes = world.all("record_save", root=str(root))
    for rank, (ours, stock, loaded) in enumerate(outcomes):
        assert ours == stock
        assert [call[0] for call in ours].count("create_global_plan") == (rank == 0)
        assert loaded == {
            "rows": WHOLE.tolist(),
            "same": {"a": [1.0] * 3, "b": [2.0] * 2},
            "step": 4,
            f"own{rank}": (rank,),
        }
    with sync.CheckpointEngine(root) as engine:
        read = engine.read("ours")
    assert torch.equal(read["rows"], WHOLE)
    assert (read["own0"], read["own1"], read["step"]) == ((0,), (1,), 4)


FAULTS = {
    "one fails": "resolve_data() failed: ValueError: not to be had",
    "twice": "same.a is in the plans of ranks 0 and 1",
    "unlike": "rank 0 plans with RecordingSave and rank 1 with the default planner",
}


def test_planner_that_fails_on_one_rank_fails_all(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=PlannerAgent) as world:
        for kind, told in FAULTS.items():
            outcomes = world.all("planned_save", root=str(root), kind=kind)
            assert all(outcome.startswith("SaveError") and told in outcome for outcome in outcomes), outcomes
            assert committed(root) == []
        assert world.all("planned_save", root=str(root), kind="half") == ["committed"] * 2
    with sync.CheckpointEngine(root) as engine:
        read = engine.read("ours")
    assert torch.equal(read["rows"], WHOLE.half())
