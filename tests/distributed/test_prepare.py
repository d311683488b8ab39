"""``prepare`` of several ranks: one plan for all of them, one outcome, saves behind it in step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.engine_agent import EngineAgent
from tests.distributed.harness import NEVER, World
from tests.support.doubles import committed


@pytest.mark.parametrize("overlap", [False, True])
def test_ranks_prepare_together_and_save(tmp_path: Path, overlap: bool) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=EngineAgent) as world:
        world.all("engine", root=str(root), coordination=NEVER, overlap=overlap)
        world.all("fill", value=1)
        assert world.all("prepare") == [{"kind": "prepared", "has_plan": True}] * 2
        assert committed(root) == []
        for step in (1, 2):
            world.all("fill", value=step)
            assert [outcome["kind"] for outcome in world.all("save", step=step)] == ["committed"] * 2
        # with a plan that is known: again, and at any time
        assert [outcome["kind"] for outcome in world.all("prepare")] == ["prepared"] * 2
        world.all("end")
    assert committed(root) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("which", [0, 1], ids=["the coordinator", "another rank"])
def test_rank_that_cannot_prepare_fails_all_and_the_next_save_works(tmp_path: Path, which: int) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=EngineAgent) as world:
        world.all("engine", root=str(root), coordination=NEVER)
        for rank, member in enumerate(world.members):
            member.start("fill", value=1, foreign=rank == which).result()
        outcomes = world.all("prepare")
        assert [outcome["kind"] for outcome in outcomes] == ["SaveError"] * 2
        for outcome in outcomes:
            assert f"prepare() failed while capturing the state on rank {which}" in outcome["text"]
            assert outcome["phase"] == "capture"
        world.all("fill", value=2)
        assert [outcome["kind"] for outcome in world.all("save", step=2)] == ["committed"] * 2
        world.all("end")
    assert committed(root) == ["step-00000002"]
