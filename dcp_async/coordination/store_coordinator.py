"""Ranks agree by keyed messages on their process group's store, never by collectives.

Enters: exchanges, failures and cancellations of this rank. Leaves: the coordinator's answers, or
RemoteFailure on every other rank. Invariant: nothing waits for ever. A rank that does not call is named after
``Timeouts.coordination``, so is one whose heartbeat stands still for as long, and a store that is gone ends
all waits. Source: design.md 5.7 to 5.9.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence, Set
from typing import Any, Literal, Never, TypeVar, cast

import anyio
import torch.distributed as dist
import xxhash

from .._concurrency import settle
from .._foreign import Activity
from ..errors import EngineStateError
from ..options import Timeouts
from .failures import RemoteError
from .heartbeat import Heartbeat, heartbeat_key
from .rendezvous import Rendezvous
from .rounds import Rounds, stood_still, stopped, unanswered
from .sender import Sender
from .settlement import Settlement, Verdict
from .store_channel import StoreChannel, StoreGoneError, Woken
from .waiters import REMEMBERED, Waiters, raiser

logger = logging.getLogger(__name__)

_SETTLE_SECONDS = 3.0
"""How long the ranks' errors wait for a rank that hangs to say that it has stopped."""

M = TypeVar("M")
A = TypeVar("A")


