"""Ranks agree by keyed messages on their process group's store, never by collectives.

Enters: exchanges, failures and cancellations of this rank. Leaves: the coordinator's answers, or
RemoteFailure on every other rank. Invariant: nothing waits for ever. A rank that does not call is named after
``Timeouts.coordination``, so is one whose heartbeat stands still for as long, and a store that is gone ends
all waits. Source: docs/adr/0010.

All that this rank hears goes through one inbox, ``StoreCoordinator._hear``: messages of other ranks, words of
its own threads and heartbeat, and, on the coordinator, its own messages, which take no way over the store.
The ``Ledger`` judges what ranks send; what follows from it is carried out here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Literal, Never, TypeVar, cast

import anyio
import torch.distributed as dist
import xxhash

from .._foreign import Activity
from ..errors import EngineStateError
from ..options import Timeouts
from .alarm import Alarm
from .connection import Connection
from .failures import RemoteError, silent, stood_still
from .ledger import Ledger
from .messages import (
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
    Left,
    Message,
    Missed,
    Refused,
    Send,
    Settled,
    Silent,
    Stopped,
    StoreGone,
    SyncCalled,
    SyncRequested,
    Tick,
    ToCoordinator,
)
from .recent import Recent
from .settlement import Verdict
from .sync_points import SyncCalls
from .waiters import Waiters, raiser

_SETTLE_SECONDS = 3.0
"""How long the ranks' errors wait for a rank that hangs to say that it has stopped."""

M = TypeVar("M")
A = TypeVar("A")


