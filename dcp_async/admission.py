"""Which saves are in flight, what the next one is called, and whose failure nobody has looked at.

Safe to use from several threads. Invariant: steps and ordinals are handed out in program order, so that each
rank computes them alone.
"""

from __future__ import annotations

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
        self._next_step = 0
        self._ordinal = 0

    def seen_steps(self, steps: Iterable[int]) -> None:
        """Steps that lie under the root, committed or not."""
        with self._lock:
            self._next_step = max([self._next_step, *(step + 1 for step in steps)])

    def must_wait_for(self) -> AsyncSaveResponse | None:
        """The oldest save in flight if there is no room for another."""
        with self._lock:
            return self._pending[0] if len(self._pending) >= self._limit else None

    def admit(self, step: int | None, checkpoint_id: str | None) -> tuple[int, int | None]:
        """(ordinal, step) of a new save. A step is used up even if the save fails."""
        with self._lock:
            if step is None and checkpoint_id is None:
                step = self._next_step
            if step is not None:
                self._next_step = max(self._next_step, step + 1)
            self._ordinal += 1
            return self._ordinal, step

    def is_in_flight(self, name: str) -> bool:
        """Whether a save under this name has not ended yet."""
        with self._lock:
            return any(response.checkpoint_id == name for response in self._pending)

    def started(self, response: AsyncSaveResponse) -> None:
        """``response`` is in flight."""
        with self._lock:
            self._pending.append(response)

    def ended(self, response: AsyncSaveResponse) -> None:
        """``response`` is not in flight any more."""
        with self._lock:
            if response in self._pending:
                self._pending.remove(response)
            if response.upload_completion._failure() is not None:
                self._failed.append(response)

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
