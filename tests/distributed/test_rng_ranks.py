"""Each rank has random numbers of its own, whatever the number of ranks was and however they were saved."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import RNGState
from dcp_async.sync import CheckpointEngine
from tests.distributed.harness import World, open_engines
from tests.distributed.replica_agent import Once


def seed(world: World, how: str, first: int) -> None:
    for member in world.members:
        member.do("hold_rng", how=how, seed=first + member.rank)


def saved(world: World, root: Path, how: str) -> list[list[float]]:
    """What each rank draws next after a save."""
    open_engines(world, root)
    seed(world, how, 10)
    outcomes = world.all("save", step=1)
    assert {each["kind"] for each in outcomes} == {"committed"}, outcomes
    drawn: list[list[float]] = world.all("draw")
    world.all("finish_engine")
    return drawn


def loaded(world: World, root: Path, how: str) -> list[list[float]]:
    open_engines(world, root)
    seed(world, how, 90)
    world.all("warnings")
    outcomes = world.all("load")
    assert {each["kind"] for each in outcomes} == {"loaded"}, outcomes
    drawn: list[list[float]] = world.all("draw")
    world.all("finish_engine")
    return drawn


@pytest.mark.parametrize("how", ["plain", "per rank", "inside"])
def test_each_rank_goes_on_with_its_own(pair: World, root: Path, how: str) -> None:
    drawn = saved(pair, root, how)
    assert drawn[0] != drawn[1]
    assert loaded(pair, root, how) == drawn


@pytest.mark.parametrize(("before", "after"), [("plain", "per rank"), ("per rank", "plain")])
def test_per_rank_around_it_changes_no_name(pair: World, root: Path, before: str, after: str) -> None:
    drawn = saved(pair, root, before)
    with CheckpointEngine(root) as engine:
        assert sorted(engine.read(1)["rng"]) == ["rank_0", "rank_1"]
        assert "torch" in engine.read(1)["rng"]["rank_0"]
    assert loaded(pair, root, after) == drawn


@pytest.mark.parametrize("how", ["plain", "per rank"])
def test_ranks_beyond_those_that_saved_keep_theirs_and_say_so(
    pair: World, four: World, root: Path, how: str
) -> None:
    drawn = saved(pair, root, how)
    found = loaded(four, root, how)
    assert found[:2] == drawn
    seed(four, how, 90)
    assert four.all("draw")[2:] == found[2:]
    logged = four.all("warnings")
    assert [len(each) for each in logged] == [0, 0, 1, 1], logged
    assert "holds nothing for rank 3" in logged[3][0]
    assert "on_resize" in logged[3][0]


def test_fewer_ranks_take_their_own(pair: World, four: World, root: Path) -> None:
    drawn = saved(four, root, "plain")
    assert loaded(pair, root, "plain") == drawn[:2]
    with CheckpointEngine(root) as engine:
        engine.load({"rng": RNGState()}, strict=False)


def test_on_resize_says_what_each_takes(pair: World, four: World, root: Path) -> None:
    drawn = saved(pair, root, "plain")
    assert loaded(four, root, "resized") == [drawn[0]] * 4


@pytest.mark.parametrize("how", ["plain", "per rank", "resized"])
def test_what_was_saved_once_for_all_is_everybodys(pair: World, root: Path, how: str) -> None:
    """As checkpoints were written before."""
    with CheckpointEngine(root) as engine:
        engine.save({"rng": Once(), "w": torch.ones(3)}, step=1)
        engine.wait()
        drawn = loaded(pair, root, how)
    assert drawn[0] == drawn[1]


def test_stock_loads_each_ranks_own(root: Path) -> None:
    state = RNGState()
    with CheckpointEngine(root) as engine:
        engine.save({"rng": state}, step=1)
        engine.wait()
    expected = _draw()
    assert _draw() != expected
    dcp.load({"rng": RNGState()}, checkpoint_id=root / "step-00000001", no_dist=True)
    assert _draw() == expected


def test_what_stock_saved_loads(root: Path) -> None:
    dcp.save({"rng": RNGState()}, checkpoint_id=root / "step-00000001", no_dist=True)
    expected = _draw()
    assert _draw() != expected
    with CheckpointEngine(root) as engine:
        engine.load({"rng": RNGState()}, "step-00000001")
    assert _draw() == expected


def _draw() -> list[float]:
    return [*torch.rand(2).tolist(), random.random()]