class StoreCoordinator:
    """The coordinator protocol among the ranks of a process group; of use on the engine's loop alone.

    Owns two threads and two clones of the group's store, from ``open()`` to ``close()``; never closes the
    group's store or the group. Ranks are those within the group. Messages and answers are plain data, see
    ``plain``. What the coordinator tells itself is no message.
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
        self._group: dist.ProcessGroup | None = process_group
        # usually hosts the store, unless the launcher does: then it waits for the others without need
        self._is_host = dist.is_initialized() and dist.get_rank() == 0
        self._timeouts = timeouts
        self._digest = digest
        self._missed = missed
        self._state: Literal["new", "open", "closing", "closed"] = "new"
        self._waiters = Waiters()
        self._known: OrderedDict[str, tuple[int, str]] = OrderedDict()
        self._rounds = Rounds(
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeouts.coordination,
            complete=self._completed,
            failed=self._tell_failure,
            late=self._report_missing,
            noted=lambda uid, failures: self._settlement.failed(uid, failures),
            waiters=self._waiters,
        )
        patience = min(timeouts.coordination / 4, _SETTLE_SECONDS)
        self._settlement = Settlement(
            world_size=self.world_size,
            patience=patience,
            tell=self._tell_verdict,
            gone=self._rounds.gone,
        )
        self._settle_seconds = 2 * patience + 1
        """Until a rank goes by what it knows itself."""
        self._verdicts: dict[str, asyncio.Future[Verdict]] = {}
        self._unread: dict[int, int | None] = {}
        """Of ranks that said goodbye: what they did not read, None for one that reads on until it is told to
        leave."""
        self._answered: dict[str, str] = {}
        """Of uids that this rank waits for: the phase that the coordinator answered last."""
        self.coordinator_host = ""
        self.activity = Activity()
        self._told_busy = False

    def __repr__(self) -> str:
        return f"<StoreCoordinator rank {self.rank} of {self.world_size} {self._state}>"

    @property
    def sent(self) -> int:
        """Messages that this rank sent since ``open()``."""
        return self._channel.sent

    @property
    def received(self) -> int:
        """Messages that this rank received since ``open()``."""
        return self._channel.received

    async def open(self) -> None:
        """Meet the other ranks, agree on a nonce, compare digests.

        Ranks: all must call it; with several engines on one group, one after another, in the same order.
        Raises: EngineStateError, on every rank that waits, for ranks that configured the engine otherwise,
        ranks that are missing after ``Timeouts.coordination``, and a store that can't be cloned.
        Cancellation: the rank withdraws; it may open another engine.
        """
        if self._state != "new":
            raise EngineStateError(f"this coordinator is {self._state}")
        assert self._group is not None
        self._loop = asyncio.get_running_loop()
        self._released: asyncio.Future[None] = self._loop.create_future()
        self._alone: asyncio.Future[None] = self._loop.create_future()
        try:
            store = self._group.get_group_store()
        except RuntimeError as error:
            raise EngineStateError(f"the process group has no store: {error}") from error
        self._channel = StoreChannel(store, "dcp_async")
        self._group = None
        meeting = Rendezvous(
            channel=self._channel,
            rank=self.rank,
            world_size=self.world_size,
            coordinator_rank=self.coordinator_rank,
            digest=self._digest,
            timeout=self._timeouts.coordination,
        )
        try:
            self._nonce, self.coordinator_host = await meeting.meet()
        except BaseException:
            self._state = "closed"
            self._channel.close()
            raise
        self._start()

    def _start(self) -> None:
        self._sender = Sender(
            channel=self._channel,
            nonce=self._nonce,
            rank=self.rank,
            released=self._released,
            refused=lambda key, error: self._waiters.answer(*key, raiser(lambda: ValueError(str(error)))),
            gone=self._release,
        )
        self._heartbeat = Heartbeat(
            channel=self._channel,
            nonce=self._nonce,
            rank=self.rank,
            timeout=self._timeouts.coordination,
            watched=self._watched,
            silent=self._lose,
            ticked=self._tell_activity,
            gone=lambda error: self._release(str(error)),
        )
        box = self._sender.inbox if self.is_coordinator else self._sender.outbox(self.rank)
        self._channel.read_from(box)
        self._channel.sent = self._channel.received = 0
        self._state = "open"
        self._reading = self._channel.wait_with(self._read)
        self._reading.add_done_callback(self._sender.watch)
        self._beating = self._loop.create_task(self._heartbeat.run())

    def uid(self, ordinal: int, name: str, variant: str = "") -> str:
        """The save's id, 16 hex digits, the same on every rank without a message. Its first message tells the
        coordinator ``ordinal`` and ``name``, which may differ in nothing between the ranks: one series of
        ordinals for all that one engine exchanges. ``variant`` tells one of a
        verb's several ids from others."""
        uid = xxhash.xxh3_64_hexdigest(f"{self._nonce}/{ordinal}/{name}/{variant}".encode())
        self._known[uid] = (ordinal, name)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return uid

    async def exchange(
        self, uid: str, phase: str, message: M, decide: Callable[[Sequence[M]], Awaitable[Sequence[A]]]
    ) -> A:
        """Send ``message``; the coordinator calls ``decide`` with all ranks' messages in rank order; each
        rank gets its answer.

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
            if self.is_coordinator:
                self._rounds.arrived(self.rank, uid, phase, ordinal, name, message)
            else:
                self._sender.send_in("message", uid, phase, ordinal, name, message, exchange=(uid, phase))
            answer = (await waiter)()
        if not self.is_coordinator:
            return cast(A, answer)
        try:
            self.check_steady(phase)
        except RemoteError as error:
            self._rounds.fail(uid, {self.rank: error})
            self._waiters.check(uid)
        with self._rounds.deciding(uid, phase):
            answers = list(await decide(answer))
            if len(answers) != self.world_size:
                raise ValueError(f"{len(answers)} answers for {self.world_size} ranks")
            # a decision that was made is told, also by a save that was cancelled meanwhile
            with anyio.CancelScope(shield=True):
                await self._sender.send_answers(uid, phase, answers)
        return answers[self.rank]

    def check_steady(self, phase: str) -> None:
        """To be called right before what can't be undone. Raises RemoteError if this process stood still for
        so long that others may have given up on it."""
        if not self._heartbeat.steady():
            raise stood_still(self.rank, phase, self._timeouts.coordination)

    def fail(self, uid: str, phase: str, error: BaseException) -> None:
        """Tell every other rank that this rank's part of ``uid`` failed, or was cancelled; does not wait.

        Told once, and not at all what the other ranks know: a RemoteFailure that they have as well.
        """
        known = self._waiters.failure(uid)
        if self._state != "open" or self._waiters.is_over(uid) or (known is not None and known.common):
            return
        failures = {self.rank: RemoteError.of(phase, error)}
        if self.is_coordinator:
            self._rounds.fail(uid, failures, reporter=self.rank)
        elif known is None:
            self._waiters.fail(uid, failures, common=False)
            self._sender.send_in("failure", uid, self.rank, failures[self.rank].plain())

    async def failed(self, uid: str) -> Never:
        """Wait until ``uid`` fails on another rank, or one is lost. Raises as ``exchange``."""
        self._check_open()
        with self._waiters.waiting(uid, None) as waiter:
            (await waiter)()
        raise AssertionError("failures alone end this wait")

    def has_failed(self, uid: str) -> bool:
        """Whether this rank knows that ``uid`` failed, and has not forgotten it."""
        return self._waiters.failure(uid) is not None

    async def settle(self, uid: str, *, flag: bool = False) -> Verdict:
        """How ``uid``, which failed, ended for all: the same on every rank, but for one that can't be heard.

        Ranks: all that have a part in ``uid`` call it once that has ended, and before ``forget``. ``flag``:
        whether this rank had gone past the point that the caller is interested in. Never raises.
        """
        known = self._waiters.failure(uid)
        mine: Verdict = (known.failures if known else {}, flag)
        is_lost = known and not known.common and self.coordinator_rank in known.failures
        if self._state != "open" or (is_lost and not self.is_coordinator):
            return mine
        verdict: asyncio.Future[Verdict] = self._verdicts.setdefault(uid, self._loop.create_future())
        if self.is_coordinator:
            self._settlement.stopped(self.rank, uid, flag)
        else:
            self._sender.send_in("stopped", uid, flag)
        waits: set[asyncio.Future[Any]] = {verdict, self._released}
        await asyncio.wait(waits, timeout=self._settle_seconds, return_when=asyncio.FIRST_COMPLETED)
        self._verdicts.pop(uid, None)
        return verdict.result() if verdict.done() else mine

    def _tell_verdict(self, rank: int, uid: str, verdict: Verdict) -> None:
        if rank == self.rank:
            self._hear_verdict(uid, verdict)
        elif rank not in self._unread:
            failures, flag = verdict
            told = {failed: error.plain() for failed, error in failures.items()}
            self._sender.send_out(rank, "verdict", uid, told, flag)

    def _hear_verdict(self, uid: str, verdict: Verdict) -> None:
        waiter = self._verdicts.get(uid)
        if waiter is not None and not waiter.done():
            waiter.set_result(verdict)

    def forget(self, uid: str) -> None:
        """``uid`` is over on this rank; what still comes of it is dropped."""
        if self.is_coordinator:
            self._rounds.forget(uid)
        self._known.pop(uid, None)
        self._answered.pop(uid, None)
        self._waiters.forget(uid)

    async def close(self) -> None:
        """Say goodbye. The coordinator and rank 0 of the job, which hosts the store, stay until all ranks
        did, or ``Timeouts.exit_grace``. Never raises for a store that is gone. No exchange may follow.

        Cancellation: leaves at once.
        """
        if self._state != "open":
            return
        self._state = "closing"
        self._waiters.end(lambda: EngineStateError("the engine is closed"))
        try:
            if self.is_coordinator:
                await self._leave_last()
            else:
                await self._leave()
        except StoreGoneError as error:
            logger.debug("left without a goodbye: %s", error)
        finally:
            self._beating.cancel()
            with anyio.CancelScope(shield=True):
                await self._channel.stop_taking(self._reading)
            self._rounds.close()
            self._settlement.close()
            self._channel.close()
            self._state = "closed"

    async def _leave(self) -> None:
        self._beating.cancel()  # or it would make a key anew that the coordinator deletes
        channel, sender = self._channel, self._sender
        if self._is_host:
            sender.send_in("goodbye", None)
            await asyncio.wait({self._alone}, timeout=self._timeouts.exit_grace)
        await channel.stop_taking(self._reading)
        await sender.call(channel.delete, [f"{sender.outbox(self.rank)}/{channel.unread}"])
        if not self._is_host:
            # the last that this rank does with the store, and known to have arrived: its host may leave now
            sender.send_in("goodbye", channel.unread)
            await sender.call(channel.add, sender.inbox, 0)

    async def _leave_last(self) -> None:
        channel, sender = self._channel, self._sender
        self._rounds.leave(f"rank {self.rank} closed its engine before the others did")
        self._note_goodbyes()
        await asyncio.wait({self._alone}, timeout=self._timeouts.exit_grace)
        self._beating.cancel()
        await channel.stop_taking(self._reading)
        if len(self._unread) == self.world_size - 1:
            last = await sender.call(channel.add, sender.inbox, 0)
            beats = [heartbeat_key(self._nonce, rank) for rank in range(self.world_size)]
            rest = [f"{sender.inbox}/{number}" for number in range(channel.unread, last + 2)]
            await sender.call(channel.delete, [*rest, sender.inbox, *beats])
        for rank in self._others():
            unread = self._unread.get(rank)
            if unread is not None:
                await sender.call(channel.delete_unread, sender.outbox(rank), unread)
            else:  # one that waits for this, or has not closed
                sender.send_out(rank, "left", f"rank {self.rank}, the coordinator, closed its engine")
        await sender.call(int)  # what was sent has been handed over

    def abandon(self) -> None:
        """For a process that must end now: every wait ends, ``close()`` waits for nobody."""
        if self._state in ("open", "closing"):
            self._channel.abandon()
            self._release("the engine was told to end at once")

    def _check_open(self) -> None:
        if self._state != "open":
            raise EngineStateError(f"the coordination with other ranks is {self._state}")

    # Receiving.

    def _read(self) -> None:
        """In the thread that waits."""
        with contextlib.suppress(Woken):
            while True:
                message = self._channel.take()
                self._loop.call_soon_threadsafe(self._hear, *message)

    def _hear(self, kind: str, *fields: Any) -> None:
        if kind == "message":
            self._rounds.arrived(*fields)
        elif kind == "answer":
            uid, phase, answer = fields
            if self._waiters.answer(uid, phase, lambda: answer):
                self._answered[uid] = phase
        elif kind == "failure" and self.is_coordinator:
            reporter, uid, rank, error = fields
            self._rounds.fail(uid, {rank: RemoteError.from_plain(error)}, reporter=reporter)
        elif kind == "failure":
            uid, failures = fields
            errors = {rank: RemoteError.from_plain(error) for rank, error in failures.items()}
            self._waiters.fail(uid, errors, common=True)
        elif kind == "busy":
            self._rounds.busy(*fields)
        elif kind == "stopped":
            self._settlement.stopped(*fields)
        elif kind == "verdict":
            uid, told, flag = fields
            self._hear_verdict(
                uid, ({rank: RemoteError.from_plain(error) for rank, error in told.items()}, flag)
            )
        elif kind == "missed":
            self._missed(*fields)
        elif kind == "goodbye":
            rank, self._unread[rank] = fields[0], fields[1]
            self._rounds.goodbye(rank, f"rank {rank} closed its engine")
            self._note_goodbyes()
        else:
            self._waiters.end(lambda: EngineStateError(fields[0]))
            settle(self._alone)

    def _note_goodbyes(self, lost: Set[int] = frozenset()) -> None:
        if self._state == "closing" and len(self._unread.keys() | lost) == self.world_size - 1:
            settle(self._alone)

    def _completed(self, uid: str, phase: str, messages: list[Any]) -> None:
        if not self._waiters.answer(uid, phase, lambda: messages):
            self._rounds.fail(uid, {self.rank: unanswered(self.rank, phase)})

    def _tell_failure(self, uid: str, failures: dict[int, RemoteError], reporter: int | None) -> None:
        self._waiters.fail(uid, failures, common=True)
        told = {rank: error.plain() for rank, error in failures.items()}
        for rank in self._others():
            if rank != reporter and rank not in self._unread:
                self._sender.send_out(rank, "failure", uid, told)

    # Silence.

    def _watched(self) -> list[int]:
        if not self.is_coordinator:
            return [self.coordinator_rank] if self._waiters.uids else []
        if not self._waiters.uids and not self._rounds and self._state == "open":
            return []
        return [rank for rank in self._others() if rank not in self._unread]

    def _tell_activity(self) -> None:
        """At each beat: code of the trainer's that takes long is told to the coordinator, and its end."""
        found = self.activity.oldest()
        if found is not None and found[1] < self._heartbeat.interval:
            found = None
        if found is None and not self._told_busy:
            if self.is_coordinator:
                self._rounds.check_busy()
            return
        self._told_busy = found is not None
        if self.is_coordinator:
            self._rounds.busy(self.rank, found)
        else:
            self._sender.send_in("busy", found)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def _lose(self, ranks: set[int], why: str) -> None:
        """``ranks`` are silent: what waits for them fails."""
        if self.is_coordinator:
            # one that died while it sent must not keep the messages behind its own unread
            self._sender.skip_gap()
            for uid in self._rounds.lacking(ranks) | set(self._waiters.uids):
                self._rounds.fail(uid, self._rounds.silent(uid, ranks, why))
            self._note_goodbyes(ranks)
            return
        for uid in self._waiters.uids:
            answered, waited_for = self._answered.get(uid), self._waiters.phase(uid) or "open"
            failures = {rank: stopped(rank, why, answered, waited_for) for rank in ranks}
            self._waiters.fail(uid, failures, common=False)
            # in case it only slept: this rank has given up
            for rank, error in failures.items():
                self._sender.send_in("failure", uid, rank, error.plain())

    def _report_missing(self, uid: str) -> None:
        """Ranks are overdue that have to begin ``uid``."""
        self._sender.skip_gap(lambda skipped: self._name_missing(uid, skipped))

    def _name_missing(self, uid: str, skipped: bool) -> None:
        if skipped:  # messages that were stuck behind a dead rank's get a moment to arrive
            self._loop.call_later(self._heartbeat.interval, self._name_missing, uid, False)
        elif failures := self._rounds.missing(uid):
            ordinal, name = self._rounds.begun(uid)
            for rank in failures:
                if ordinal is None:
                    continue
                if rank == self.rank:
                    self._missed(ordinal, name)
                elif rank not in self._unread:
                    self._sender.send_out(rank, "missed", ordinal, name)
            self._rounds.fail(uid, failures)

    def _release(self, why: str) -> None:
        """Nothing will be sent or received any more."""
        self._waiters.end(lambda: EngineStateError(why))
        settle(self._released)
        settle(self._alone)
