"""Planners of the user's over ranks: each is called as by stock, and what fails on one fails for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dcp_async import PlanningOptions, sync
from tests.distributed.harness import World
from tests.distributed.planner_agent import WHOLE, PlannerAgent
from tests.support.doubles import committed
from tests.support.planners import RecordingLoad


def test_calls_come_in_stocks_order_on_every_rank(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=PlannerAgent) as world:
        saves = world.all("record_save", root=str(root))
        loads = world.all("record_load", root=str(root))
    for rank, (ours, stock, loaded) in [*enumerate(saves), *enumerate(loads)]:
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
    # by one rank, which finds the shards of two
    target: dict[str, Any] = {"rows": torch.zeros(5, 4), "step": 0}
    with sync.CheckpointEngine(root, planning=PlanningOptions(load=RecordingLoad)) as engine:
        engine.load(target, "ours")
    assert torch.equal(target["rows"], WHOLE)


FAULTS = {
    "one fails": "resolve_data() failed: ValueError: not to be had",
    "twice": "same.a is in the plans of ranks 0 and 1",
    "unlike": "rank 0 plans with RecordingSave and rank 1 with the default planner",
}

LOAD_FAULTS = {
    "plan": "FailsToPlan.create_local_plan() failed: ValueError: no plan; nothing was loaded",
    "commit": "FailsToCommit.commit_tensor() failed: ValueError: no room; targets are partly overwritten",
}


def test_planner_that_fails_on_one_rank_fails_all(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=PlannerAgent) as world:
        for kind, told in FAULTS.items():
            outcomes = world.all("planned_save", root=str(root), kind=kind)
            assert all(outcome.startswith("SaveError") and told in outcome for outcome in outcomes), outcomes
            assert committed(root) == []
        assert world.all("planned_save", root=str(root), kind="fine") == ["committed"] * 2
        for kind, told in LOAD_FAULTS.items():
            outcomes = world.all("planned_load", root=str(root), kind=kind)
            assert all(outcome.startswith("LoadError") and told in outcome for outcome in outcomes), outcomes
    with sync.CheckpointEngine(root) as engine:
        read = engine.read("ours")
    assert torch.equal(read["rows"], WHOLE)