class StoreCoordinator:
    """The coordinator protocol among the ranks of a process group; of use on the engine's loop alone.

    Never closes the group or its store. Ranks are those within the group; messages are plain data.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        *,
        coordinator_rank: int,
        timeouts: Timeouts,
        digest: str,
        missed: Callable[[int, str], object] = lambda ordinal, name: None,
    ) -> None:
        """``digest`` stands for all that ranks have to configure alike; ``open()`` compares it. ``missed`` is
        told, on the loop, the ordinal and name of what the others gave up waiting for this rank to begin."""
        self.rank = process_group.rank()
        self.world_size = process_group.size()
        if not 0 <= coordinator_rank < self.world_size:
            raise ValueError(f"coordinator_rank is one of 0 to {self.world_size - 1}, not {coordinator_rank}")
        self.coordinator_rank = coordinator_rank
        self.is_coordinator = self.rank == coordinator_rank
        self.coordinator_host = ""
        self.activity = Activity()
        self.sync_calls = SyncCalls()
        self._connection = Connection(process_group, coordinator_rank=coordinator_rank)
        self._timeouts, self._digest, self._missed = timeouts, digest, missed
        self._patience = min(timeouts.coordination / 4, _SETTLE_SECONDS)
        self._state: Literal["new", "open", "closing", "closed"] = "new"
        self._waiters = Waiters()
        self._verdicts: dict[str, asyncio.Future[Verdict]] = {}
        self._known: Recent[str, tuple[int, str]] = Recent()
        """What each uid of this rank's stands for: ordinal and name."""
        self._answered: dict[str, str] = {}
        """By uid, the phase that the coordinator answered last."""
        self._ledger: Ledger | None = None
        """On the coordinator."""
        self._alarm: Alarm
        """When the ledger has to look again; from ``open`` on."""
        self._told_busy = False

    def __repr__(self) -> str:
        return f"<StoreCoordinator rank {self.rank} of {self.world_size} {self._state}>"

    @property
    def sent(self) -> int:
        """Messages that this rank sent since ``open()``."""
        return self._connection.sent

    @property
    def received(self) -> int:
        """Messages that this rank received since ``open()``."""
        return self._connection.received

    @property
    def num_remembered(self) -> int:
        """Entries in all tables that must not grow with saves that are over."""
        mine = self._waiters.num_remembered + len(self._known) + len(self._answered) + len(self._verdicts)
        return mine + (self._ledger.num_remembered if self._ledger is not None else 0)

    async def open(self) -> None:
        """Meet the other ranks, agree on a nonce, compare digests.

        Ranks: all must call it; with several engines on one group, one after another, in the same order.
        Raises: EngineStateError, on every rank that waits, for ranks that configured the engine otherwise,
        ranks that are missing after ``Timeouts.coordination``, and a store that can't be cloned.
        Cancellation: the rank withdraws; it may open another engine.
        """
        if self._state != "new":
            raise EngineStateError(f"this coordinator is {self._state}")
        self._loop = asyncio.get_running_loop()
        self._alarm = Alarm(self._loop, lambda now: self._judge(lambda ledger, _: ledger.tick(now)))
        timeout = self._timeouts.coordination
        try:
            await self._connection.open(digest=self._digest, seconds=timeout)
        except BaseException:
            self._state = "closed"
            raise
        if self.is_coordinator:
            self._ledger = Ledger(
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
                patience=self._patience,
                gap_seconds=self._connection.heartbeat.interval,
            )
        self.coordinator_host = self._connection.coordinator_host
        self._state = "open"
        self._connection.start(self._hear, self._watched)
        self._sender = self._connection.sender

    def uid(self, ordinal: int, name: str, variant: str = "") -> str:
        """The id of one save or load. Its first message tells the coordinator ``ordinal`` and ``name``, which
        may differ in nothing between the ranks: one series of ordinals for all that one engine exchanges."""
        uid = xxhash.xxh3_64_hexdigest(f"{self._connection.nonce}/{ordinal}/{name}/{variant}".encode())
        self._known[uid] = (ordinal, name)
        return uid

    # What this rank does.

    async def exchange(
        self, uid: str, phase: str, message: M, decide: Callable[[Sequence[M]], Awaitable[Sequence[A]]]
    ) -> A:
        """Send ``message``; ``decide``, on the coordinator, makes of all, by rank, an answer for each rank.

        Ranks: all must call it, with the same ``uid`` and ``phase``. In phase "verdict" all have to within
        ``Timeouts.coordination`` of the first.
        Raises: RemoteFailure when ``uid`` failed elsewhere, ``decide`` raised (as itself on the
        coordinator), a rank is lost or missing; ValueError for what is no plain data; EngineStateError when
        the store or the coordinator is gone.
        A coordinator that stood still itself for so long fails ``uid`` rather than decide for ranks that may
        have given up on it.
        Cancellation: other ranks wait on until ``fail`` tells them. While ``decide`` runs, failures of other
        ranks wait for its end: the answers come first. Once it has returned, its answers go out whatever
        happens.
        """
        self._check_open()
        with self._waiters.waiting(uid, phase) as waiter:
            ordinal, name = self._known.get(uid, (None, ""))
            self._tell_coordinator(
                Contribution(rank=self.rank, uid=uid, phase=phase, ordinal=ordinal, name=name, value=message)
            )
            answer = (await waiter)()
        if self._ledger is None:
            return cast(A, answer)
        try:
            self.check_steady(phase)
        except RemoteError as error:
            self._follow(self._ledger.fail(uid, {self.rank: error}, self._loop.time()))
            self._waiters.check(uid)
        with self._deciding(self._ledger, uid, phase):
            answers = list(await decide(answer))
            if len(answers) != self.world_size:
                raise ValueError(f"{len(answers)} answers for {self.world_size} ranks")
            # a decision that was made is told, also by a save that was cancelled meanwhile
            with anyio.CancelScope(shield=True):
                await self._sender.send_answers(uid, phase, answers)
        return answers[self.rank]

    @contextlib.contextmanager
    def _deciding(self, ledger: Ledger, uid: str, phase: str) -> Iterator[None]:
        """Failures of ``uid`` wait; what is raised inside comes first among them."""
        ledger.begin_decision(uid)
        raised: RemoteError | None = None
        try:
            yield
        except BaseException as error:
            raised = RemoteError.of(phase, error)
            raise
        finally:
            self._follow(ledger.end_decision(uid, raised, self._loop.time()))

    def check_steady(self, phase: str) -> None:
        if not self._connection.heartbeat.steady(self._loop.time()):
            raise stood_still(self.rank, phase, self._timeouts.coordination)

    def fail(self, uid: str, phase: str, error: BaseException) -> None:
        """Tell every other rank that this rank's part of ``uid`` failed, or was cancelled; does not wait.

        Told once, and not at all what the other ranks know: a RemoteFailure that they have as well.
        """
        known = self._waiters.failure(uid)
        if self._state != "open" or self._waiters.is_over(uid) or (known is not None and known.common):
            return
        failures = {self.rank: RemoteError.of(phase, error)}
        if not self.is_coordinator:
            if known is not None:
                return  # the coordinator was told, or told this rank
            self._waiters.fail(uid, failures, common=False)
        self._tell_coordinator(FailureReport(reporter=self.rank, uid=uid, failures=failures))

    async def failed(self, uid: str) -> Never:
        """Wait until another rank has failed ``uid``. Raises as ``exchange`` does."""
        self._check_open()
        with self._waiters.waiting(uid, None) as waiter:
            (await waiter)()
        raise AssertionError("failures alone end this wait")

    def has_failed(self, uid: str) -> bool:
        return self._waiters.failure(uid) is not None

    async def settle(self, uid: str, *, flag: bool = False) -> Verdict:
        """How ``uid`` ended, the same on every rank but for one that can't be heard, which goes by what it
        knows itself."""
        known = self._waiters.failure(uid)
        # a rank that gave up on the coordinator has nobody to ask
        mine: Verdict = (dict(known.failures) if known else {}, flag)
        is_lost = known and not known.common and self.coordinator_rank in known.failures
        if self._state != "open" or (is_lost and not self.is_coordinator):
            return mine
        verdict: asyncio.Future[Verdict] = self._verdicts.setdefault(uid, self._loop.create_future())
        self._tell_coordinator(Stopped(rank=self.rank, uid=uid, flag=flag))
        waits: set[asyncio.Future[Any]] = {verdict, self._connection.released}
        # longer than the coordinator waits for a rank that hangs, twice, or ranks would go by what each knows
        limit = 2 * self._patience + 1
        try:
            await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._verdicts.pop(uid, None)  # a verdict that comes later finds nobody
        return verdict.result() if verdict.done() else mine

    def request_sync_point(self, why: str, stop: bool, seconds: float) -> None:
        """Have the coordinator call all ranks, if it has not; it does not matter whether it can be told."""
        if self._state == "open":
            self._tell_coordinator(SyncRequested(why=why, stop=stop, seconds=seconds))

    def forget(self, uid: str) -> None:
        """``uid`` is over on this rank; what still comes of it is dropped."""
        if self._ledger is not None:
            # who still waits is told before this rank's own waiters forget that there was anything
            self._follow(self._ledger.forget(uid, self._loop.time()))
        self._known.pop(uid, None)
        self._answered.pop(uid, None)
        self._waiters.forget(uid)

    def _check_open(self) -> None:
        if self._state != "open":
            raise EngineStateError(f"the coordination with other ranks is {self._state}")

    def _tell_coordinator(self, message: ToCoordinator) -> None:
        if self.is_coordinator:
            self._hear(message)
        else:
            self._sender.send_in(message)

    # What this rank hears.

    def _hear(self, message: Message) -> None:
        """The inbox: all that changes what this rank knows of the others, in the order in which it came."""
        if self._state == "closed":
            return  # what was on its way when the threads ended
        match message:
            case Contribution() | FailureReport() | Busy() | Stopped() | SyncRequested() | Goodbye():
                if isinstance(message, Goodbye):
                    self._connection.part(message)
                self._judge(lambda ledger, now: ledger.hear(message, now))
            case Gathered():
                if not self._waiters.answer(message.uid, message.phase, lambda: message.values):
                    self._judge(lambda ledger, now: ledger.undecided(message, now))
            case Answer():
                if self._waiters.answer(message.uid, message.phase, lambda: message.answer):
                    self._answered[message.uid] = message.phase
            case Failed():
                self._waiters.fail(message.uid, message.failures, common=True)
            case Settled():
                waiter = self._verdicts.get(message.uid)
                if waiter is not None and not waiter.done():
                    waiter.set_result((dict(message.failures), message.flag))
            case SyncCalled():
                self.sync_calls.put(message)
            case Missed():
                self._missed(message.ordinal, message.name)
            case Left():
                self._waiters.end(lambda: EngineStateError(message.reason))
                self._connection.stop_waiting()
            case Refused():
                self._waiters.answer(message.uid, message.phase, raiser(lambda: ValueError(message.reason)))
            case GapChecked():
                self._judge(lambda ledger, now: ledger.gap_checked(message, now))
            case Silent():
                self._lose(message)
            case Tick():
                self._tell_activity()
            case StoreGone():
                self._release(message.why)

    def _judge(self, judge: Callable[[Ledger, float], list[Effect]]) -> None:
        assert self._ledger is not None, "only the coordinator's box has these messages"
        self._follow(judge(self._ledger, self._loop.time()))

    def _follow(self, effects: list[Effect]) -> None:
        """Carry out what the ledger says, and have it look again when something is due."""
        if self._state == "closed":
            return  # nobody can be told any more
        for effect in effects:
            match effect:
                case Send(rank=self.rank):
                    self._hear(effect.message)
                case Send():
                    assert not isinstance(effect.message, Gathered)
                    self._sender.send_out(effect.rank, effect.message)
                case CheckGap():
                    self._sender.skip_gap(effect)
        assert self._ledger is not None
        self._alarm.set(self._ledger.next_deadline())

    # Silence.

    def _watched(self) -> list[int]:
        """Those whose silence concerns anybody now."""
        if self._ledger is None:
            return [self.coordinator_rank] if self._waiters.uids else []
        if not self._waiters.uids and not self._ledger.num_rounds and self._state == "open":
            return []
        unwatched = {self.rank, *self._connection.unread}
        return [rank for rank in range(self.world_size) if rank not in unwatched]

    def _tell_activity(self) -> None:
        """Code of the trainer's that takes long is told to the coordinator at each beat, and its end."""
        call = self.activity.oldest()
        is_busy = call is not None and call[1] >= self._connection.heartbeat.interval
        if is_busy or self._told_busy:
            text, seconds = call if call is not None and is_busy else ("", 0.0)
            self._told_busy = is_busy
            self._tell_coordinator(Busy(rank=self.rank, text=text, seconds=seconds))
        if self._ledger is not None:  # those that told of theirs may have been busy for too long by now
            self._judge(lambda ledger, now: ledger.tick(now))

    def _lose(self, message: Silent) -> None:
        """Ranks are silent: what waits for them fails."""
        if self._ledger is not None:
            # one that died while it sent must not keep the messages behind its own unread
            self._sender.skip_gap()
            self._judge(lambda ledger, now: ledger.silent(message, self._waiters.uids, now))
            self._connection.give_up_on(message.ranks)  # they will say no goodbye
            return
        for uid in self._waiters.uids:
            answered, waited_for = self._answered.get(uid), self._waiters.phase(uid) or "open"
            failures = {rank: silent(rank, message.why, answered, waited_for) for rank in message.ranks}
            self._waiters.fail(uid, failures, common=False)
            # in case it only slept: this rank has given up
            self._sender.send_in(FailureReport(reporter=self.rank, uid=uid, failures=failures))

    # Leaving.

    async def close(self) -> None:
        """Leave. The coordinator and rank 0 of the job, which hosts the store, stay until all ranks have
        left, or ``Timeouts.exit_grace``. Cancellation: leaves at once."""
        if self._state != "open":
            return
        self._state = "closing"
        self.sync_calls.end()
        self._waiters.end(lambda: EngineStateError("the engine is closed"))
        if self._ledger is not None:
            self._judge(lambda ledger, now: ledger.leave(now))
        try:
            await self._connection.close(grace=self._timeouts.exit_grace)
        finally:
            self._alarm.set(None)
            self._state = "closed"

    def abandon(self) -> None:
        """Every wait ends, and ``close()`` waits for nobody: the process must end now."""
        if self._state in ("open", "closing"):
            self._connection.abandon()
            self._release("the engine was told to end at once")

    def _release(self, why: str) -> None:
        """Nothing will be sent or received any more."""
        self.sync_calls.end()
        self._waiters.end(lambda: EngineStateError(why))
        self._connection.release()
