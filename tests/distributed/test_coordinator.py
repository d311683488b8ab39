"""StoreCoordinator among real processes on gloo: what ranks agree on, how every failure ends every wait."""

from __future__ import annotations

import itertools
import pickle
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dcp_async.coordination.failures import RemoteError, RemoteFailure
from tests.distributed.agent import STANDSTILL
from tests.distributed.harness import NEVER, Call, Failed, World

MIB = 1 << 20
SHORT = 5.0
"""Seconds of Timeouts.coordination where ranks meet, which no clock of a test moves: one waits for them to
pass, and the others have to meet within them."""

MakeWorld = Callable[..., World]


def messages(calls: list[Call]) -> list[str]:
    return [call.error().text for call in calls]


def remote(call: Call) -> Failed:
    error = call.error()
    assert error.kind == "RemoteFailure", error
    return error


def live_until_done(world: World, calls: Sequence[Call], ranks: Sequence[int] | None = None) -> None:
    """Time passes for ``ranks``, interval by interval, all of them alive in each, until the calls have ended.
    The clocks of others stand still."""
    while not all(call.done() for call in calls):
        world.all("live", ranks)


def resume(world: World, rank: int) -> None:
    """A rank that was stopped goes on, after a long time by its clock."""
    world[rank].signal(signal.SIGCONT)
    world[rank].do("advance", seconds=STANDSTILL)


def close_without(world: World, ranks: Sequence[int]) -> None:
    """Ranks close that a dead rank never said goodbye to."""
    calls = world.begin("close", ranks)
    world[ranks[0]].do("advance")  # so that its next look at the dead one is now
    for call in calls:
        call.result()


def wait_until_steady(world: World) -> None:
    """Until a coordinator that stood still decides again; saves before that fail, on all ranks."""
    for ordinal in itertools.count(1000):
        calls = world.begin("exchange", ordinal=ordinal)
        outcomes = [isinstance(outcome(call), Failed) for call in calls]
        assert len(set(outcomes)) == 1, "the outcome is common"
        if not outcomes[0]:
            return
        world.all("live")


def outcome(call: Call) -> Any:
    try:
        return call.result()
    except Failed as error:
        return error


# Meeting.


def test_ranks_agree_on_ids_that_no_other_engine_has(make_world: MakeWorld, loop_kind: str) -> None:
    world = make_world(4, loop=loop_kind)
    world.open()
    ids = world.all("uid")
    assert len(set(ids)) == 1
    assert re.fullmatch("[0-9a-f]{16}", ids[0])
    assert world.all("uid", ordinal=2)[0] != ids[0]
    assert world.all("uid", name="other")[0] != ids[0]
    world.all("close")
    world.open()
    again = world.all("uid")
    assert len(set(again)) == 1
    assert again[0] != ids[0]
    world.end()


def test_open_names_the_rank_that_is_configured_otherwise_on_all_ranks(make_world: MakeWorld) -> None:
    world = make_world(4)
    calls = [world[rank].start("open", digest="b" if rank == 2 else "a") for rank in range(4)]
    for error in world.errors(calls):
        assert error.kind == "EngineStateError"
        assert error.text.startswith("rank 2 configured the engine in another way than ranks 0, 1, 3 did")
    world.open()  # and they may try again
    world.end()


def test_open_names_the_rank_that_has_another_coordinator(make_world: MakeWorld) -> None:
    world = make_world(2)
    calls = [world[rank].start("open", coordinator_rank=rank) for rank in range(2)]
    for text in messages(calls):
        assert "rank 1 configured the engine in another way than rank 0 did" in text
    world.end()


def test_open_names_missing_ranks_and_works_once_they_come(make_world: MakeWorld) -> None:
    world = make_world(4)
    started = time.monotonic()
    for text in messages(world.begin("open", [0, 1], coordination=SHORT)):
        assert text.startswith("ranks 2, 3 did not open the engine on this process group within 5 s")
    assert time.monotonic() - started >= SHORT
    world.open()
    assert len(set(world.all("uid"))) == 1
    world.end()


def test_open_names_rank_0_when_it_is_missing(make_world: MakeWorld) -> None:
    world = make_world(2)
    (text,) = messages(world.begin("open", [1], coordination=0.5))  # it has nobody to meet
    assert text.startswith(
        "rank 0 did not open its engine on this process group within 0.5 s (this is rank 1)"
    )
    world.open()
    world.end()


