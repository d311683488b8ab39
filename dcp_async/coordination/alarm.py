"""One timer that is set anew whenever what is due changes.

Enters: when something is due. Leaves: a call at that time, or none. Invariant: at most one timer of it is in
the loop, so that what changes often leaves nothing there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Alarm:
    """Belongs to its loop, as a timer does."""

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[float], None]) -> None:
        """``call`` is given a time that is not before the one that was set."""
        self._loop, self._call = loop, call
        self._timer: asyncio.TimerHandle | None = None
        self._due: float | None = None

    def __repr__(self) -> str:
        return f"<Alarm due={self._due}>"

    def set(self, due: float | None) -> None:
        """Call at ``due``, and at no other time that was set before; with None, not at all."""
        if due == self._due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = None if due is None else self._loop.call_at(due, self._ring)

    def _ring(self) -> None:
        # a loop may call a timer a moment early by its own clock
        self._call(max(self._loop.time(), self._due or 0.0))
