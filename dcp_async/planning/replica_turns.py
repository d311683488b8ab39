"""Which blocks of large replicas a save compares.

Enters: the saves of one plan, as the coordinator sees them. Leaves: per save a turn, which every rank is told
with the verdict on the plan. Invariant: as long as saves match, each turn of a round is compared by one of
them, whatever other verbs are called between them and whichever fail; and all ranks of a save compare the
same.
"""

from __future__ import annotations

from collections import deque
from typing import TypedDict


class Turn(TypedDict):
    """What one save compares of large replicas. Plain data: it travels."""

    number: int
    """Counts saves of the plan, from 0 on."""
    is_proven: bool
    """An earlier save of the plan has compared them as a whole."""


class Rotation:
    """Deals the turns of one plan out. The coordinator's alone: only what one rank decides is alike on all,
    while several saves are pending."""

    def __init__(self) -> None:
        self._next = 0
        self._missed: deque[int] = deque()
        self._is_proven = False

    def deal(self) -> Turn:
        """The turn of a save that begins: what failed saves did not compare comes first."""
        number = self._missed.popleft() if self._missed else self._next
        # a turn that is dealt again must not set the count back
        self._next = max(self._next, number + 1)
        return Turn(number=number, is_proven=self._is_proven)

    def matched(self) -> None:
        """A save was committed, so its ranks held the same."""
        self._is_proven = True

    def missed(self, turn: Turn) -> None:
        """The save of this turn was not committed."""
        self._missed.append(turn["number"])