def test_open_works_after_one_rank_was_cancelled_in_it(make_world: MakeWorld) -> None:
    world = make_world(2)
    for rank in (1, 0):
        call = world[rank].start("open")
        call.cancel()
        assert call.error().kind == "CancelledError"
    world.open()
    world.end()


def test_open_refuses_a_store_that_cannot_be_cloned(make_world: MakeWorld) -> None:
    world = make_world(1)
    world[0].do("leave")
    world[0].do("join_uncloneable")
    error = world[0].start("open").error()
    assert error.kind == "EngineStateError"
    assert error.text.startswith("the process group's store can't be cloned")
    world.end()


# Exchanging.


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_exchange_gives_each_rank_its_answer_to_all_messages(
    make_world: MakeWorld, size: int, last: bool
) -> None:
    world = make_world(size)
    world.open(coordinator_rank=size - 1 if last else 0)
    told = [{"rank": rank, "data": (None, 1.5, b"\xff", [rank])} for rank in range(size)]
    calls = [world[rank].exchange(message=told[rank]) for rank in range(size)]
    assert [call.result() for call in calls] == [[rank, told] for rank in range(size)]
    world.end()


def test_exchange_keeps_uids_and_phases_apart_in_every_order(make_world: MakeWorld, loop_kind: str) -> None:
    world = make_world(4, loop=loop_kind)
    world.open()
    phases = ["verdict", "plan", "write", "commit"]
    assert world.all("exchange_many", ordinals=list(range(50)), phases=phases) == [200] * 4
    world.end()


