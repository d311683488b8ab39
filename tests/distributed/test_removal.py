"""``remove`` and retention of several ranks: the coordinator removes, and all hear how it ended."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.engine_agent import EngineAgent
from tests.distributed.harness import NEVER, World
from tests.support.doubles import assert_holds_only

ONE, TWO, THREE = (f"step-{step:08d}" for step in (1, 2, 3))


def save(world: World, step: int) -> None:
    world.all("fill", value=step)
    assert [outcome["kind"] for outcome in world.all("save", step=step)] == ["committed"] * 2


def test_the_coordinator_removes_and_all_hear_how_it_ended(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=EngineAgent) as world:
        world.all("engine", root=str(root), coordination=NEVER, coordinator_rank=1)
        save(world, 1)
        save(world, 2)
        assert world.all("remove", source=1) == [{"kind": "removed"}] * 2
        assert_holds_only(root, [TWO])
        outcomes = world.all("remove", source=1)
        assert {outcome["kind"] for outcome in outcomes} == {"CheckpointNotFoundError"}
        assert len({outcome["text"] for outcome in outcomes}) == 1
        world.all("fill", value=3)
        assert world.all("remove", source=TWO, replaced_by=3) == [{"kind": "removed"}] * 2
        assert_holds_only(root, [THREE])
        assert world.all("removals") == [0, 3 - 1]
        world.all("end")


def test_nothing_is_removed_if_the_newer_save_fails_on_any_rank(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=EngineAgent) as world:
        world.all("engine", root=str(root), coordination=NEVER)
        save(world, 1)
        world.all("fill", value=2)
        world.members[1].start("fail_verb", at="seal").result()
        outcomes = world.all("remove", source=ONE, replaced_by=2)
        assert {outcome["kind"] for outcome in outcomes} == {"SaveError"}
        assert all("No space left" in outcome["text"] for outcome in outcomes), outcomes
        assert world.all("removals") == [0, 0]
        world.all("end")
    assert_holds_only(root, [ONE])


def test_retention_is_the_coordinators(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=EngineAgent) as world:
        world.all("engine", root=str(root), coordination=NEVER, keeps=2)
        for step in (1, 2, 3):
            save(world, step)
        world.all("end")
    assert_holds_only(root, [TWO, THREE])
