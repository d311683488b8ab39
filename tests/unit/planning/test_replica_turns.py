"""Each turn of a plan's large replicas is compared by a save that was committed, whichever saves fail."""

from __future__ import annotations

import pytest

from dcp_async.planning.replica_turns import Rotation


def committed(rotation: Rotation) -> int:
    turn = rotation.deal()
    rotation.matched()
    return turn["number"]


def test_saves_that_match_take_one_turn_after_the_other() -> None:
    rotation = Rotation()
    assert [committed(rotation) for _ in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_turn_of_a_failed_save_comes_again(every: int) -> None:
    rotation, found = Rotation(), []
    for attempt in range(30):
        turn = rotation.deal()
        if attempt % (every + 1) == every:
            rotation.missed(turn)
        else:
            rotation.matched()
            found.append(turn["number"])
    assert sorted(found) == list(range(len(found)))


def test_saves_that_are_pending_together_have_turns_of_their_own() -> None:
    rotation = Rotation()
    first, second, third = rotation.deal(), rotation.deal(), rotation.deal()
    rotation.missed(first)
    rotation.matched()
    rotation.missed(third)
    again = [rotation.deal()["number"] for _ in range(3)]
    assert sorted([second["number"], *again]) == [0, 1, 2, 3]


def test_a_plan_is_proven_by_a_save_that_was_committed() -> None:
    rotation = Rotation()
    first = rotation.deal()
    pending = rotation.deal()
    rotation.missed(first)
    assert [turn["is_proven"] for turn in (first, pending, rotation.deal())] == [False] * 3
    rotation.matched()
    assert rotation.deal()["is_proven"]