def test_exchange_waits_for_an_early_rank_to_be_joined(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.open()
    early = [world[1].exchange(ordinal, message=ordinal) for ordinal in (3, 2, 1)]
    assert world[1].do("counts")[1] == 0
    for ordinal in (1, 2, 3):
        assert world[0].exchange(ordinal, message=0).result() == [0, [0, ordinal]]
    assert [call.result() for call in early] == [[1, [0, 3]], [1, [0, 2]], [1, [0, 1]]]
    world.end()


@pytest.mark.parametrize("nbytes", [MIB - 100, MIB, 5 * MIB + 1])
def test_exchange_carries_big_messages_and_leaves_no_key(make_world: MakeWorld, nbytes: int) -> None:
    world = make_world(2)
    world.open()
    world.all("exchange")
    before = world[0].do("keys")
    assert world.all("exchange_big", nbytes=nbytes, ordinal=2) == [True, True]
    assert world[0].do("keys") == before
    world.end()


def test_exchange_costs_one_message_up_and_one_down_per_rank(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.open()
    world.all("exchange", decide="common")
    assert world.all("counts") == [(3, 3), (1, 1), (1, 1), (1, 1)]
    world.end()


def test_exchange_tells_all_what_decide_raised(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.open()
    calls = world.begin("exchange", decide="fall", phase="plan")
    assert calls[0].error().kind == "LocalError"
    for call in calls[1:]:
        error = remote(call)
        assert error.text == "rank 0: LocalError: no space left"
        phase, kind, text, trace, cancelled = error.failures[0]
        assert (phase, kind, text, cancelled) == ("plan", "LocalError", "no space left", False)
        assert "in _fall" in trace
    assert world.all("exchange", ordinal=2, message=0) == [[rank, [0] * 4] for rank in range(4)]
    world.end()


@pytest.mark.parametrize("decide", ["odd", "too_few"])
def test_exchange_tells_all_of_answers_that_cannot_be_sent(make_world: MakeWorld, decide: str) -> None:
    world = make_world(2)
    world.open()
    calls = world.begin("exchange", decide=decide)
    assert calls[0].error().kind == "ValueError"
    assert remote(calls[1]).failures[0][1] == "ValueError"
    world.end()


def test_exchange_refuses_a_message_that_is_no_plain_data(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.open()
    error = world[1].exchange(message={1, 2}).error()
    assert error.kind == "ValueError"
    assert "set" in error.text
    world.end()


# Failing.


@pytest.mark.parametrize("failing", [0, 2], ids=["coordinator", "rank 2"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_fail_reaches_every_other_rank(make_world: MakeWorld, failing: int, when: str) -> None:
    world = make_world(4)
    world.open()
    others = [rank for rank in range(4) if rank != failing]
    if when == "before":
        world[failing].do("fail", phase="capture")
    calls = world.begin("exchange", others)
    waits = world.begin("failed", others)
    if when == "during":
        world[failing].do("fail", phase="capture")
        world[failing].do("fail", phase="capture", text="told once is enough")
    for call in [*calls, *waits]:
        error = remote(call)
        assert error.text == f"rank {failing}: LocalError: disk full"
        assert list(error.failures) == [failing]
        assert error.failures[failing][0] == "capture"
    assert world.all("exchange", ordinal=2, message=0) == [[rank, [0] * 4] for rank in range(4)]
    world.end()


def test_fail_after_an_exchange_reaches_who_waits_for_failures(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.open()
    world.all("exchange")
    waits = world.begin("failed", [0, 1, 2])
    world[3].do("fail", phase="write")
    for call in waits:
        assert remote(call).failures[3][0] == "write"
    assert all(
        remote(call).failures[3][0] == "write" for call in world.begin("exchange", [0, 1, 2], phase="commit")
    )
    world.end()


def test_fail_after_forget_is_dropped(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.open()
    world.all("exchange")
    world.all("forget", [0])
    world[1].do("fail")
    assert world.all("exchange", ordinal=2, message=0) == [[0, [0, 0]], [1, [0, 0]]]
    # of rank 0 the id of its second save and who has sent what of it; of rank 1, which forgot none, both ids,
    # what was answered to them, and its failure
    assert world.all("held") == [2, 5]
    world.end()


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_is_left_of_a_wait_for_the_end_that_was_cancelled(make_world: MakeWorld, rank: int) -> None:
    world = make_world(2)
    world.open()
    world.all("exchange", ordinal=2)
    world.all("forget", ordinal=2)
    before = world[rank].do("held")
    world[rank].do("fail")
    world[rank].do("cancel_settling")
    world[rank].do("forget")
    assert world[rank].do("held") == before
    world.end()


@pytest.mark.parametrize("cancelled", [0, 1])
def test_cancellation_travels_as_one(make_world: MakeWorld, cancelled: int) -> None:
    world = make_world(2)
    world.open()
    other = world[1 - cancelled].exchange()
    mine = world[cancelled].exchange(2)
    mine.cancel()
    assert mine.error().kind == "CancelledError"
    world[cancelled].do("fail", cancel=True)
    assert remote(other).failures[cancelled][4] is True
    world.end()


def test_fail_while_the_coordinator_decides_comes_after_the_answers(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.open()
    calls = world.begin("exchange", decide="pause", phase="commit", message=0)
    world[0].do("until_deciding")
    world[2].do("fail")
    world.all("exchange", ordinal=2)  # rank 2's messages arrive in order: its failure is known now
    world[0].do("open_gate")
    assert [calls[rank].result() for rank in (0, 1, 3)] == [[rank, [0] * 4] for rank in (0, 1, 3)]
    for call in world.begin("exchange", [0, 1, 3], phase="after"):
        assert remote(call).failures[2][2] == "disk full"
    world.end()


def test_different_names_for_one_save_fail_both_and_name_both(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.open()
    world.all("exchange", ordinal=1)
    calls = [world[rank].exchange(2, name="b" if rank == 1 else "a") for rank in range(4)]
    for call in calls:
        error = remote(call)
        assert "as call number 2 of the engine" in error.text
        assert "saved 'a'" in error.text
        assert "rank 1 saved 'b'" in error.text
        assert 1 in error.failures
    assert world.all("exchange", ordinal=3, message=0) == [[rank, [0] * 4] for rank in range(4)]
    world.end()


@pytest.mark.parametrize("how", ["cancelled", "forgot before", "forgot after"])
def test_a_save_that_the_coordinator_left_without_a_word_ends_elsewhere(
    make_world: MakeWorld, how: str
) -> None:
    world = make_world(2)
    world.open()
    if how == "cancelled":
        mine = world[0].exchange()
        mine.cancel()
        assert mine.error().kind == "CancelledError"
    elif how == "forgot before":
        world[0].do("forget")
    other = world[1].exchange()
    world.all("exchange", ordinal=2)  # rank 1's messages arrive in order: its first is known now
    if how == "forgot after":
        world[0].do("forget")
    assert remote(other).text == "rank 0 ended this save without an answer to the others"
    world.end()


# Missing and lost ranks.


@pytest.mark.parametrize("missing", [[0], [2], [1, 3]])
def test_verdict_names_ranks_that_do_not_call(make_world: MakeWorld, missing: list[int]) -> None:
    world = make_world(4)
    world.open(coordination=20.0)
    calls = world.begin("exchange", [rank for rank in range(4) if rank not in missing])
    world[0].do("until_heard", kind="Contribution", count=len(calls))
    live_until_done(world, calls)
    for call in calls:
        error = remote(call)
        assert list(error.failures) == missing
        assert all(
            f"rank {rank} did not call save() of 'step-1' within 20 s" in error.text for rank in missing
        )
    # whoever comes too late is told the same
    assert list(remote(world[missing[0]].exchange()).failures) == missing
    assert world.all("exchange", ordinal=2, message=0) == [[rank, [0] * 4] for rank in range(4)]
    world.end()


def test_other_phases_wait_for_a_slow_rank_that_lives(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.open(coordination=20.0)
    early = world[0].exchange(phase="commit", message=0)
    watching = world[1].start("failed")
    # the coordinator's deadline for another save tells that much more than a timeout has passed
    for number, ordinal in enumerate((2, 3, 4), 2):
        late = world[1].exchange(ordinal)
        world[0].do("until_heard", kind="Contribution", count=number)
        live_until_done(world, [late])
        assert list(remote(late).failures) == [0]
    assert not early.done()
    assert not watching.done()
    assert world[1].exchange(phase="commit", message=0).result() == [1, [0, 0]]
    assert early.result() == [0, [0, 0]]
    watching.cancel()
    world.end()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_silent_rank_is_named_with_its_last_phase(make_world: MakeWorld, how: signal.Signals) -> None:
    world = make_world(4)
    world.open(coordination=20.0, exit_grace=NEVER)
    world.all("exchange", phase="plan")
    waits = world.begin("failed", [0, 1]) + world.begin("exchange", [2], phase="commit")
    world[3].signal(how)
    live_until_done(world, waits, [0, 1, 2])
    for call in waits:
        error = remote(call)
        assert error.text == "rank 3 has shown no sign of life for 20 s; it was last heard of in phase 'plan'"
    if how == signal.SIGSTOP:
        resume(world, 3)
        assert list(remote(world[3].exchange(phase="commit")).failures) == [3]
        assert world.all("exchange", ordinal=2, message=0) == [[rank, [0] * 4] for rank in range(4)]
        world.end()
    else:
        world[3].process.join()
        close_without(world, [0, 1, 2])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_silent_coordinator_is_named_by_all(make_world: MakeWorld, how: signal.Signals) -> None:
    world = make_world(4)
    world.open(coordination=20.0, coordinator_rank=1, exit_grace=3.0)
    waits = world.begin("exchange", [0, 2]) + world.begin("failed", [3], ordinal=2)
    world[1].signal(how)
    live_until_done(world, waits, [0, 2, 3])
    for call in waits:
        assert remote(call).text.startswith("rank 1 has shown no sign of life for 20 s")
    if how == signal.SIGSTOP:
        world[1].signal(signal.SIGCONT)
        # it is told that the others gave up on it, before its own deadline would name them
        world[1].do("until_heard", kind="FailureReport", count=1)
        world[1].do("advance", seconds=STANDSTILL)
        assert set(remote(world[1].start("failed")).failures) == {1}
        wait_until_steady(world)
        assert world.all("exchange", ordinal=3, message=0) == [[rank, [0] * 4] for rank in range(4)]
        world.end()
    else:
        world[1].process.join()
        world.all("close", [0, 2, 3])


def test_a_coordinator_that_stood_still_while_it_decided_does_not_go_on(make_world: MakeWorld) -> None:
    """The other rank has given up on it: what it would commit now, that one has called failed."""
    world = make_world(2)
    world.open(coordination=20.0, coordinator_rank=1)
    waits = world[0].exchange(phase="commit")
    decides = world[1].exchange(phase="commit", decide="stand_still")
    live_until_done(world, [waits], [0])
    assert list(remote(waits).failures) == [1]
    world[1].signal(signal.SIGCONT)
    assert "rank 1 stood still for 20 s" in decides.error().text
    wait_until_steady(world)
    assert world.all("exchange", ordinal=2, message=0) == [[0, [0, 0]], [1, [0, 0]]]
    world.end()


def test_a_rank_that_dies_while_it_posts_blocks_nobody(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.open(coordination=20.0, exit_grace=NEVER)
    world[3].start("die_while_posting")
    world[3].process.join()
    for ordinal in (1, 2):
        calls = world.begin("exchange", [0, 1, 2], ordinal=ordinal)
        live_until_done(world, calls, [0, 1, 2])
        for call in calls:
            assert list(remote(call).failures) == [3]
    assert world[0].do("counts")[1] == 4  # those of ranks 1 and 2, from behind the gap
    close_without(world, [0, 1, 2])


def test_the_end_of_the_stores_process_ends_every_wait(make_world: MakeWorld, loop_kind: str) -> None:
    world = make_world(4, loop=loop_kind, host="apart")
    world.open(exit_grace=NEVER)
    assert world.host is not None
    waits = world.begin("exchange", [0, 1]) + world.begin("failed", [2, 3], ordinal=2)
    world.host.kill()
    for call in waits:
        error = call.error()
        assert error.kind == "EngineStateError"
        assert error.text.startswith("the process group's store is gone: the process that hosts it")
    assert all(error.kind == "EngineStateError" for error in world.errors(world.begin("exchange", ordinal=3)))
    world.all("close")


def test_the_end_of_a_coordinator_that_hosts_the_store_ends_every_wait(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.open(exit_grace=NEVER)
    waits = world.begin("exchange", [1, 2]) + world.begin("failed", [3])
    world[0].kill()
    for call in waits:
        assert "store is gone" in call.error().text
    world.all("close", [1, 2, 3])


def test_a_stopped_coordinator_that_hosts_the_store_is_named_and_works_on_later(
    make_world: MakeWorld,
) -> None:
    world = make_world(2)
    world.open(coordination=20.0)
    wait = world[1].exchange()
    world[0].signal(signal.SIGSTOP)
    while not wait.done():  # it can't beat, so it can't be waited for either
        world[1].do("advance")
    error = remote(wait)
    assert list(error.failures) == [0]
    assert "the process group's store has not answered for 20 s" in error.text
    resume(world, 0)
    # it must not decide now: rank 1 has given up, which it may hear of only later
    assert set(remote(world[0].exchange()).failures) <= {0, 1}
    wait_until_steady(world)
    assert world.all("exchange", ordinal=2, message=0) == [[0, [0, 0]], [1, [0, 0]]]
    world.end()


def test_abandon_ends_every_wait_while_the_store_hangs(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.open(exit_grace=NEVER)
    wait = world[1].exchange()
    world[0].signal(signal.SIGSTOP)
    world[1].do("abandon")
    assert wait.error().text == "the engine was told to end at once"
    world[1].do("close")
    assert world[1].finish() == 0
    world.kill()


# Leaving.


def test_close_waits_for_the_other_ranks(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.open(coordinator_rank=1, exit_grace=NEVER)
    first = world.begin("close", [0, 1])
    world[2].do("close")
    assert [call.done() for call in first] == [False, False]
    world[3].do("close")
    for call in first:
        call.result()
    world.end()


def test_close_gives_up_on_the_others_after_exit_grace(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.open(exit_grace=1.0)
    assert world[0].do("close") >= 1.0
    error = world[1].exchange().error()
    assert error.kind == "EngineStateError"
    assert error.text == "rank 0, the coordinator, closed its engine"
    world.end()


def test_a_rank_that_closed_is_missed_at_once(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.open()
    world[2].do("close")
    for call in world.begin("exchange", [0, 1, 3]):
        assert remote(call).text == "rank 2 closed its engine"
    world.end()


def test_a_save_that_comes_while_the_coordinator_closes_fails_at_once(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.open()
    early = world[1].exchange(1)
    closing = world[0].start("close")
    for call in (early, world[1].exchange(2)):
        assert remote(call).text == "rank 0 closed its engine before the others did"
    world[1].do("close")
    closing.result()
    world.end()


def test_close_joins_its_threads_and_so_does_an_open_that_fails(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.open()
    assert world.all("threads") == [["dcp_async-post-0", "dcp_async-wait-0"]] * 2
    world.all("close")
    assert world.all("threads") == [[], []]
    world.errors([world[rank].start("open", digest=str(rank)) for rank in range(2)])
    assert world.all("threads") == [[], []]
    world.end()


def test_close_leaves_no_key_of_the_engine(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.open(coordinator_rank=2)
    world.all("close")
    before = world[0].do("keys")
    for _ in range(3):
        world.open(coordinator_rank=2)
        world.all("exchange")
        world[3].do("fail", ordinal=2)
        world.all("close")
    assert world[0].do("keys") == before
    world.end()


# Several engines, several groups.


def test_two_engines_of_a_group_do_not_meet(make_world: MakeWorld) -> None:
    world = make_world(2)
    for engine in ("main", "second"):
        world.open(engine=engine, coordinator_rank=int(engine == "second"))
    calls = {
        (engine, rank): world[rank].exchange(message=f"{engine} {rank}", engine=engine)
        for engine in ("main", "second")
        for rank in (0, 1)
    }
    for (engine, rank), call in calls.items():
        assert call.result() == [rank, [f"{engine} 0", f"{engine} 1"]]
    world.all("close")
    assert world.all("exchange", engine="second", ordinal=2, message=0) == [[0, [0, 0]], [1, [0, 0]]]
    world.end()


def test_a_subgroup_coordinates_alone_with_ranks_of_its_own(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.all("subgroup", name="odd", members=[1, 3])
    world.open([1, 3], group="odd", coordinator_rank=1)
    calls = world.begin("exchange", [1, 3], message="x")
    assert [call.result() for call in calls] == [[0, ["x", "x"]], [1, ["x", "x"]]]
    world[3].do("fail", ordinal=2)
    assert list(remote(world[1].exchange(2)).failures) == [1]
    world.end()


def test_a_group_that_is_made_again_meets_again(make_world: MakeWorld) -> None:
    world = make_world(2, host="apart")
    world.open()
    world.begin("exchange", [0])  # an engine is left behind, and nobody says goodbye
    world.all("leave")
    assert world.host is not None
    world.host.do("forget_addresses")
    stale = [key for key in world.host.do("keys") if "dcp_async" in key]
    assert stale
    world.all("join", port=world.port)
    world.open(engine="new")
    assert world.all("exchange", engine="new", message=0) == [[0, [0, 0]], [1, [0, 0]]]


def test_what_dead_processes_left_in_the_lobby_is_not_taken_for_a_rank(make_world: MakeWorld) -> None:
    world = make_world(4)
    world[1].do("stale_hello")
    world[3].do("stale_hello")
    world.open(coordination=8.0)
    assert world.all("exchange", message=0) == [[rank, [0] * 4] for rank in range(4)]
    world.end()


def test_a_file_store_serves_as_well(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(2)
    world.all("leave")
    world.all("join_file", path=str(tmp_path / "store"))
    world.open()
    assert world.all("exchange_many", ordinals=[1, 2, 3], phases=["verdict", "commit"]) == [6, 6]
    world.end()


def test_the_older_kind_of_server_serves_as_well(make_world: MakeWorld) -> None:
    world = make_world(2, libuv=False)
    world.open()
    assert world.all("exchange_many", ordinals=[1, 2, 3], phases=["verdict", "commit"]) == [6, 6]
    world.end()


def test_an_engine_that_is_left_open_does_not_keep_its_process(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.open()
    world[0].exchange()
    assert [world[rank].finish() for rank in (1, 0)] == [0, 0]


def test_memory_and_keys_do_not_grow_over_500_saves(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.open()
    world.all("save_often", first=1, count=5)
    before: list[Any] = [world[0].do("num_keys"), world.all("held")]
    world.all("save_often", first=6, count=500)
    assert [world[0].do("num_keys"), world.all("held")] == before
    world.end()


def test_errors_travel_as_capped_text_and_can_be_pickled() -> None:
    error = RemoteError.of("write", RuntimeError("x" * 100_000))
    phase, kind, text, trace, cancelled = error.plain()
    assert (phase, kind, cancelled) == ("write", "RuntimeError", False)
    assert len(text) == len(trace) == 64 << 10
    failure = pickle.loads(pickle.dumps(RemoteFailure({3: error})))
    assert failure.failures[3].plain() == error.plain()
    assert str(failure).startswith("rank 3: RuntimeError: xxx")


def test_errors_that_fail_to_print_travel() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise ValueError("not even that")

    error = RemoteError.of("write", Odd())
    assert error.message == "(its message can't be had: ValueError)"
