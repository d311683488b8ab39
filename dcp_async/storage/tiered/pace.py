"""When a copy stands still for saves, and for how many of them.

Enters: saves as they begin and end. Leaves: turns. Invariant: a copy lets one save pass by that begins after
it was asked for, and waits for no further one, so that saves without a pause starve none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """The saves in flight of one engine. On its loop."""

    def __init__(self) -> None:
        self.begun = 0
        """How many saves have begun: tells when a copy was asked for."""
        self._last_ended = 0
        """The youngest save that has ended, by its number."""
        self._saves: dict[int, str] = {}
        self._changed = asyncio.Event()

    @contextmanager
    def yielding(self, name: str) -> Iterator[None]:
        """A save of ``name`` is in flight."""
        self.begun += 1
        ordinal = self.begun
        self._saves[ordinal] = name
        try:
            yield
        finally:
            del self._saves[ordinal]
            self._last_ended = max(self._last_ended, ordinal)
            self._changed.set()

    def is_saving(self, name: str) -> bool:
        """Whether a save of ``name`` is in flight."""
        return name in self._saves.values()

    async def turn(self, since: int) -> None:
        """Until the copy that was asked for when ``since`` saves had begun may go on."""
        while self._saves and self._last_ended <= since:
            self._changed.clear()
            await self._changed.wait()
