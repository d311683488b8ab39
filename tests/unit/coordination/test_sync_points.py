"""Sync points: one at a time, none for what the one under way answers, the stop once."""

from __future__ import annotations

import asyncio

import pytest

from dcp_async import EngineStateError
from dcp_async.coordination.alarm import Alarm
from dcp_async.coordination.ledger import Ledger
from dcp_async.coordination.messages import (
    Contribution,
    Failed,
    GapChecked,
    Gathered,
    Goodbye,
    Send,
    SyncCalled,
    SyncRequested,
    from_plain,
    to_plain,
)
from dcp_async.coordination.sync_points import SyncCalls, SyncPoints


def request(why: str, *, stop: bool = False) -> SyncRequested:
    return SyncRequested(why=why, stop=stop, seconds=5.0)


def called(points: SyncPoints, why: str, *, stop: bool = False) -> str:
    """The uid of what is called for it."""
    call = points.requested(request(why, stop=stop))
    assert call is not None
    return call.uid


def test_a_request_while_a_sync_point_is_under_way_calls_no_other() -> None:
    points = SyncPoints()
    uid = called(points, "clock")
    assert points.requested(request("signal")) is None
    assert points.over(uid) is None
    assert called(points, "clock") != uid


def test_a_stop_during_a_sync_point_is_called_behind_it() -> None:
    points = SyncPoints()
    uid = called(points, "clock")
    assert points.requested(request("SIGTERM", stop=True)) is None
    following = points.over(uid)
    assert following is not None
    assert (following.why, following.stop) == ("SIGTERM", True)
    assert following.uid != uid


def test_a_stop_under_way_answers_whatever_is_asked_for() -> None:
    points = SyncPoints()
    uid = called(points, "SIGTERM", stop=True)
    assert points.requested(request("SIGTERM of another rank", stop=True)) is None
    assert points.requested(request("clock")) is None
    assert points.over(uid) is None
    assert called(points, "SIGTERM, since they could not agree", stop=True) != uid


def test_what_is_over_is_told_from_other_ids() -> None:
    points = SyncPoints()
    uid = called(points, "clock")
    assert points.over("a save") is None
    assert points.seconds("a save") is None
    assert points.seconds(uid) == 5.0


@pytest.mark.parametrize(
    "message", [request("clock"), SyncCalled(uid="sync point 1", why="clock", stop=True, seconds=2.5)]
)
def test_messages_travel_as_plain_data(message: SyncRequested | SyncCalled) -> None:
    assert from_plain(to_plain(message)) == message


# In the ledger, among the messages of saves.


def make_ledger() -> Ledger:
    return Ledger(rank=0, world_size=3, timeout=100.0, patience=10.0, gap_seconds=5.0)


def answer(rank: int, uid: str) -> Contribution:
    return Contribution(rank=rank, uid=uid, phase="sync", ordinal=None, name="", value=(0, rank))


def test_a_request_of_any_rank_calls_all_ranks() -> None:
    effects = make_ledger().hear(request("clock"), 0.0)
    assert [effect.rank for effect in effects if isinstance(effect, Send)] == [0, 1, 2]


def test_ranks_that_do_not_answer_are_named_after_the_seconds_of_the_request() -> None:
    ledger = make_ledger()
    ledger.hear(request("SIGTERM", stop=True), 0.0)
    uid = "sync point 1"
    ledger.hear(answer(0, uid), 0.0)
    ledger.hear(answer(2, uid), 1.0)
    assert ledger.next_deadline() == 5.0
    ledger.tick(5.0)
    effects = ledger.gap_checked(GapChecked(uid=uid, phase="sync", skipped=False), 5.0)
    told = [effect.message for effect in effects if isinstance(effect, Send)]
    assert told
    for message in told:
        assert isinstance(message, Failed)
        assert str(message.failures[1]) == "rank 1 did not tell within 5 s which step it has reached"


def test_a_rank_that_has_left_fails_the_sync_point_at_once() -> None:
    ledger = make_ledger()
    ledger.hear(Goodbye(rank=2, unread=1), 0.0)
    effects = ledger.hear(request("clock"), 0.0)
    assert [effect.rank for effect in effects if isinstance(effect, Send)] == [0, 1]
    effects = ledger.hear(answer(0, "sync point 1"), 0.0)
    assert any(isinstance(effect, Send) and isinstance(effect.message, Failed) for effect in effects)


def test_all_answers_complete_it_and_forgetting_it_leaves_nothing() -> None:
    ledger = make_ledger()
    ledger.hear(request("clock"), 0.0)
    uid = "sync point 1"
    ledger.hear(answer(2, uid), 0.0)
    ledger.hear(answer(0, uid), 0.0)
    (effect,) = ledger.hear(answer(1, uid), 0.0)
    assert isinstance(effect, Send)
    assert effect.message == Gathered(uid=uid, phase="sync", values=[(0, 0), (0, 1), (0, 2)])
    assert ledger.forget(uid, 0.0) == []
    assert ledger.num_remembered == 0
    assert ledger.next_deadline() is None


async def test_calls_come_in_order_and_their_end_last() -> None:
    calls = SyncCalls()
    first = SyncCalled(uid="1", why="clock", stop=False, seconds=1.0)
    calls.put(first)
    calls.end()
    assert await calls.next() is first
    with pytest.raises(EngineStateError, match="has ended"):
        await calls.next()


async def test_an_alarm_calls_at_the_time_that_was_set_last() -> None:
    loop = asyncio.get_running_loop()
    rung: asyncio.Future[float] = loop.create_future()
    alarm = Alarm(loop, rung.set_result)
    soon = loop.time()
    alarm.set(soon + 1000.0)
    alarm.set(soon)
    assert await rung >= soon
