"""Heartbeats: this rank's own, and how long others' have stood still.

Enters: whom to watch at the moment. Leaves: ranks that show no sign of life. Invariant: stillness is counted
in ticks that this process lived through, so that a suspended machine does not find everybody dead when it
wakes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from .store_channel import StoreChannel, StoreGoneError


def heartbeat_key(nonce: str, rank: int) -> str:
    """The key of a rank's heartbeat."""
    return f"{nonce}/hb/{rank}"


class Heartbeat:
    """Beats while ``run`` runs. A rank that moves again after it was reported is as good as before."""

    def __init__(
        self,
        *,
        channel: StoreChannel,
        nonce: str,
        rank: int,
        timeout: float,
        watched: Callable[[], Iterable[int]],
        silent: Callable[[set[int], str], None],
        gone: Callable[[StoreGoneError], None],
        ticked: Callable[[], None] = lambda: None,
    ) -> None:
        """``watched`` says whose heartbeats to read, asked at each tick; ``silent`` is told, tick after
        tick, who of them has not moved for ``timeout`` seconds, and how to say so; ``gone`` that the store
        is; ``ticked`` is called at each tick."""
        self.interval = min(timeout / 5, 5.0)
        # others count from a moment that may lie before the beat that this rank remembers, so it must doubt
        # itself before they may give up
        self._patience = timeout - self.interval
        self._channel, self._nonce, self._rank, self._timeout = channel, nonce, rank, timeout
        self._watched, self._silent, self._gone, self._ticked = watched, silent, gone, ticked
        self._beats: dict[int, int] = {}
        self._still: dict[int, float] = {}
        self._last = asyncio.get_running_loop().time()
        self._suspect_until = 0.0

    def __repr__(self) -> str:
        return f"<Heartbeat of rank {self._rank} still={self._still}>"

    def steady(self) -> bool:
        """Whether no other rank can have given up on this one: it has not stood still itself for as long.

        After a standstill one more interval is suspect, in which the word of those who gave up arrives.
        """
        now = asyncio.get_running_loop().time()
        return now - self._last < self._patience and now >= self._suspect_until

    async def run(self) -> None:
        """Until cancelled, or the store is gone."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            ranks = sorted(self._watched())
            asked = loop.time()
            try:
                beats = await self._beat(ranks)
            except StoreGoneError as error:
                self._gone(error)
                return
            now = loop.time()
            if now - self._last >= self._patience:
                self._suspect_until = now + self.interval
            self._last = asked  # the beat may have been seen as early as that
            passed, last = min(now - last, 2 * self.interval), now
            for rank, beat in zip(ranks, beats, strict=True):
                still = self._still.get(rank, 0.0) + passed if self._beats.get(rank) == beat else 0.0
                self._beats[rank], self._still[rank] = beat, still
            silent = {rank for rank in ranks if self._still[rank] >= self._timeout}
            if silent:
                self._silent(silent, f"has shown no sign of life for {self._timeout:g} s")
            self._ticked()
            await asyncio.sleep(self.interval)

    async def _beat(self, ranks: list[int]) -> list[int]:
        keys = [heartbeat_key(self._nonce, rank) for rank in ranks]
        call = self._channel.post_with(self._channel.beat, heartbeat_key(self._nonce, self._rank), keys)
        waiter = asyncio.wrap_future(call)
        waiter.add_done_callback(lambda done: done.cancelled() or done.exception())
        waited = 0.0
        while not call.done():
            await asyncio.wait({waiter}, timeout=self.interval)
            waited += self.interval
            if not call.done() and waited >= self._timeout:
                # a stopped process answers nobody, and it may go on later
                self._silent(
                    set(self._watched()),
                    f"can't be heard: the process group's store has not answered for {self._timeout:g} s, so "
                    "the process that hosts it (rank 0's, or the launcher's) is stopped or out of reach",
                )
        return call.result()
