"""What one save was asked for, and the two signals that its caller still gives it.

Enters: what ``save()`` was called with, and the state that it captured. Leaves: a SaveRequest, which nobody
changes: what happens to a save is known to its pipeline alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio

from .._concurrency import SignalSafeFuture
from ..info import JSON
from ..planning import CompiledPlan
from ..response import AsyncSaveResponse, ResponseWriter
from ..staging import Prepared
from .attachments import Attachment


class Cancellation:
    """Whether a save is to be stopped, and whether it still can be. For the engine's loop alone."""

    def __init__(self) -> None:
        self._is_requested = False
        self._is_too_late = False
        self._scope: anyio.CancelScope | None = None

    def __repr__(self) -> str:
        state = "too late" if self._is_too_late else "requested" if self._is_requested else "possible"
        return f"<Cancellation {state}>"

    def request(self) -> None:
        """Stop the save, or do not let it begin. Too late once its commit has begun."""
        # noted for ``scope`` as well: a save may be cancelled before its first step on the loop
        self._is_requested = True
        if self._scope is not None and not self._is_too_late:
            self._scope.cancel()

    def close(self) -> None:
        """The commit begins: from here on another rank may have published the save."""
        self._is_too_late = True

    @contextmanager
    def scope(self) -> Iterator[anyio.CancelScope]:
        """The save runs inside."""
        with anyio.CancelScope() as self._scope:
            if self._is_requested:  # before it ran
                self._scope.cancel()
            yield self._scope


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """What one save was asked for."""

    writer: ResponseWriter
    """Settles what the caller was given."""
    ordinal: int
    """Its number among the verbs that all ranks call."""
    prepared: Prepared
    """The captured state, on its way to be staged."""
    plan: CompiledPlan | None
    """The compiled plan that the captured structure belongs to, be it that a leaf outgrew its room; None if
    the structure is new."""
    notes: Mapping[str, JSON]
    files: Mapping[str, Attachment]
    replace: bool
    started: float
    """time.monotonic() of the request."""
    cancellation: Cancellation
    has_returned: SignalSafeFuture[None] = field(default_factory=SignalSafeFuture)
    """Done once save() has returned to its caller: nothing is committed before, so that a save() that raises
    leaves nothing."""

    @property
    def response(self) -> AsyncSaveResponse:
        """What the caller was given."""
        return self.writer.response

    def allow_commit(self) -> None:
        """``save()`` returns to its caller."""
        # in this order: a signal handler that comes in between is told not to wait, where in the other it
        # would wait for what only this thread allows
        self.has_returned.set_result(None)
        self.writer.returned()
