"""Heartbeats: how long other ranks have stood still, and whether this one has.

Enters: when beats were asked for, and what the store answered. Leaves: ranks that show no sign of life.
Invariant: stillness is counted in ticks that this process lived through, so that a suspended machine does not
find everybody dead when it wakes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .messages import Silent


def heartbeat_key(nonce: str, rank: int) -> str:
    """The key of a rank's heartbeat."""
    return f"{nonce}/hb/{rank}"


class Heartbeat:
    """One rank's view of the others; a rank that moves again after it was reported is as good as before.

    Times are seconds of one clock, given with each call.
    """

    def __init__(self, *, timeout: float, now: float) -> None:
        """``timeout``: for how many seconds a rank may stand still."""
        self.interval = min(timeout / 5, 5.0)
        """Seconds between beats."""
        self._timeout = timeout
        # others count from a moment that may lie before the beat that this rank remembers, so it must doubt
        # itself before they may give up
        self._patience = timeout - self.interval
        self._beats: dict[int, int] = {}
        self._still: dict[int, float] = {}
        self._asked = self._seen = self._counted = now
        self._suspect_until = now

    def __repr__(self) -> str:
        return f"<Heartbeat still={self._still}>"

    def steady(self, now: float) -> bool:
        """Whether no other rank can have given up on this one: it has not stood still itself for as long.

        After a standstill one more interval is suspect, in which the word of those who gave up arrives.
        """
        return now - self._seen < self._patience and now >= self._suspect_until

    def ask(self, now: float) -> None:
        """The store is about to be given this rank's beat and asked for others'."""
        self._asked = now

    def answered(self, beats: Mapping[int, int], now: float) -> Silent | None:
        """``beats`` by rank, of those that are watched. Tells, tick after tick, who has not moved for the
        timeout."""
        if now - self._seen >= self._patience:
            self._suspect_until = now + self.interval
        # others may have seen the beat as early as it was asked for, and count from then
        self._seen = self._asked
        # a process that was suspended lived through one tick, however late that came
        passed, self._counted = min(now - self._counted, 2 * self.interval), now
        for rank, beat in beats.items():
            still = self._still.get(rank, 0.0) + passed if self._beats.get(rank) == beat else 0.0
            self._beats[rank], self._still[rank] = beat, still
        silent = frozenset(rank for rank in beats if self._still[rank] >= self._timeout)
        if not silent:
            return None
        return Silent(ranks=silent, why=f"has shown no sign of life for {self._timeout:g} s")

    def unanswered(self, watched: Iterable[int], waited: float) -> Silent | None:
        """The store has not answered for ``waited`` seconds, and may go on later: its process is stopped."""
        if waited < self._timeout:
            return None
        return Silent(
            ranks=frozenset(watched),
            why=f"can't be heard: the process group's store has not answered for {self._timeout:g} s, so "
            "the process that hosts it (rank 0's, or the launcher's) is stopped or out of reach",
        )
