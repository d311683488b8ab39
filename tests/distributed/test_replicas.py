"""Tensors that several ranks hold are compared before one rank's bytes are published for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dcp_async import Coordination
from dcp_async.sync import CheckpointEngine
from tests.distributed.engine_agent import Outcome
from tests.distributed.harness import World, open_engines
from tests.distributed.replica_agent import KINDS
from tests.support.doubles import assert_holds_only

MIB = 1 << 20
FOUR = "an uneven shard"


def save(world: World, step: int) -> list[Outcome]:
    return world.all("save", step=step)


def hold(world: World, kind: str, odd_ranks: Sequence[int] = ()) -> None:
    calls = [member.start("hold", kind=kind, odd=float(member.rank in odd_ranks)) for member in world.members]
    for call in calls:
        call.result()


def assert_committed(outcomes: Sequence[Outcome]) -> None:
    assert [each["kind"] for each in outcomes] == ["committed"] * len(outcomes), outcomes


def assert_refused(outcomes: Sequence[Outcome], name: str, *texts: str) -> None:
    for outcome in outcomes:
        assert outcome["kind"] == "SaveError", outcomes
        for text in (name, *texts, "PerRank"):
            assert text in outcome["text"], outcomes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != FOUR])
def test_a_tensor_that_differs_on_one_rank_is_refused_by_name(pair: World, root: Path, kind: str) -> None:
    name = KINDS[kind][1]
    open_engines(pair, root)
    hold(pair, kind, [1])
    assert_refused(save(pair, 1), f"{name} differs between rank 0 and rank 1")
    assert_holds_only(root, [])
    hold(pair, kind)
    assert_committed(save(pair, 2))
    assert_committed(save(pair, 3))
    hold(pair, kind, [0])
    if kind == "the last element of a large one":  # once proven, its blocks take turns
        pair.all("finish_engine")
        return
    assert_refused(save(pair, 4), f"{name} differs")
    assert_holds_only(root, ["step-00000002", "step-00000003"])
    pair.all("finish_engine")


@pytest.mark.parametrize("odd_ranks", [[1], [0, 2]], ids=str)
def test_shards_that_several_ranks_hold_are_compared_among_those(
    four: World, root: Path, odd_ranks: list[int]
) -> None:
    open_engines(four, root)
    hold(four, FOUR, odd_ranks)
    outcomes = save(four, 1)
    if odd_ranks == [1]:
        assert_refused(outcomes, "model.rows differs between rank 1 and rank 3")
        hold(four, FOUR)
        assert_committed(save(four, 2))
    else:  # both ranks that hold the first shard have the same
        assert_committed(outcomes)
        hold(four, FOUR, [0])
        assert_refused(save(four, 2), "model.rows differs between rank 0 and rank 2")
    four.all("finish_engine")


@pytest.mark.parametrize("kind", ["a scalar", "an expert", "a DTensor, replicated"])
def test_all_ranks_that_hold_another_are_told_apart(four: World, root: Path, kind: str) -> None:
    open_engines(four, root)
    hold(four, kind, [2, 3])
    assert_refused(save(four, 1), KINDS[kind][1], "ranks 0, 1; ranks 2, 3 hold the same each")
    four.all("finish_engine")


@pytest.mark.parametrize(
    "options",
    [{"overlap": True}, {"budget_bytes": 16 * MIB}, {"replicas": "sample"}],
    ids=["overlap", "budget", "sample"],
)
@pytest.mark.parametrize("kind", ["a scalar", "other strides", "the last element of a large one"])
def test_a_difference_is_found_however_the_state_is_staged(
    pair: World, root: Path, kind: str, options: dict[str, Any]
) -> None:
    open_engines(pair, root, **options)
    hold(pair, kind, [1])
    assert_refused(save(pair, 1), f"{KINDS[kind][1]} differs")
    hold(pair, kind)
    for step in range(2, 5):
        assert_committed(save(pair, step))
    pair.all("finish_engine")


def test_ranks_may_stage_in_other_ways_and_compare_the_same(pair: World, root: Path) -> None:
    """A budget is a rank's own affair."""
    calls = [
        pair[0].start("replica_engine", root=str(root)),
        pair[1].start("replica_engine", root=str(root), budget_bytes=16 * MIB),
    ]
    assert [call.result()["kind"] for call in calls] == ["open", "open"]
    for step, kind in enumerate(
        ["one of several dtypes", "other strides", "the last element of a large one"]
    ):
        hold(pair, kind)
        for again in range(3):
            assert_committed(save(pair, 10 * step + again))
    pair.all("finish_engine")


