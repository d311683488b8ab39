"""What a caller holds of a save or a load: handles that any loop or thread can wait for, and value types.

Invariant: waiting never changes what is waited for. A cancelled waiter leaves the save alone; a failure
raises a fresh error in each waiter, since one stored exception would grow its traceback with each of them
(docs/adr/0003).
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import traceback
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

from ._concurrency import SignalSafeFuture
from .errors import EngineStateError, SaveCancelled, SaveError
from .info import CheckpointInfo

logger = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


def _nothing() -> None:
    """What cancelling an ended save does."""


class CheckpointHandle(Generic[T]):
    """Something that will be done: await it from any loop, any number of times, or wait for it in a thread.

    Cancellation: cancelling one who awaits changes nothing for the save or for other waiters.
    """

    def __init__(
        self, what: str, *, on_own_thread: Callable[[], bool], waits_for_caller: Callable[[], bool]
    ) -> None:
        """``on_own_thread`` tells whether the caller runs on a thread of the engine's, ``waits_for_caller``
        whether it can be done only after the caller has gone on."""
        self._what = what
        self._on_own_thread = on_own_thread
        self._waits_for_caller = waits_for_caller
        self._pid = os.getpid()
        self._future: SignalSafeFuture[T | SaveError] = SignalSafeFuture()
        self.observed = False
        """Whether somebody has been given this handle's failure."""

    def __repr__(self) -> str:
        state = "pending" if not self.done() else "failed" if self._failure() is not None else "done"
        return f"<CheckpointHandle {self._what} {state}>"

    def _settle(self, outcome: T | SaveError) -> None:
        """Called once, by the engine."""
        self._future.set_result(outcome)

    def _failure(self) -> SaveError | None:
        outcome = self._future.result() if self._future.done() else None
        return outcome if isinstance(outcome, SaveError) else None

    def _open(self, outcome: T | SaveError) -> T:
        if isinstance(outcome, SaveError):
            self.observed = True
            raise outcome.fresh()
        return outcome

    def _check_wait(self, *, blocking: bool) -> None:
        if self.done():
            return
        if os.getpid() != self._pid:
            raise EngineStateError(
                f"{self._what}: this process was forked from the one that saves; wait in the parent"
            )
        if blocking and self._on_own_thread():
            raise EngineStateError(
                f"{self._what}: waiting on the engine's own thread would never end; use add_done_callback"
            )
        if blocking and self._waits_for_caller():
            raise EngineStateError(
                f"{self._what}: nothing is committed before its save() has returned, and this thread is "
                "inside of that (a signal handler that interrupted it): waiting here would never end"
            )

    def done(self) -> bool:
        """Whether it succeeded or failed already."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> T:
        """Block this thread until done, ``timeout`` seconds at most.

        Raises: SaveError (or a subclass) if the save failed; TimeoutError; EngineStateError on the engine's
        thread.
        """
        self._check_wait(blocking=True)
        return self._open(self._future.result(timeout))

    async def wait(self) -> T:
        """The same as awaiting the handle itself."""
        return await self

    def exception(self) -> BaseException | None:
        """The failure, None after success. Raises EngineStateError while it is not done."""
        if not self.done():
            raise EngineStateError(f"{self._what} is not done yet: await it, or call result(timeout)")
        failure = self._failure()
        if failure is None:
            return None
        self.observed = True
        return failure.fresh()

    def add_done_callback(self, fn: Callable[[CheckpointHandle[T]], object]) -> None:
        """Call ``fn(handle)`` when done (at once if it is): on the engine's thread, so it must be quick and
        not block."""

        def call(_: object) -> None:
            try:
                fn(self)
            except BaseException as error:
                # of the user's code; on the engine's thread it may end neither the save nor the loop
                if not isinstance(error, Exception) and not self._on_own_thread():
                    raise
                # formatted here: a record that kept the frames would keep what they refer to
                logger.error("a done callback of %s failed\n%s", self._what, traceback.format_exc())

        self._future.add_done_callback(call)

    def __await__(self) -> Generator[object, None, T]:
        self._check_wait(blocking=False)
        outcome = yield from asyncio.wrap_future(self._future).__await__()
        return self._open(outcome)


class Place:
    """The right to be one of ``Limits.pending_saves``. Made before it is taken, so that whoever is
    interrupted in between can give it back all the same."""


class AsyncSaveResponse:
    """A save that is under way: two handles and a way to cancel it. Owns nothing; the engine does."""

    def __init__(
        self,
        *,
        checkpoint_id: str,
        step: int | None,
        cancel: Callable[[], None],
        on_own_thread: Callable[[], bool],
        place: Place,
    ) -> None:
        self.checkpoint_id = checkpoint_id
        self.step = step
        self._cancel = cancel
        self._place = place
        self._saver: int | None = threading.get_ident()
        """The thread that is inside of ``save()``; None once that has returned or given up."""
        self.staging_completion: CheckpointHandle[None] = CheckpointHandle(
            f"staging of {checkpoint_id!r}", on_own_thread=on_own_thread, waits_for_caller=lambda: False
        )
        """Done when the state may be mutated."""
        self.upload_completion: CheckpointHandle[CheckpointInfo] = CheckpointHandle(
            f"upload of {checkpoint_id!r}",
            on_own_thread=on_own_thread,
            waits_for_caller=lambda: self._saver == threading.get_ident(),
        )
        """Done when the checkpoint is committed and durable."""

    def __repr__(self) -> str:
        handles = f"{self.staging_completion!r} {self.upload_completion!r}"
        return f"<AsyncSaveResponse {self.checkpoint_id!r} {handles}>"

    def cancel(self) -> None:
        """Stop the save: both handles raise SaveCancelled and its files go. Too late once the commit has
        begun."""
        self._cancel()

    def _forget_cancel(self) -> None:
        """There is nothing left to cancel; the request behind it may go."""
        self._cancel = _nothing

    def _settle_staged(self) -> None:
        if not self.staging_completion.done():
            self.staging_completion._settle(None)

    def _settle_failed(self, error: SaveError) -> None:
        if not self.staging_completion.done():
            self.staging_completion._settle(error)
        if not self.upload_completion.done():
            self.upload_completion._settle(error)

    def _unobserved_failure(self) -> SaveError | None:
        failure = self.upload_completion._failure()
        if (
            failure is None
            or isinstance(failure, SaveCancelled)
            or self.upload_completion.observed
            or self.staging_completion.observed
        ):
            return None
        return failure
