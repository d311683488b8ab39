"""What the engine's loop sends through its channel, without ever waiting in it.

Enters: messages by kind. Leaves: the same in the boxes, or word of why they could not be sent. Invariant: the
order of sending is the order of calls; a store that is gone is reported once for each call, on the loop.

Keys of an engine, under its nonce: "in" (all ranks to the coordinator), "out/{rank}" (the coordinator to one
rank), "hb/{rank}" (heartbeats).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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
        refused: Callable[[tuple[str, str], ValueError], object],
        gone: Callable[[str], None],
    ) -> None:
        """``refused`` is told the (uid, phase) of a message that is no plain data, ``gone`` what else
        fails."""
        self.inbox = f"{nonce}/in"
        self._channel, self._nonce, self._rank, self._released = channel, nonce, rank, released
        self._refused, self._gone = refused, gone
        self._loop = released.get_loop()

    def outbox(self, rank: int) -> str:
        """The box that ``rank`` reads."""
        return f"{self._nonce}/out/{rank}"

    def send_in(self, kind: str, *fields: object, exchange: tuple[str, str] | None = None) -> None:
        """To the coordinator; ``exchange`` is the (uid, phase) of who waits for an answer."""
        call = self._channel.post_with(self._channel.send_shared, self.inbox, (kind, self._rank, *fields))
        call.add_done_callback(lambda done: self.watch(done, exchange))

    def send_out(self, rank: int, *message: object) -> None:
        """To one rank, from the coordinator."""
        self._channel.post_with(self._channel.send, self.outbox(rank), message).add_done_callback(self.watch)

    async def send_answers(self, uid: str, phase: str, answers: Sequence[object]) -> None:
        """To each rank but this one its own. Raises ValueError before any is sent, StoreGoneError."""
        common: dict[int, tuple[object, ...]] = {}  # one answer for many ranks is encoded once
        letters = [
            (self.outbox(rank), common.setdefault(id(answer), ("answer", uid, phase, answer)))
            for rank, answer in enumerate(answers)
            if rank != self._rank
        ]
        await self.call(self._channel.send_each, letters)

    def skip_gap(self, then: Callable[[bool], None] | None = None) -> None:
        """``StoreChannel.skip_gap``; ``then`` is told on the loop what came of it."""

        def ended(done: concurrent.futures.Future[bool]) -> None:
            self.watch(done)
            if then is not None and not done.cancelled() and done.exception() is None:
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(then, done.result())

        self._channel.post_with(self._channel.skip_gap).add_done_callback(ended)

    async def call(self, fn: Callable[..., T], *args: object) -> T:
        """The result of a call to the store, in order with what is sent. Raises StoreGoneError, also when
        nobody waits for the store any more."""
        call = asyncio.wrap_future(self._channel.post_with(fn, *args))
        call.add_done_callback(lambda done: done.cancelled() or done.exception())
        waits: set[asyncio.Future[Any]] = {call, self._released}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            raise StoreGoneError("the process group's store does not answer")
        return call.result()

    def watch(self, done: concurrent.futures.Future[Any], exchange: tuple[str, str] | None = None) -> None:
        """Report why ``done`` failed, if it did; a callback for any thread."""
        if not done.cancelled() and (error := done.exception()) is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._report, error, exchange)

    def _report(self, error: BaseException, exchange: tuple[str, str] | None) -> None:
        if exchange is not None and isinstance(error, ValueError):
            self._refused(exchange, error)
        else:
            self._gone(str(error))