def test_a_block_of_a_large_tensor_that_drifts_later_is_found_in_its_turn(pair: World, root: Path) -> None:
    """128 of its 256 blocks are looked at in each save."""
    open_engines(pair, root)
    pair.all("hold_large", megabytes=16)
    for step in range(1, 4):
        assert_committed(save(pair, step))
    for block in (0, 101, 255):
        pair.all("hold_large", megabytes=16)
        pair[1].do("hold_large", megabytes=16, odd=1.0, block=block)
        found = [save(pair, 10 + block * 10 + turn)[0] for turn in range(2)]
        refused = [each for each in found if each["kind"] == "SaveError"]
        assert refused, found  # the turn of a save that failed comes again
        assert "model.large differs between rank 0 and rank 1" in refused[0]["text"]
    pair.all("finish_engine")


def test_what_is_trusted_is_not_compared(pair: World, root: Path) -> None:
    open_engines(pair, root, replicas="trust")
    hold(pair, "a scalar", [1])
    assert_committed(save(pair, 1))
    pair.all("finish_engine")


def test_what_is_per_rank_may_differ(pair: World, root: Path) -> None:
    open_engines(pair, root)
    for rank in range(2):
        pair[rank].do("hold_large", megabytes=1, odd=float(rank + 1), own=True)
    assert_committed(save(pair, 1))
    with CheckpointEngine(root) as engine:
        own = engine.read(1)["model"]["large"]
    assert [own[f"rank_{rank}"][7].item() for rank in range(2)] == [1.0, 2.0]
    pair.all("finish_engine")


@pytest.mark.parametrize(
    ("per_stage", "large", "replicas"),
    [(1, False, "check"), (2, False, "check"), (2, True, "check"), (2, True, "sample"), (2, True, "trust")],
)
def test_one_name_on_two_meshes_is_refused_at_the_first_save(
    four: World, root: Path, per_stage: int, large: bool, replicas: str
) -> None:
    open_engines(four, root, replicas=replicas)
    calls = [
        member.start("hold_stages", per_stage=per_stage, odd=float(member.rank // per_stage), large=large)
        for member in four.members
    ]
    for call in calls:
        call.result()
    outcomes = save(four, 1)
    if per_stage == 2:
        assert_refused(
            outcomes, "model.layers.0.weight lies on the device mesh of ranks 0, 1 and on that of ranks 2, 3"
        )
    else:
        assert_refused(outcomes, "model.layers.0.weight lies on the device mesh of ranks 0 and on")
    assert_holds_only(root, [])
    four.all("finish_engine")


def test_replicas_on_meshes_of_their_own_are_saved(four: World, root: Path) -> None:
    """As tensor parallelism under DDP has them: each pair of ranks a mesh, all pairs the same tensor."""
    open_engines(four, root)
    four.all("hold_stages", per_stage=2)
    assert_committed(save(four, 1))
    assert_committed(save(four, 2))
    four.all("finish_engine")


def test_comparing_takes_no_message_more(four: World, root: Path) -> None:
    open_engines(four, root)
    hold(four, "an expert")
    assert_committed(save(four, 1))
    before = four.all("messages")
    assert_committed(save(four, 2))
    after = four.all("messages")
    assert [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)] == [(6, 6)] + [(2, 2)] * 3
    four.all("finish_engine")


def test_ranks_that_compare_in_other_ways_are_refused(pair: World, root: Path) -> None:
    calls = [
        member.start("replica_engine", root=str(root), replicas="trust" if member.rank else "check")
        for member in pair.members
    ]
    for call in calls:
        found = call.result()
        assert found["kind"] == "EngineStateError", found
        assert "replicas=" in found["text"]


@pytest.mark.parametrize("value", ["never", "", None])
def test_another_word_for_how_replicas_are_compared_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="replicas"):
        Coordination(replicas=value)
