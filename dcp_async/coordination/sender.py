"""What the engine's loop sends through its store channel, without ever waiting in it.

Enters: messages. Leaves: the same in the boxes, or word to this rank of why they could not be sent.
Invariant: the order of sending is the order of calls; a store that is gone is reported once for each call, on
the loop.

Keys of an engine, under its nonce: "in" (all ranks to the coordinator), "out/{rank}" (the coordinator to one
rank), "hb/{rank}" (heartbeats).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .heartbeat import heartbeat_key
from .messages import (
    Answer,
    CheckGap,
    Contribution,
    GapChecked,
    Local,
    Refused,
    StoreGone,
    ToCoordinator,
    ToRank,
    to_plain,
)
from .store_channel import StoreChannel, StoreGoneError

T = TypeVar("T")


class Sender:
    """One rank's. ``released`` is the loop's future that ends all waits for the store."""

    def __init__(
        self,
        *,
        channel: StoreChannel,
        nonce: str,
        rank: int,
        released: asyncio.Future[None],
        hear: Callable[[Local], None],
    ) -> None:
        """``hear`` is the inbox of the rank, called on its loop."""
        self.inbox = f"{nonce}/in"
        self._channel, self._nonce, self._rank, self._released = channel, nonce, rank, released
        self._hear = hear
        self._loop = released.get_loop()
        self._told: tuple[ToRank, tuple[Any, ...]] | None = None
        """What was sent out last, and the same as plain data."""

    def outbox(self, rank: int) -> str:
        """The box that ``rank`` reads."""
        return f"{self._nonce}/out/{rank}"

    def send_in(self, message: ToCoordinator) -> None:
        """To the coordinator."""
        call = self._channel.post_with(self._channel.send_shared, self.inbox, to_plain(message))
        if isinstance(message, Contribution):
            # the value is the caller's, who waits for an answer and can be told that this one can't be sent
            call.add_done_callback(lambda done: self.watch(done, message))
        else:
            call.add_done_callback(self.watch)

    def send_out(self, rank: int, message: ToRank) -> None:
        """To one rank, from the coordinator."""
        # a failure is one message to all ranks, and may name each of them
        if self._told is None or self._told[0] is not message:
            self._told = message, to_plain(message)
        # the box has one writer, which numbers it without asking the store: one trip per message
        call = self._channel.post_with(self._channel.send, self.outbox(rank), self._told[1])
        call.add_done_callback(self.watch)

    async def send_answers(self, uid: str, phase: str, answers: Sequence[object]) -> None:
        """To each rank but this one its own. Raises ValueError before any is sent, StoreGoneError."""
        common: dict[int, tuple[object, ...]] = {}  # one answer for many ranks is encoded once
        letters = []
        for rank, answer in enumerate(answers):
            if id(answer) not in common:
                common[id(answer)] = to_plain(Answer(uid=uid, phase=phase, answer=answer))
            if rank != self._rank:
                letters.append((self.outbox(rank), common[id(answer)]))
        await self.call(self._channel.send_each, letters)

    def beat(self, ranks: Sequence[int]) -> asyncio.Future[list[int]]:
        """Move this rank's heartbeat and read those of ``ranks``. The result may raise StoreGoneError."""
        beats = [heartbeat_key(self._nonce, rank) for rank in ranks]
        return self._wrapped(self._channel.beat, heartbeat_key(self._nonce, self._rank), beats)

    def skip_gap(self, check: CheckGap | None = None) -> None:
        """``StoreChannel.skip_gap``; what came of it is heard where ``check`` asks for it."""

        def ended(done: concurrent.futures.Future[bool]) -> None:
            self.watch(done)
            if check is not None and not done.cancelled() and done.exception() is None:
                self._report(GapChecked(uid=check.uid, phase=check.phase, skipped=done.result()))

        # by the thread that posts: the other one is blocked on the very key that is missing
        self._channel.post_with(self._channel.skip_gap).add_done_callback(ended)

    async def call(self, fn: Callable[..., T], *args: object) -> T:
        """The result of a call to the store, in order with what is sent. Raises StoreGoneError, also when
        nobody waits for the store any more."""
        call = self._wrapped(fn, *args)
        # a call inside of c10d can't be interrupted: the loop stops waiting, the thread goes on
        waits: set[asyncio.Future[Any]] = {call, self._released}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            # the thread hangs in the store; it is left behind by whoever closes the channel
            raise StoreGoneError("the process group's store does not answer")
        return call.result()

    def _wrapped(self, fn: Callable[..., T], *args: object) -> asyncio.Future[T]:
        call = asyncio.wrap_future(self._channel.post_with(fn, *args))
        # looked at here, or a wait that ended early would leave an error that nobody retrieved
        call.add_done_callback(lambda done: done.cancelled() or done.exception())
        return call

    def watch(self, done: concurrent.futures.Future[Any], sent: Contribution | None = None) -> None:
        """Report why ``done`` failed, if it did; a callback for any thread."""
        if done.cancelled() or (error := done.exception()) is None:
            return
        if sent is not None and isinstance(error, ValueError):
            self._report(Refused(uid=sent.uid, phase=sent.phase, reason=str(error)))
        else:
            self._report(StoreGone(why=str(error)))

    def _report(self, message: Local) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._hear, message)
