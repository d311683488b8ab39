"""Rounds: which rank has sent what in which phase of which save.

Enters: contributions, one a rank. Leaves: rounds that are complete, overdue or lack ranks. Invariant: a round
exists from its first contribution until it is complete or its save failed; nothing else keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any

from .messages import Contribution


@dataclass(slots=True, kw_only=True)
class Round:
    """One phase of one save that ranks are waited for in."""

    uid: str
    phase: str
    ordinal: int | None
    name: str
    deadline: float | None = None
    """By which all have to be there, on the clock of whoever owns the round; None without one."""
    values: dict[int, Any] = field(default_factory=dict)
    """What each rank sent."""

    def lacking(self, ranks: Set[int]) -> list[int]:
        """Those of ``ranks`` that have not contributed."""
        # by looking up each: a difference of sets goes over all that have contributed
        return sorted(rank for rank in ranks if rank not in self.values)


class Rounds:
    """The coordinator's rounds, all in flight at once."""

    def __init__(self) -> None:
        self._rounds: dict[tuple[str, str], Round] = {}

    def __repr__(self) -> str:
        return f"<Rounds {[(*key, sorted(gathered.values)) for key, gathered in self._rounds.items()]}>"

    def __len__(self) -> int:
        return len(self._rounds)

    def __iter__(self) -> Iterator[Round]:
        """Over those that are in flight now, whatever is dropped meanwhile."""
        # a copy, since what is found out about a round may drop it, and others of its save
        return iter(list(self._rounds.values()))

    def find(self, uid: str, phase: str) -> Round | None:
        """The round, if anybody has begun it and waits in it."""
        return self._rounds.get((uid, phase))

    def phase(self, uid: str) -> str | None:
        """The first phase in which ranks wait for others with ``uid``."""
        # a scan, for there are as many as saves in flight: few
        return next((phase for other, phase in self._rounds if other == uid), None)

    def add(self, sent: Contribution) -> Round:
        """The round that ``sent`` belongs to, with it."""
        key = sent.uid, sent.phase
        gathered = self._rounds.get(key)
        if gathered is None:
            # the first to come names it: that all mean the same call was compared before
            gathered = self._rounds[key] = Round(
                uid=sent.uid, phase=sent.phase, ordinal=sent.ordinal, name=sent.name
            )
        gathered.values[sent.rank] = sent.value
        return gathered

    def drop(self, uid: str, phase: str | None = None) -> None:
        """Nobody is waited for with ``uid`` any more, in ``phase`` or in any."""
        for key in [key for key in self._rounds if key[0] == uid and phase in (None, key[1])]:
            del self._rounds[key]

    def overdue(self, now: float) -> list[Round]:
        """Those whose deadline is over; each is told once."""
        late = [
            gathered
            for gathered in self._rounds.values()
            if gathered.deadline is not None and gathered.deadline <= now
        ]
        for gathered in late:
            # the round itself stays: who owns it may give it a moment more
            gathered.deadline = None
        return late

    def deadlines(self) -> list[float]:
        """When ``overdue`` has to be asked."""
        return [gathered.deadline for gathered in self._rounds.values() if gathered.deadline is not None]
