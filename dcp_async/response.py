"""Both ends of a save's handles: callers read and wait at one, the engine settles them at the other.

Invariant: waiting never changes what is waited for. A cancelled waiter leaves the save alone; a failure
raises a fresh error in each waiter, since one stored exception would grow its traceback with each of them
(docs/adr/0003).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
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


def _failure_in(future: SignalSafeFuture[T | SaveError]) -> SaveError | None:
    outcome = future.result() if future.done() else None
    return outcome if isinstance(outcome, SaveError) else None


class CheckpointHandle(Generic[T]):
    """Something that will be done: await it from any loop, any number of times, or wait for it in a thread.

    Cancellation: cancelling one who awaits changes nothing for the save or for other waiters.
    """

    def __init__(
        self,
        what: str,
        future: SignalSafeFuture[T | SaveError],
        *,
        on_own_thread: Callable[[], bool],
        waits_for_caller: Callable[[], bool],
    ) -> None:
        """
        Args:
            what: its name in messages.
            future: its outcome, which a ``HandleWriter`` sets.
            on_own_thread: whether the caller runs on a thread of the engine's.
            waits_for_caller: whether it can be done only after the caller has gone on.
        """
        self._what = what
        self._future = future
        self._on_own_thread = on_own_thread
        self._waits_for_caller = waits_for_caller
        # a forked child has the handle, but no thread that will ever settle it
        self._pid = os.getpid()
        self.observed = False
        """Whether somebody has been given this handle's failure."""
        self._as_future: HandleFuture[T] | None = None

    def __repr__(self) -> str:
        state = "pending" if not self.done() else "done" if _failure_in(self._future) is None else "failed"
        return f"<CheckpointHandle {self._what} {state}>"

    def _open(self, outcome: T | SaveError) -> T:
        if isinstance(outcome, SaveError):
            self.observed = True
            raise outcome.fresh()
        return outcome

    def _check_wait(self, *, blocking: bool) -> None:
        if self.done():  # read anywhere: in a forked child, on the engine's thread
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
                f"{self._what}: it is not done before its save() has returned, or at least gone on, and "
                "this thread is inside of that (a signal handler interrupted it): waiting would never end"
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
        """Await the handle as a coroutine, for what takes no other awaitable."""
        return await self

    def exception(self) -> BaseException | None:
        """The failure, None after success. Raises EngineStateError while it is not done."""
        if not self.done():
            raise EngineStateError(f"{self._what} is not done yet: await it, or call result(timeout)")
        failure = _failure_in(self._future)
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

    @property
    def future(self) -> concurrent.futures.Future[T]:
        """The handle as a ``concurrent.futures.Future``, for code that asks for one; nothing cancels it."""
        if self._as_future is None:
            self._as_future = HandleFuture(self)
        return self._as_future

    def __await__(self) -> Generator[object, None, T]:
        self._check_wait(blocking=False)
        # wrapped anew for each: a cancelled waiter cancels its own future alone
        outcome = yield from asyncio.wrap_future(self._future).__await__()
        return self._open(outcome)


class HandleFuture(concurrent.futures.Future[T]):
    """A handle to whoever wants a Future. Owns nothing; who reads the failure here has looked at it."""

    def __init__(self, handle: CheckpointHandle[T]) -> None:
        super().__init__()
        self._handle = handle
        self.set_running_or_notify_cancel()  # cancel() then says that it can't
        handle.add_done_callback(self._settle)

    def _settle(self, handle: CheckpointHandle[T]) -> None:
        # not the handle's own outcome: reading that would count as somebody having looked at it
        self.set_result(None)  # type: ignore[arg-type]  # nobody sees it: result() asks the handle

    def result(self, timeout: float | None = None) -> T:
        """As ``CheckpointHandle.result``."""
        return self._handle.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The failure, None after success. Raises TimeoutError."""
        try:
            self._handle.result(timeout)
        except SaveError as error:
            return error
        return None


class HandleWriter(Generic[T]):
    """The end of a handle that settles it. Who waits for its future gets a failure as a value, and has not
    observed it by that."""

    def __init__(
        self, what: str, *, on_own_thread: Callable[[], bool], waits_for_caller: Callable[[], bool]
    ) -> None:
        self.future: SignalSafeFuture[T | SaveError] = SignalSafeFuture()
        self.handle: CheckpointHandle[T] = CheckpointHandle(
            what, self.future, on_own_thread=on_own_thread, waits_for_caller=waits_for_caller
        )

    def __repr__(self) -> str:
        return f"<HandleWriter {self.handle!r}>"

    def settle(self, outcome: T | SaveError) -> None:
        """Set the outcome, once; a later one changes nothing."""
        # a save that fails once it is staged settles both handles, and what was said of staging stands
        if not self.future.done():
            self.future.set_result(outcome)

    def failure(self) -> SaveError | None:
        """What it failed with; None after success, and as long as it is pending."""
        return _failure_in(self.future)


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
        staging_completion: CheckpointHandle[None],
        upload_completion: CheckpointHandle[CheckpointInfo],
        replicated: CheckpointHandle[CheckpointInfo],
        cancel: Callable[[], None],
    ) -> None:
        self.checkpoint_id = checkpoint_id
        self.step = step
        self.staging_completion = staging_completion
        """Done when the state may be mutated."""
        self.upload_completion = upload_completion
        """Done when the checkpoint is committed and durable."""
        self.replicated = replicated
        """Done when it is in every tier that the storage has: with TieredStorage when it is committed far,
        else with ``upload_completion``, which it then is. Raises ReplicationError if it can't be waited for
        any more, and on ranks but the coordinator's, which alone replicates."""
        self._cancel = cancel

    def __repr__(self) -> str:
        handles = f"{self.staging_completion!r} {self.upload_completion!r}"
        return f"<AsyncSaveResponse {self.checkpoint_id!r} {handles}>"

    def cancel(self) -> None:
        """Stop the save: both handles raise SaveCancelled and its files go. Too late once the commit has
        begun."""
        self._cancel()


