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
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Literal, SupportsIndex, TypeAlias, TypeVar

from torch.distributed.checkpoint.metadata import Metadata

from ._concurrency.signal_safe import SignalSafeFuture
from .errors import EngineStateError, LoadError, SaveCancelled, SaveError
from .formats.tree import JSON

logger = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A committed checkpoint, as its manifest describes it."""

    checkpoint_id: str
    """Its name: the directory under the root."""
    step: int | None
    """The step it was saved at; None if it has none."""
    time: float
    """When it was committed, in Unix seconds."""
    nbytes: int
    """Bytes of its data files."""
    num_files: int
    """How many data files it has."""
    world_size: int | None
    """How many ranks wrote it; None where the writer did not say (stock)."""
    torch_version: str | None
    """The writer's torch; None where the writer did not say (stock)."""
    producer: Literal["dcp_async", "stock"]
    """Who wrote it."""
    notes: Mapping[str, JSON] = field(default_factory=dict)
    """What the trainer attached with ``save(notes=...)``."""
    _metadata: Callable[[str], Awaitable[Metadata]] = field(repr=False, compare=False)
    """Decodes ``.metadata``: tens of thousands of objects, so only when asked for."""

    async def metadata(self) -> Metadata:
        """DCP's ``Metadata`` of this checkpoint, decoded on demand."""
        return await self._metadata(self.checkpoint_id)

    def _plain(self) -> dict[str, Any]:
        """Everything but the way to the metadata, to be told to other ranks."""
        names = (part.name for part in fields(self) if part.name != "_metadata")
        return {name: getattr(self, name) for name in names} | {"notes": dict(self.notes)}


CheckpointRef: TypeAlias = "Literal['latest'] | str | os.PathLike[str] | SupportsIndex | CheckpointInfo"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load did. Names are DCP's fully qualified names."""

    checkpoint_id: str
    """The checkpoint that was loaded."""
    step: int | None
    """Its step."""
    missing: tuple[str, ...] = ()
    """In the state, not in the checkpoint; left as they were (``strict=False``)."""
    unexpected: tuple[str, ...] = ()
    """In the checkpoint, below a subtree that the state names, but not in the state."""
    mismatched: tuple[str, ...] = ()
    """In both, with another shape or dtype; left as they were (``strict=False``)."""
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that were corrupt and passed over ("latest" only)."""
    nbytes: int = 0
    """Bytes placed into the state."""
    seconds: float = 0.0
    """Wall time of the load."""

    @property
    def next_step(self) -> int:
        """The step to go on with, ``step + 1``. Raises LoadError if the checkpoint has no step."""
        if self.step is None:
            raise LoadError(
                f"checkpoint {self.checkpoint_id!r} has no step; save with step=..., "
                "or keep a counter of your own in the state",
                checkpoint_id=self.checkpoint_id,
            )
        return self.step + 1


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
