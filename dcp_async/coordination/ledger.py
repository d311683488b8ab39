"""The coordinator's ledger: what all ranks have sent, and what follows from it for each of them.

Enters: ranks' messages in the order of the inbox, silence, and the time. Leaves: what to tell whom.
Invariant: a round ends in one way for all ranks. While a decision on a save is being made, its failures wait,
because ranks must not take for failed what was just committed.

It owns what the ranks agree on: rounds in flight, saves that failed, saves that are over. A uid enters with
its first message, and is forgotten when the coordinator's own rank forgets it; what comes later is answered
from the table of uids that are over, or, hundreds of saves later, by the end of time: the deadline of a
meeting or the goodbye of a rank. Neither store, loop nor clock is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .call_order import CallOrder
from .failures import RemoteError, closed, late, silent, unanswered
from .messages import (
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
    Silent,
    Stopped,
    SyncCalled,
    SyncRequested,
    ToCoordinator,
)
from .phases import MEETINGS, follows_user_code
from .recent import Recent
from .rounds import Round, Rounds
from .settlement import Settlement
from .sync_points import SyncPoints


@dataclass(slots=True)
class _Held:
    """Failures of a save on which ``depth`` decisions are being made."""

    depth: int = 0
    reports: list[FailureReport] = field(default_factory=list)


class Ledger:
    """One for all saves and loads of an engine; times are seconds of one clock, given with each call."""

    def __init__(
        self, *, rank: int, world_size: int, timeout: float, patience: float, gap_seconds: float
    ) -> None:
        """``rank`` is the coordinator's own. ``timeout``: until who does not arrive in a meeting is missing;
        ``patience``: until the errors of a failed save no longer wait for ranks that hang; ``gap_seconds``:
        until messages that were stuck must have arrived."""
        self._rank, self._ranks = rank, frozenset(range(world_size))
        self._timeout, self._gap_seconds = timeout, gap_seconds
        self._rounds = Rounds()
        self._calls = CallOrder()
        self._settlement = Settlement(world_size=world_size, patience=patience)
        self._sync_points = SyncPoints()
        self._held: dict[str, _Held] = {}
        self._gone: dict[int, str] = {}
        """Ranks that closed their engine, and how to say so."""
        self._busy: dict[int, tuple[str, float]] = {}
        """Rank -> (what code of the trainer's it is in, since when)."""
        self._reached: Recent[str, dict[int, str]] = Recent()
        """Uid -> rank -> the phase that the rank was last heard of in."""
        self._failed: Recent[str, None] = Recent()
        self._over: Recent[str, None] = Recent()

    def __repr__(self) -> str:
        return f"<Ledger {self._rounds} {self._settlement} failed={list(self._failed)[-3:]}>"

    @property
    def num_rounds(self) -> int:
        """In how many rounds ranks wait for others."""
        return len(self._rounds)

    @property
    def num_remembered(self) -> int:
        """Entries that grow with saves in flight and must not grow with saves that are over."""
        return len(self._rounds) + len(self._held) + len(self._reached) + len(self._failed)

    def next_deadline(self) -> float | None:
        """When ``tick`` has to be called, if nothing happens before."""
        return min((*self._rounds.deadlines(), *self._settlement.deadlines()), default=None)

    # What ranks say.

    def hear(self, message: ToCoordinator, now: float) -> list[Effect]:
        """What follows from a rank's message."""
        effects: list[Effect]
        match message:
            case Contribution():
                effects = self._contributed(message, now)
            case FailureReport():
                effects = self._fail(message, now)
            case Busy():
                if message.text:
                    self._busy[message.rank] = message.text, now - message.seconds
                else:
                    self._busy.pop(message.rank, None)
                effects = self._fail_of_busy(now)
            case Stopped():
                effects = [*self._settlement.stopped(message, now)]
            case SyncRequested():
                effects = self._call(self._sync_points.requested(message))
            case Goodbye():
                effects = self._leave(message.rank, f"rank {message.rank} closed its engine", now)
        return self._to_listeners(effects)

    def _contributed(self, sent: Contribution, now: float) -> list[Effect]:
        uid, phase = sent.uid, sent.phase
        if uid in self._failed:
            return []  # all have been told, this rank too: its message crossed ours
        if uid in self._over:
            # its own rank has forgotten it, so nobody there waits for an answer
            if sent.rank == self._rank:
                return []
            return self._tell_failed(uid, {self._rank: unanswered(self._rank, phase)})
        unmatched, failures = self._calls.compare(sent)
        if unmatched:
            return [effect for other in unmatched for effect in self._fail_all(other, failures, now)]
        # not needed for the round: it says of a rank that dies how far it had come
        self._reached.setdefault(uid, {})[sent.rank] = phase
        gathered = self._rounds.add(sent)
        # counted, not compared: this is done once for each message of each rank
        if len(gathered.values) == len(self._ranks):
            # dropped before anybody decides: a failure from here on is one of a decision, not of a round
            self._rounds.drop(uid, phase)
            values = [gathered.values[rank] for rank in sorted(self._ranks)]
            return [Send(rank=self._rank, message=Gathered(uid=uid, phase=phase, values=values))]
        # from the first to come; one more deadline for each that follows would keep them all waiting
        limit = self._timeout if phase in MEETINGS else self._sync_points.seconds(uid)
        if limit is not None and len(gathered.values) == 1:
            gathered.deadline = now + limit
        return self._fail_of_gone(gathered, now)

    def _call(self, called: SyncCalled | None) -> list[Effect]:
        return [Send(rank=rank, message=called) for rank in sorted(self._ranks) if called is not None]

    # Failing.

    def fail(
        self, uid: str, failures: Mapping[int, RemoteError], now: float, *, reporter: int | None = None
    ) -> list[Effect]:
        """``uid`` failed; all are told, at once or when the decision in progress has been sent. Who reported
        it need not be told."""
        return self._to_listeners(self._fail_all(uid, failures, now, reporter=reporter))

    def _fail_all(
        self, uid: str, failures: Mapping[int, RemoteError], now: float, *, reporter: int | None = None
    ) -> list[Effect]:
        # the coordinator's own rank hears of each failure, so it serves as the reporter of what has none
        report = FailureReport(
            reporter=self._rank if reporter is None else reporter, uid=uid, failures=failures
        )
        return self._fail(report, now)

    def _fail(self, report: FailureReport, now: float) -> list[Effect]:
        uid = report.uid
        if uid in self._held:
            self._held[uid].reports.append(report)
            return []
        if uid in self._over:
            return []  # whoever asks of it is told by the answer to its contribution
        # a second failure changes nothing for who waits, but has its place in the verdict
        effects: list[Effect] = [*self._settlement.failed(uid, report.failures, now)]
        if uid in self._failed:
            return effects
        self._failed[uid] = None
        self._rounds.drop(uid)
        return effects + self._tell_failed(uid, report.failures, but=report.reporter)

    def _tell_failed(
        self, uid: str, failures: Mapping[int, RemoteError], *, but: int | None = None
    ) -> list[Effect]:
        told = Failed(uid=uid, failures=failures)
        return [
            Send(rank=rank, message=told)
            for rank in sorted(self._ranks)
            # the coordinator's own rank takes what it reported for common only when it comes from here
            if rank != but or rank == self._rank
        ]

    def begin_decision(self, uid: str) -> None:
        """The coordinator decides on ``uid``: from here on its failures wait."""
        self._held.setdefault(uid, _Held()).depth += 1

    def end_decision(self, uid: str, error: RemoteError | None, now: float) -> list[Effect]:
        """The answers have been sent, or ``error`` was raised, which fails ``uid`` before failures that came
        meanwhile."""
        held = self._held[uid]
        if error is not None:
            held.reports.insert(0, FailureReport(reporter=self._rank, uid=uid, failures={self._rank: error}))
        held.depth -= 1
        if held.depth:  # phases of one save may be decided side by side; the last to end tells
            return []
        del self._held[uid]
        return self._to_listeners([effect for report in held.reports for effect in self._fail(report, now)])

    def undecided(self, message: Gathered, now: float) -> list[Effect]:
        """Nobody on the coordinator decides any more: its exchange was cancelled while others contributed."""
        return self.fail(message.uid, {self._rank: unanswered(self._rank, message.phase)}, now)

    # Waiting in vain.

    def tick(self, now: float) -> list[Effect]:
        """What is due by ``now``."""
        effects: list[Effect] = [
            CheckGap(uid=gathered.uid, phase=gathered.phase) for gathered in self._rounds.overdue(now)
        ]
        effects += self._settlement.tick(now)
        effects += self._fail_of_busy(now)
        return self._to_listeners(effects)

    def gap_checked(self, message: GapChecked, now: float) -> list[Effect]:
        """Names who is missing in a round that is overdue, unless messages may be on their way now."""
        gathered = self._rounds.find(message.uid, message.phase)
        if gathered is None:
            return []  # complete or failed meanwhile
        if message.skipped:
            gathered.deadline = now + self._gap_seconds
            return []
        lacking = gathered.lacking(self._ranks)
        effects: list[Effect] = []
        if gathered.ordinal is not None:
            # ordinals must stay in step: each learns which call of its own the others have given up
            missed = Missed(ordinal=gathered.ordinal, name=gathered.name)
            effects = [Send(rank=rank, message=missed) for rank in lacking]
        failures = {rank: late(rank, gathered.phase, self._not_done(rank, gathered, now)) for rank in lacking}
        return self._to_listeners([*effects, *self._fail_all(gathered.uid, failures, now)])

    def _not_done(self, rank: int, gathered: Round, now: float) -> str:
        seconds = self._sync_points.seconds(gathered.uid)
        if seconds is not None:
            return f"did not tell within {seconds:g} s which step it has reached"
        call = MEETINGS[gathered.phase]
        if gathered.phase == "verdict" and gathered.name:
            call += f" of {gathered.name!r}"
        doing = f": it {self._doing(rank, now)}" if rank in self._busy else ""
        return f"did not call {call} within {self._timeout:g} s of the first rank{doing}"

    def _doing(self, rank: int, now: float) -> str:
        text, since = self._busy[rank]
        return f"is in {text} since {now - since:.0f} s"

    def _fail_of_busy(self, now: float) -> list[Effect]:
        """Fail what waits for ranks that have been in the trainer's code for too long. Meetings have a
        deadline of their own, and name them when it is over."""
        stuck = {rank for rank, (_, since) in self._busy.items() if now - since >= self._timeout}
        effects: list[Effect] = []
        for gathered in self._rounds if stuck else ():
            lacking = gathered.lacking(stuck)
            if lacking and follows_user_code(gathered.phase):
                failures = {rank: late(rank, gathered.phase, self._doing(rank, now)) for rank in lacking}
                effects += self._fail_all(gathered.uid, failures, now)
        return effects

    def silent(self, message: Silent, waited_for: Iterable[str], now: float) -> list[Effect]:
        """Ranks are silent: what waits for them fails, and all that the coordinator's own rank waits for,
        since it needs every rank."""
        lacking = {gathered.uid for gathered in self._rounds if gathered.lacking(message.ranks)}
        effects: list[Effect] = []
        # in one order, so that what is sent does not depend on the hashes of this process
        for uid in sorted(lacking.union(waited_for)):
            reached, phase = self._reached.get(uid, {}), self._rounds.phase(uid) or "open"
            failures = {rank: silent(rank, message.why, reached.get(rank), phase) for rank in message.ranks}
            effects += self._fail_all(uid, failures, now)
        return self._to_listeners(effects)

    # Leaving.

    def leave(self, now: float) -> list[Effect]:
        """The coordinator takes part in nothing any more."""
        reason = f"rank {self._rank} closed its engine before the others did"
        effects = self._leave(self._rank, reason, now)
        # in those that are left it has contributed, and whoever waited for the answer there has ended
        for gathered in self._rounds:
            failures = {self._rank: closed(gathered.phase, reason)}
            effects += self._fail_all(gathered.uid, failures, now)
        return self._to_listeners(effects)

    def _leave(self, rank: int, reason: str, now: float) -> list[Effect]:
        # a goodbye is the last of a rank's messages, so whatever it has contributed is here by now
        self._gone[rank] = reason
        effects: list[Effect] = [*self._settlement.gone(rank)]
        for gathered in self._rounds:
            effects += self._fail_of_gone(gathered, now)
        return effects

    def _fail_of_gone(self, gathered: Round, now: float) -> list[Effect]:
        lacking = gathered.lacking(self._gone.keys())
        if not lacking:
            return []
        failures = {rank: closed(gathered.phase, self._gone[rank]) for rank in lacking}
        return self._fail_all(gathered.uid, failures, now)

    def forget(self, uid: str, now: float) -> list[Effect]:
        """``uid`` is over on the coordinator; ranks that wait for it still are told so."""
        phase = self._rounds.phase(uid)
        effects = self._fail_all(uid, {self._rank: unanswered(self._rank, phase)}, now) if phase else []
        self._reached.pop(uid, None)
        self._failed.pop(uid, None)
        # last, since a uid that is over can't fail any more
        self._over[uid] = None
        return self._to_listeners([*effects, *self._call(self._sync_points.over(uid))])

    def _to_listeners(self, effects: list[Effect]) -> list[Effect]:
        """Without what is meant for ranks that read nothing any more."""
        deaf = self._gone.keys() - {self._rank}
        return [effect for effect in effects if not (isinstance(effect, Send) and effect.rank in deaf)]
