"""The coordinator's ledger alone: whatever order three ranks' words arrive in, their outcome is common."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

import pytest

from dcp_async.coordination.failures import RemoteError
from dcp_async.coordination.ledger import Ledger
from dcp_async.coordination.messages import (
    Answer,
    Busy,
    CheckGap,
    Contribution,
    Effect,
    Failed,
    FailureReport,
    GapChecked,
    Gathered,
    Goodbye,
    Missed,
    Send,
    Settled,
    Silent,
    Stopped,
)

TIMEOUT, PATIENCE, GAP_SECONDS = 100.0, 10.0, 5.0
RANKS = range(3)
COORDINATOR = 0


def failure(rank: int) -> RemoteError:
    return RemoteError(phase="write", type_name="OSError", message=f"of rank {rank}")


class Ranks:
    """Three ranks around a ledger: what each was told, and a clock that only the test moves."""

    def __init__(self, phase: str = "verdict") -> None:
        self.phase = phase
        self.ledger = Ledger(
            rank=COORDINATOR, world_size=3, timeout=TIMEOUT, patience=PATIENCE, gap_seconds=GAP_SECONDS
        )
        self.now = 0.0
        self.told: dict[int, list[object]] = {rank: [] for rank in RANKS}
        self.failed: set[int] = set()
        """Ranks that failed by themselves, and so know it."""
        self.left: set[int] = set()
        self.checks: list[CheckGap] = []
        self.may_decide = False
        self._gathered = False

    def follow(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, CheckGap):
                self.checks.append(effect)
            elif isinstance(effect.message, Gathered):
                assert effect.rank == COORDINATOR
                self.ledger.begin_decision(effect.message.uid)
                self._gathered = True
                if self.may_decide:
                    self._decide()
            else:
                self.told[effect.rank].append(effect.message)

    def do(self, event: str) -> None:
        """An event by name, as the parameters of tests list them."""
        verb, _, number = event.partition(" ")
        rank = int(number or 0)
        if verb == "decide":
            self.may_decide = True
            if self._gathered:
                self._decide()
        elif verb == "silence":
            message = Silent(ranks=frozenset({rank}), why="has shown no sign of life")
            self.follow(self.ledger.silent(message, ["u"], self.now))
        elif verb == "time":
            self.pass_time()
        elif rank in self.failed | self.left:
            return  # it says nothing more
        elif verb == "arrive":
            self.arrive(rank, phase=self.phase)
        elif verb == "fail":
            self.failed.add(rank)
            report = FailureReport(reporter=rank, uid="u", failures={rank: failure(rank)})
            self.follow(self.ledger.hear(report, self.now))
        elif verb == "leave":
            self.left.add(rank)
            self.follow(self.ledger.hear(Goodbye(rank=rank, unread=1), self.now))

    def arrive(self, rank: int, phase: str = "verdict", uid: str = "u", name: str = "step-1") -> None:
        sent = Contribution(rank=rank, uid=uid, phase=phase, ordinal=1, name=name, value=rank)
        self.follow(self.ledger.hear(sent, self.now))

    def _decide(self) -> None:
        self._gathered = False
        for rank in RANKS:
            self.told[rank].append(Answer(uid="u", phase=self.phase, answer=None))
        self.follow(self.ledger.end_decision("u", None, self.now))

    def pass_time(self) -> None:
        """Until nothing is due any more; the store has no gaps."""
        while (due := self.ledger.next_deadline()) is not None:
            self.now = max(self.now, due)
            self.follow(self.ledger.tick(self.now))
            while self.checks:
                check = self.checks.pop()
                checked = GapChecked(uid=check.uid, phase=check.phase, skipped=False)
                self.follow(self.ledger.gap_checked(checked, self.now))

    def first(self, rank: int) -> type[object] | None:
        """Which outcome the rank hears first."""
        return next((type(word) for word in self.told[rank] if isinstance(word, Answer | Failed)), None)

    def knows_of_failure(self, rank: int) -> bool:
        return rank in self.failed or any(isinstance(word, Failed) for word in self.told[rank])

    def verdicts(self) -> list[tuple[list[int], bool]]:
        """What those that are left and stop are told of the end."""
        for rank in RANKS:
            if rank not in self.left:
                self.follow(self.ledger.hear(Stopped(rank=rank, uid="u", flag=rank == 1), self.now))
        self.pass_time()
        return [
            (sorted(word.failures), word.flag)
            for rank in RANKS
            for word in self.told[rank]
            if isinstance(word, Settled)
        ]


TROUBLES = ["fail 0", "fail 1", "fail 2", "leave 1", "leave 2", "silence 1", "silence 2", "time"]
PAIRS = [(), *((trouble,) for trouble in TROUBLES), *itertools.combinations(TROUBLES, 2)]


@pytest.mark.parametrize("phase", ["verdict", "commit"])
@pytest.mark.parametrize("troubles", PAIRS, ids=lambda pair: ", ".join(pair) or "none")
def test_every_order_of_what_three_ranks_do_has_one_outcome(troubles: tuple[str, ...], phase: str) -> None:
    for order in itertools.permutations(["arrive 0", "arrive 1", "arrive 2", "decide", *troubles]):
        ranks = Ranks(phase)
        for event in order:
            ranks.do(event)
        ranks.pass_time()
        listening = [rank for rank in RANKS if rank not in ranks.left]
        waiting = [rank for rank in listening if rank not in ranks.failed]
        # the first thing that ends a wait is the same for all that wait
        assert len({ranks.first(rank) for rank in waiting}) <= 1, order
        assert None not in {ranks.first(rank) for rank in waiting}, (order, "a rank waits for ever")
        # and what one knows in the end, all know
        knowledge = {ranks.knows_of_failure(rank) for rank in listening}
        assert len(knowledge) == 1, order
        if knowledge == {True}:
            verdicts = ranks.verdicts()
            assert len(verdicts) == len(listening), order
            assert all(verdict == verdicts[0] for verdict in verdicts), order
            if "time" not in troubles:  # what failed after the patience was over is in no verdict
                assert ranks.failed <= set(verdicts[0][0]), (order, "all that failed are named")
        assert ranks.ledger.next_deadline() is None
        ranks.follow(ranks.ledger.forget("u", ranks.now))
        assert ranks.ledger.num_remembered == 0, order


def test_values_are_gathered_in_the_order_of_ranks() -> None:
    ranks = Ranks()
    effects: list[Effect] = []
    for rank in (2, 0, 1):
        sent = Contribution(rank=rank, uid="u", phase="plan", ordinal=1, name="n", value=f"of {rank}")
        effects += ranks.ledger.hear(sent, 0.0)
    gathered = Gathered(uid="u", phase="plan", values=["of 0", "of 1", "of 2"])
    assert effects == [Send(rank=COORDINATOR, message=gathered)]


def seconds_per_message(world_size: int) -> float:
    """CPU time for each message of one round, but for the last, which completes it."""
    ledger = Ledger(
        rank=COORDINATOR, world_size=world_size, timeout=TIMEOUT, patience=PATIENCE, gap_seconds=GAP_SECONDS
    )
    sent = [
        Contribution(rank=rank, uid="u", phase="verdict", ordinal=1, name="n", value=None)
        for rank in range(world_size - 1)
    ]
    began = time.thread_time()
    for message in sent:
        assert ledger.hear(message, 0.0) == []
    return (time.thread_time() - began) / len(sent)


def test_a_message_costs_as_much_among_many_ranks_as_among_few() -> None:
    few, many = (min(seconds_per_message(world_size) for _ in range(5)) for world_size in (200, 4000))
    # 15 to 20 times as much where each is compared with all ranks
    assert many < 5 * few


def test_failures_wait_for_the_decision_and_what_it_raised_comes_first() -> None:
    ranks = Ranks()
    for rank in RANKS:
        ranks.arrive(rank)
    ranks.do("fail 2")
    assert ranks.told == {rank: [] for rank in RANKS}
    ranks.follow(ranks.ledger.end_decision("u", failure(0), 0.0))
    (told,) = ranks.told[1]
    assert isinstance(told, Failed)
    assert list(told.failures) == [0]
    assert ranks.verdicts()[0] == ([0, 2], True)


def test_who_is_missing_in_a_meeting_is_told_so_and_named_to_all() -> None:
    ranks = Ranks()
    ranks.arrive(2)
    assert ranks.ledger.next_deadline() == TIMEOUT
    ranks.pass_time()
    for rank in (0, 1):
        assert ranks.told[rank][0] == Missed(ordinal=1, name="step-1")
    for rank in RANKS:
        told = ranks.told[rank][-1]
        assert isinstance(told, Failed)
        assert [error.message for error in told.failures.values()] == [
            f"rank {missing} did not call save() of 'step-1' within 100 s of the first rank"
            for missing in (0, 1)
        ]


def test_messages_from_behind_a_gap_get_a_moment_to_arrive() -> None:
    ranks = Ranks()
    ranks.arrive(0)
    ranks.now = TIMEOUT
    ranks.follow(ranks.ledger.tick(ranks.now))
    (check,) = ranks.checks
    skipped = GapChecked(uid=check.uid, phase=check.phase, skipped=True)
    assert ranks.ledger.gap_checked(skipped, ranks.now) == []
    assert ranks.ledger.next_deadline() == TIMEOUT + GAP_SECONDS
    ranks.arrive(1)
    ranks.arrive(2)
    assert ranks.ledger.next_deadline() is None
    assert ranks.ledger.gap_checked(skipped, ranks.now) == [], "nobody is missing any more"


def test_phases_after_a_meeting_have_no_deadline() -> None:
    ranks = Ranks()
    ranks.arrive(1, phase="commit")
    assert ranks.ledger.next_deadline() is None


@pytest.mark.parametrize(("phase", "ends"), [("restore", True), ("unexpected 2", True), ("commit", False)])
def test_a_rank_that_hangs_in_the_trainers_code_ends_what_waits_for_it(phase: str, ends: bool) -> None:
    ranks = Ranks()
    ranks.arrive(0, phase=phase)
    busy = Busy(rank=1, text="Model.load_state_dict() of 'model'", seconds=40.0)
    ranks.follow(ranks.ledger.hear(busy, 0.0))
    ranks.follow(ranks.ledger.tick(59.0))
    assert ranks.told[2] == []
    ranks.follow(ranks.ledger.tick(60.0))
    if ends:
        (told,) = ranks.told[2]
        assert isinstance(told, Failed)
        assert told.failures[1].message == "rank 1 is in Model.load_state_dict() of 'model' since 100 s"
    else:
        assert ranks.told[2] == []


def test_a_rank_that_came_back_from_the_trainers_code_is_waited_for() -> None:
    ranks = Ranks()
    ranks.arrive(0, phase="restore")
    ranks.follow(ranks.ledger.hear(Busy(rank=1, text="load_state_dict()", seconds=40.0), 0.0))
    ranks.follow(ranks.ledger.hear(Busy(rank=1, text="", seconds=0.0), 50.0))
    ranks.follow(ranks.ledger.tick(1000.0))
    assert ranks.told[2] == []


def test_who_comes_after_the_coordinator_forgot_is_told_that_it_is_over() -> None:
    ranks = Ranks()
    ranks.follow(ranks.ledger.forget("u", 0.0))
    ranks.arrive(1)
    (told,) = ranks.told[1]
    assert isinstance(told, Failed)
    assert told.failures[0].message == "rank 0 ended this save without an answer to the others"


def test_a_coordinator_that_leaves_fails_what_it_has_contributed_to_as_well() -> None:
    ranks = Ranks()
    ranks.arrive(0)
    ranks.arrive(1)
    ranks.follow(ranks.ledger.leave(0.0))
    for rank in RANKS:
        (told,) = ranks.told[rank]
        assert isinstance(told, Failed)
        assert told.failures[0].message == "rank 0 closed its engine before the others did"
    assert not ranks.ledger.num_rounds


def test_ranks_that_do_different_things_under_one_ordinal_fail_with_both_named() -> None:
    ranks = Ranks()
    ranks.arrive(0, uid="a", name="a")
    ranks.arrive(1, uid="b", name="b")
    for rank in RANKS:
        assert [type(word) for word in ranks.told[rank]] == [Failed, Failed]
    told = ranks.told[2][0]
    assert isinstance(told, Failed)
    assert "as call number 1 of the engine rank 0 saved 'a', rank 1 saved 'b'" in told.failures[0].message


def test_nothing_grows_over_saves_that_are_over() -> None:
    ranks = Ranks()
    for number in range(2000):
        uid = f"u{number}"
        for rank in RANKS:
            sent = Contribution(rank=rank, uid=uid, phase="verdict", ordinal=number, name="n", value=None)
            ranks.follow(ranks.ledger.hear(sent, 0.0))
        ranks.follow(ranks.ledger.end_decision(uid, None, 0.0))
        ranks.follow(ranks.ledger.forget(uid, 0.0))
    assert ranks.ledger.num_remembered == 0
    assert ranks.ledger.next_deadline() is None
