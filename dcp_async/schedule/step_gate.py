"""Where a trainer's steps meet the ranks' agreement on one of them.

Enters: the trainer's steps, in its thread; holds and agreements, on the engine's loop. Leaves: what has been
agreed, at the first step behind the agreed position. Invariant: a position that this rank told the others is
never passed unseen. No lock: a signal handler may interrupt the trainer anywhere, and the loop waits for
nobody.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from .._concurrency import SignalSafeFuture

Position: TypeAlias = tuple[int, int]
"""(how often the trainer went back to an earlier step, the step): it only grows, and is compared between
ranks."""

BEGINNING: Position = (0, -1)
NOW: Position = (-1, -1)
"""Before every step, the next one included."""


# eq=False: a deque that looks for one compares by identity, in one step that no handler comes into
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AgreedStep:
    """All ranks save at their first step behind ``after``."""

    after: Position
    why: str
    stop: bool
    """Whether they leave their loops then."""


class StepGate:
    """One rank's."""

    def __init__(self) -> None:
        self._position = BEGINNING
        self._hold: SignalSafeFuture[None] | None = None
        self._agreed: deque[AgreedStep] = deque()

    def __repr__(self) -> str:
        return f"<StepGate {self._position} {'held' if self._hold else 'free'} agreed={list(self._agreed)}>"

    # In the trainer's thread.

    def previous(self, step: int) -> int | None:
        """The step before ``step``, which comes now; None if there is none, or a later one."""
        latest = self._position[1]
        return latest if 0 <= latest <= step else None

    def arrive(self, step: int) -> None:
        """The trainer is at ``step``. Waits while the ranks agree: for their engines, for no trainer."""
        rewinds, latest = self._position
        # first the position, then the look at the hold; hold() does it the other way round. So one of the two
        # sees the other: either this step was told, or it waits here for what comes of the one that was
        self._position = (rewinds + (step < latest), step)
        while (hold := self._hold) is not None:
            hold.wait()

    def take_agreed(self) -> list[AgreedStep]:
        """What was agreed and is due at this step; each is given once."""
        if not self._agreed:
            return []
        # a tuple, which is made in one step: a handler or the loop may append meanwhile
        due = [agreed for agreed in tuple(self._agreed) if agreed.after < self._position]
        for agreed in due:
            self._agreed.remove(agreed)
        return due

    # On the loop.

    def hold(self) -> Position:
        """The position of the trainer, who from here on waits when it arrives at a step."""
        self._hold = SignalSafeFuture()
        return self._position

    def release(self) -> None:
        """The trainer goes on."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.set_result(None)

    # Anywhere, also in a signal handler.

    def agree(self, agreed: AgreedStep) -> None:
        """``agreed`` is due at the first step behind it."""
        self._agreed.append(agreed)
