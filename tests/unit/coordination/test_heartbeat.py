"""How long a rank may have stood still before it must not decide for the others, and who is called silent."""

from __future__ import annotations

import pytest

from dcp_async.coordination.heartbeat import Heartbeat

TIMEOUT = 2.0
START = 100.0


@pytest.fixture
def heartbeat() -> Heartbeat:
    """One that asked at the start, and has no answer yet."""
    made = Heartbeat(timeout=TIMEOUT, now=START)
    made.ask(START)
    return made


def beat(heartbeat: Heartbeat, now: float, beats: dict[int, int]) -> frozenset[int]:
    """Ask and be answered at once; who is silent."""
    heartbeat.ask(now)
    message = heartbeat.answered(beats, now)
    return message.ranks if message else frozenset()


@pytest.mark.parametrize("stopped", [TIMEOUT, TIMEOUT - 0.02, TIMEOUT - 0.39])
def test_a_rank_doubts_itself_before_others_can_give_up_on_it(heartbeat: Heartbeat, stopped: float) -> None:
    """Others count from the moment they asked, which may lie before the beat that this rank remembers: a rank
    that decides after a standstill of a bit less than the timeout decides for some that have given up."""
    assert heartbeat.steady(START)
    now = START + stopped
    assert not heartbeat.steady(now)
    assert heartbeat.answered({}, now) is None
    assert not heartbeat.steady(now), "the word of those who gave up is on its way"
    assert not heartbeat.steady(now + heartbeat.interval - 0.01)


def test_a_rank_that_beats_again_trusts_itself_when_its_own_beats_are_young(heartbeat: Heartbeat) -> None:
    """The answer that ends a standstill is of a beat from before it; the next beat is the first new one."""
    now = START + TIMEOUT
    heartbeat.answered({}, now)
    beat(heartbeat, now + heartbeat.interval, {})
    assert not heartbeat.steady(now + heartbeat.interval)
    assert heartbeat.steady(now + 2 * heartbeat.interval + 0.01)


def test_a_beat_counts_from_when_it_was_asked_for(heartbeat: Heartbeat) -> None:
    """The others may have read it right then, and a late answer does not make it younger."""
    heartbeat.answered({}, START + 1.0)
    assert not heartbeat.steady(START + TIMEOUT - heartbeat.interval + 0.01)


def test_a_busy_moment_is_no_standstill(heartbeat: Heartbeat) -> None:
    now = START + 3 * heartbeat.interval
    assert heartbeat.steady(now)
    heartbeat.answered({}, now)
    assert heartbeat.steady(now)


def test_a_rank_that_does_not_move_for_the_timeout_is_silent(heartbeat: Heartbeat) -> None:
    told = [beat(heartbeat, START + tick * heartbeat.interval, {1: 7, 2: tick}) for tick in range(7)]
    assert told == [frozenset()] * 5 + [{1}] * 2
    assert beat(heartbeat, START + 7 * heartbeat.interval, {1: 8, 2: 7}) == frozenset()


def test_a_machine_that_was_suspended_finds_nobody_dead(heartbeat: Heartbeat) -> None:
    beat(heartbeat, START, {1: 7})
    assert beat(heartbeat, START + 1000 * TIMEOUT, {1: 7}) == frozenset()


def test_a_store_that_does_not_answer_for_the_timeout_makes_all_silent(heartbeat: Heartbeat) -> None:
    assert heartbeat.unanswered([1, 2], TIMEOUT - heartbeat.interval) is None
    message = heartbeat.unanswered([1, 2], TIMEOUT)
    assert message is not None
    assert message.ranks == {1, 2}
    assert "the process group's store has not answered for 2 s" in message.why
