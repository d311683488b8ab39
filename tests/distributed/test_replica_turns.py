"""Every block of a large replica has its turn, whatever else the engine is asked for between saves; and what
only its bytes can tell from another tensor is compared as a whole in every save."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import World, open_engines
from tests.distributed.test_replicas import assert_committed, assert_refused, save


def ask_between(world: World, what: str) -> None:
    """A verb that is no save of the plan's."""
    if what == "latest":
        found = world.all("latest")
    elif what == "a load that fails":
        found = world.all("load", source="step-00000999")
        assert all(each["kind"] != "loaded" for each in found), found
    else:
        found = save(world, 1)
        assert all(each["kind"] != "committed" for each in found), found


@pytest.mark.parametrize("what", ["latest", "a load that fails", "a save of a name that is taken"])
@pytest.mark.parametrize("replicas", ["check", "sample"])
def test_every_block_has_its_turn_whatever_is_called_between_saves(
    pair: World, root: Path, what: str, replicas: str
) -> None:
    """128 of its 256 blocks are looked at in each save; "sample" has one more, of the small tensor."""
    open_engines(pair, root, replicas=replicas)
    pair.all("hold_large", megabytes=16)
    assert_committed(save(pair, 1))
    for block in (100, 101):
        ask_between(pair, what)
        pair.all("hold_large", megabytes=16)
        assert_committed(save(pair, 10 + 10 * block))
        pair[1].do("hold_large", megabytes=16, odd=1.0, block=block)
        found = []
        for turn in range(1, 3 if replicas == "check" else 4):
            ask_between(pair, what)
            found.append(save(pair, 10 + 10 * block + turn))
        refused = [each for each in found if each[0]["kind"] == "SaveError"]
        assert refused, found
        assert_refused(refused[0], "model.large differs between rank 0 and rank 1")
    pair.all("finish_engine")


def test_a_difference_that_stays_is_refused_by_each_save_from_then_on(pair: World, root: Path) -> None:
    open_engines(pair, root)
    pair.all("hold_large", megabytes=16)
    assert_committed(save(pair, 1))
    pair[1].do("hold_large", megabytes=16, odd=1.0, block=7)
    kinds = [save(pair, step)[0]["kind"] for step in range(2, 8)]
    assert kinds[1:] == ["SaveError"] * 5, kinds
    pair.all("hold_large", megabytes=16)
    assert_committed(save(pair, 8))
    pair.all("finish_engine")


@pytest.mark.parametrize("replicas", ["check", "sample", "trust"])
@pytest.mark.parametrize("large", [False, True])
def test_stages_that_were_equal_at_first_are_refused_once_they_differ(
    four: World, root: Path, large: bool, replicas: str
) -> None:
    """As moments of an optimizer are: zeros, until it has stepped."""
    open_engines(four, root, replicas=replicas)
    four.all("hold_stages", per_stage=2, large=large)
    for step in range(1, 4):
        assert_committed(save(four, step))
    for element in (0, 11, -1):
        for member in four.members:
            member.do("change_stage", element=element, by=1.0 + member.rank // 2)
        where = "model.layers.0.weight lies on the device mesh of ranks 0, 1 and on that of ranks 2, 3"
        assert_refused(save(four, 4), where)
        for member in four.members:
            member.do("change_stage", element=element, by=-1.0 - member.rank // 2)
        assert_committed(save(four, 10 + element))
    four.all("finish_engine")