class ResponseWriter:
    """The end of a save's response that settles it; ``response`` is what the caller gets."""

    def __init__(
        self,
        *,
        checkpoint_id: str,
        step: int | None,
        cancel: Callable[[], None],
        on_own_thread: Callable[[], bool],
        place: Place,
        has_far: bool = False,
    ) -> None:
        """
        Args:
            place: what the save has taken until it ends.
            has_far: whether its storage has a tier that a commit does not reach.
        """
        self.place = place
        self._cancel = cancel
        self._saver: int | None = threading.get_ident()
        """The thread that is inside of ``save()``; None once that has returned or given up."""
        self._starter: int | None = self._saver
        """The thread that has yet to hand the save to the engine's loop; None once it has."""
        self.staging: HandleWriter[None] = HandleWriter(
            f"staging of {checkpoint_id!r}",
            on_own_thread=on_own_thread,
            waits_for_caller=lambda: self._starter == threading.get_ident(),
        )
        self.upload: HandleWriter[CheckpointInfo] = HandleWriter(
            f"upload of {checkpoint_id!r}",
            on_own_thread=on_own_thread,
            waits_for_caller=lambda: threading.get_ident() in (self._saver, self._starter),
        )
        self._replication: HandleWriter[CheckpointInfo] | None = None
        if has_far:
            self._replication = HandleWriter(
                f"replication of {checkpoint_id!r}",
                on_own_thread=on_own_thread,
                waits_for_caller=lambda: threading.get_ident() in (self._saver, self._starter),
            )
        self.response = AsyncSaveResponse(
            checkpoint_id=checkpoint_id,
            step=step,
            staging_completion=self.staging.handle,
            upload_completion=self.upload.handle,
            replicated=(self._replication or self.upload).handle,
            cancel=lambda: self._cancel(),  # looked up when it is called: what has ended let go of it
        )

    def __repr__(self) -> str:
        return f"<ResponseWriter {self.response!r}>"

    def started(self) -> None:
        """The engine's loop has the save: what may be done before ``save()`` returns needs no caller."""
        self._starter = None

    def returned(self) -> None:
        """``save()`` has returned to its caller, or raised: nobody is inside of it any more."""
        self._saver = None

    def staged(self) -> None:
        """The state may be mutated."""
        self.staging.settle(None)

    def committed(self, info: CheckpointInfo) -> None:
        """The checkpoint exists."""
        # a response that a trainer keeps must not keep what the save held
        self._cancel = _nothing
        self.upload.settle(info)

    def replicated(self, outcome: CheckpointInfo | SaveError) -> None:
        """The checkpoint is far, or nobody will know."""
        if self._replication is not None:
            self._replication.settle(outcome)

    def failed(self, error: SaveError) -> None:
        """Nothing was committed."""
        # in this order: who has seen staging fail finds the upload pending or failed, never done
        self.staging.settle(error)
        self.upload.settle(error)
        self.replicated(error)
        self._cancel = _nothing

    def is_raised_by_save(self) -> bool:
        """Whether a failure now is what ``save()`` raises: it has not returned, and waits for the staging."""
        return self._saver is not None and not self.staging.future.done()

    def unobserved_failure(self) -> SaveError | None:
        """Its failure, unless somebody was given it; a cancelled save is none."""
        failure = self.upload.failure()
        handles = (self.upload.handle, self.staging.handle, self.response.replicated)
        observed = any(handle.observed for handle in handles)
        return None if observed or isinstance(failure, SaveCancelled) else failure
