"""Sync points: the coordinator has all ranks tell, at one moment, which step they have reached.

Enters: requests of any rank. Leaves: the call of a sync point to every rank. Invariant: one at a time, so
that ranks hold their trainers for one agreement only; requests that the one under way answers make no other.
A rank's request comes before its answer, so none of those that a sync point answers comes behind it.
"""

from __future__ import annotations

import asyncio

from ..errors import EngineStateError
from .messages import SyncCalled, SyncRequested


class SyncPoints:
    """The coordinator's table."""

    def __init__(self) -> None:
        self._number = 0
        self._open: SyncCalled | None = None
        self._next: SyncRequested | None = None
        """What the open one does not answer."""

    def __repr__(self) -> str:
        return f"<SyncPoints open={self._open} next={self._next}>"

    def requested(self, request: SyncRequested) -> SyncCalled | None:
        """What to call now, if anything."""
        if self._open is None:
            return self._call(request)
        # a further save is made at the step that is being agreed on; to stop there takes another word
        if request.stop and not self._open.stop:
            self._next = request
        return None

    def over(self, uid: str) -> SyncCalled | None:
        """The coordinator's own rank is done with ``uid``. What to call now, if anything."""
        if self._open is None or self._open.uid != uid:
            return None
        self._open = None
        request, self._next = self._next, None
        return self._call(request) if request is not None else None

    def seconds(self, uid: str) -> float | None:
        """How long the ranks have from the first answer on; None if ``uid`` is no open sync point."""
        return self._open.seconds if self._open is not None and self._open.uid == uid else None

    def _call(self, request: SyncRequested) -> SyncCalled:
        self._number += 1
        # no hash, as the uids of saves: it names no file, and boxes belong to one engine
        uid = f"sync point {self._number}"
        self._open = SyncCalled(uid=uid, why=request.why, stop=request.stop, seconds=request.seconds)
        return self._open


class SyncCalls:
    """What one rank has been called to, in order."""

    def __init__(self) -> None:
        # one at most: the next is called when the one before is over on the coordinator
        self._calls: asyncio.Queue[SyncCalled | None] = asyncio.Queue()

    def put(self, called: SyncCalled) -> None:
        self._calls.put_nowait(called)

    def end(self) -> None:
        """Nobody will call any more."""
        self._calls.put_nowait(None)

    async def next(self) -> SyncCalled:
        """Wait for the next call. Raises EngineStateError when nobody will call any more.

        Ranks: each then exchanges the step that it has reached under the call's uid, and forgets that.
        """
        called = await self._calls.get()
        if called is None:
            raise EngineStateError("the coordination with other ranks has ended")
        return called
