"""Which saves are in flight, what the next one is called, and whose failure nobody has looked at.

Safe to use from several threads. Invariant: steps and ordinals are handed out in program order, so that each
rank computes them alone.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterable

from .errors import SaveError
from .response import AsyncSaveResponse


def checkpoint_name(step: int | None, checkpoint_id: str | None) -> str:
    """The name of a checkpoint. Raises ValueError for a step or a name that can't be one."""
    if step is not None and step < 0:
        raise ValueError(f"step={step} must not be negative")
    if checkpoint_id is None:
        assert step is not None
        return f"step-{step:08d}"
    if checkpoint_id == "latest":
        raise ValueError("checkpoint_id='latest' would hide the newest checkpoint from load('latest')")
    if not checkpoint_id or checkpoint_id.startswith(".") or set(checkpoint_id) & set("/\\\0"):
        raise ValueError(
            f"checkpoint_id={checkpoint_id!r} must be a plain name (it becomes a directory): "
            "not empty, no slash, no dot at its start"
        )
    return checkpoint_id


class SaveBook:
    """The saves of one engine."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._pending: list[AsyncSaveResponse] = []
        self._failed: list[AsyncSaveResponse] = []
        self._taken = 0
        """Places taken by saves that are being captured."""
        self._room: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._next_step = 0
        self._ordinal = 0
        self._missed: dict[int, str] = {}
        """Ordinal -> name, of what this rank has not called in time."""

    def seen_steps(self, steps: Iterable[int]) -> None:
        """Steps that lie under the root, committed or not."""
        with self._lock:
            self._next_step = max([self._next_step, *(step + 1 for step in steps)])

    def take_place(self) -> concurrent.futures.Future[None] | None:
        """Take a place for a new save; if there is none, a future that is done when to try again."""
        with self._lock:
            if len(self._pending) + self._taken < self._limit:
                self._taken += 1
                return None
            return self._room

    def give_back(self) -> None:
        """The place is not needed: the save did not start."""
        with self._lock:
            self._taken -= 1
            self._make_room()

    def _make_room(self) -> None:
        room, self._room = self._room, concurrent.futures.Future()
        room.set_result(None)

    def admit(self, step: int | None, checkpoint_id: str | None) -> tuple[int, int | None]:
        """(ordinal, step) of a new save. A step is used up even if the save fails."""
        with self._lock:
            if step is None and checkpoint_id is None:
                step = self._next_step
            if step is not None:
                self._next_step = max(self._next_step, step + 1)
            return self._take_ordinal(checkpoint_name(step, checkpoint_id)), step

    def next_ordinal(self) -> int:
        """The number of a verb that all ranks call."""
        with self._lock:
            return self._take_ordinal(None)

    def _take_ordinal(self, name: str | None) -> int:
        self._ordinal += 1
        while self._missed.pop(self._ordinal, name) != name:
            self._ordinal += 1
        return self._ordinal

    def missed(self, ordinal: int, name: str) -> None:
        """The other ranks gave up waiting for this one to save ``name`` (or to call another verb) as number
        ``ordinal``. If it comes late, it is told; what it calls instead has the number after it, as on the
        other ranks."""
        with self._lock:
            if ordinal > self._ordinal:
                self._missed[ordinal] = name

    def in_flight(self, name: str) -> AsyncSaveResponse | None:
        """The save under this name that has not ended yet, if there is one."""
        with self._lock:
            return next((other for other in self._pending if other.checkpoint_id == name), None)

    def started(self, response: AsyncSaveResponse) -> None:
        """``response`` is in flight, in a place that was taken before."""
        with self._lock:
            self._taken -= 1
            self._pending.append(response)

    def ended(self, response: AsyncSaveResponse) -> None:
        """``response`` is not in flight any more."""
        with self._lock:
            if response in self._pending:
                self._pending.remove(response)
            self._failed = [other for other in self._failed if other._unobserved_failure() is not None]
            if response._unobserved_failure() is not None:
                self._failed.append(response)
            self._make_room()

    def pending(self) -> list[AsyncSaveResponse]:
        """Saves in flight, oldest first."""
        with self._lock:
            return list(self._pending)

    def has_unobserved(self) -> bool:
        """Whether a failure waits for somebody to look at it."""
        with self._lock:
            return any(response._unobserved_failure() is not None for response in self._failed)

    def take_unobserved(self) -> list[SaveError]:
        """Failures that nobody was given yet; each is told once."""
        with self._lock:
            failed, self._failed = self._failed, []
        return [error for response in failed if (error := response._unobserved_failure()) is not None]
