"""Runs one save on the engine's loop and settles its handles, whatever happens.

Enters: a SaveRequest. Leaves: a settled AsyncSaveResponse, events, one line in the log. Invariant: both
handles of a request that was started are settled exactly once, and nobody who keeps the failure keeps the
staging pool.
"""

from __future__ import annotations

import concurrent.futures
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence

import anyio
import torch
from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import first_failure
from .._foreign import ENDINGS
from ..coordination import RemoteError, RemoteFailure
from ..errors import EngineStateError, SaveCancelled, SaveError
from ..events import Event, Observer, SaveCommitted, SaveFailed, SaveStarted
from ..info import CheckpointInfo
from ..planning import CompiledPlan, PlanningOptions
from ..response import ResponseWriter
from ..save import (
    CommitOutcome,
    Mode,
    ReplicaCheck,
    SavePipeline,
    SaveRequest,
    SaveServices,
    cancelled_error,
    forget_locals,
    save_error,
)
from .lifetime import Lifetime

logger = logging.getLogger(__name__)


async def _nothing(messages: Sequence[None]) -> list[None]:
    return [None] * len(messages)


class SaveRunner:
    """The saves of one engine, on its loop. Owns nothing but the last compiled plan."""

    def __init__(
        self,
        life: Lifetime,
        planning: PlanningOptions,
        replicas: Mode,
        observer: Observer | None,
        metadata_of: Callable[[str], Awaitable[Metadata]],
    ) -> None:
        self.plan: CompiledPlan | None = None
        """For saves whose structure is the same."""
        self._life = life
        self._observer = observer
        self._metadata_of = metadata_of
        self._services = SaveServices(
            owner=life,
            stager=life.stager,
            replicas=ReplicaCheck(replicas, life.stager),
            storage=life.storage,
            coordinator=life.coordinator,
            threads=life.threads,
            planning=planning,
            io_concurrency=life.limits.io_concurrency,
            pending_saves=life.limits.pending_saves,
            timeout=life.timeouts.storage,
            on_plan=self._keep_plan,
            observe=self._observe,
        )

    def start(self, request: SaveRequest) -> None:
        """Run ``request``; from here on its handles tell the rest. Raises EngineStateError if the engine
        ended."""
        writer = request.writer
        try:
            request.has_started = True
            self._life.book.started(writer)
            job = self._life.submit(self._run(request))
        except BaseException as error:
            request.cancelled = True  # an interrupt may come when it was submitted already
            writer.failed(save_error(error, "capture", writer.response))
            self._life.book.ended(writer)
            writer.upload.handle.observed = True  # the caller is told right here
            raise
        job.future.add_done_callback(lambda done: self._report_crash(writer, done))

    def cancel(self, request: SaveRequest) -> None:
        """Stop ``request`` unless its commit has begun; callable from every thread."""

        def cancel() -> None:
            request.cancelled = True
            if request.scope is not None and not request.committing:
                request.scope.cancel()

        self._life.loop.call_soon(cancel)

    async def _run(self, request: SaveRequest) -> None:
        response = request.response
        request.uid = self._life.coordinator.uid(request.ordinal, response.checkpoint_id)
        if self._observer is not None:  # adding up the bytes of many tensors takes milliseconds
            nbytes = request.captured.nbytes
            self._observe(
                SaveStarted(checkpoint_id=response.checkpoint_id, step=response.step, nbytes=nbytes)
            )
        try:
            with anyio.CancelScope() as request.scope:
                if request.cancelled:
                    request.scope.cancel()
                outcome = await SavePipeline(request, self._services).run()
        except ENDINGS:
            raise
        except BaseException as error:  # a planner, a storage or a tensor's class may raise anything
            error = first_failure(error) if not isinstance(error, Exception) else error
            forget_locals(error)
            rank = self._life.coordinator.rank
            failure = save_error(error, "plan", response, rank=rank, verdict=request.verdict)
            self._fail(request.writer, failure)
        else:
            if request.scope.cancelled_caught:
                self._fail(request.writer, cancelled_error(response))
            else:
                self._succeed(request, outcome)
        finally:
            self._life.coordinator.forget(request.uid)

    def refuse_arguments(self, error: Exception) -> None:
        """A save was called with arguments that can't be; the other ranks, if theirs can, must not wait for
        this one. Callable from every thread."""
        coordinator = self._life.coordinator
        if coordinator.world_size == 1:
            return
        ordinal = self._life.book.next_ordinal()

        async def tell() -> None:
            # no other rank can have that name: the coordinator finds that the ranks do not save the same
            uid = coordinator.uid(ordinal, name := f"nothing, since its call was refused: {error}")
            try:
                await coordinator.exchange(uid, "refused", None, _nothing)
            except (RemoteFailure, EngineStateError) as failure:
                logger.debug("all ranks know that %s: %s", name, failure)
            finally:
                coordinator.forget(uid)

        self._life.loop.submit(tell())

    def refuse_at_once(self, ordinal: int, name: str, error: BaseException) -> None:
        """As ``refuse``, for a thread that must go on; callable from every thread."""

        def tell() -> None:
            uid = self._life.coordinator.uid(ordinal, name)
            self._life.coordinator.fail(uid, "capture", error)
            self._life.coordinator.forget(uid)

        self._life.loop.call_soon(tell)

    async def refuse(self, ordinal: int, name: str, error: BaseException) -> Mapping[int, RemoteError]:
        """The state of a save could not be captured on this rank. Gives what each rank failed at."""
        coordinator = self._life.coordinator
        uid = coordinator.uid(ordinal, name)
        coordinator.fail(uid, "capture", error)
        try:
            verdict, _ = await coordinator.settle(uid)
        finally:
            coordinator.forget(uid)
        return verdict

    def _succeed(self, request: SaveRequest, outcome: CommitOutcome) -> None:
        response = request.response
        info = CheckpointInfo(
            checkpoint_id=response.checkpoint_id,
            step=response.step,
            time=outcome.time,
            nbytes=outcome.nbytes,
            num_files=outcome.num_files,
            world_size=self._life.coordinator.world_size,
            torch_version=torch.__version__,
            producer="dcp_async",
            notes=request.notes,
            _metadata=self._metadata_of,
        )
        seconds = time.monotonic() - request.started
        logger.info(
            "saved %s: %d bytes, staged in %.3f s, durable in %.3f s (%.2f GB/s)",
            *(info.checkpoint_id, info.nbytes, request.staged_seconds, seconds, info.nbytes / seconds / 1e9),
        )
        self._life.book.ended(request.writer)
        request.writer.committed(info)
        self._observe(
            SaveCommitted(checkpoint_id=info.checkpoint_id, step=info.step, info=info, seconds=seconds)
        )

    def _fail(self, writer: ResponseWriter, error: SaveError) -> None:
        response = writer.response
        logger.log(logging.INFO if isinstance(error, SaveCancelled) else logging.ERROR, "%s", error)
        writer.failed(error)
        self._life.book.ended(writer)
        self._observe(SaveFailed(checkpoint_id=response.checkpoint_id, step=response.step, error=error))

    def _report_crash(self, writer: ResponseWriter, done: concurrent.futures.Future[None]) -> None:
        """Handles must end even where a bug of ours ended the task."""
        error = done.exception()
        if error is not None and not writer.upload.future.done():
            self._fail(writer, save_error(error, "plan", writer.response))

    def _keep_plan(self, plan: CompiledPlan) -> None:
        self.plan = plan

    def _observe(self, event: Event) -> None:
        if self._observer is not None:
            try:
                self._observer.on_event(event)
            except BaseException:
                # of the user's code, on the engine's thread: a CancelledError or GeneratorExit would pass for
                # the save's own, and a SystemExit would end the loop with all saves on it.
                # formatted here: a record that kept the frames would keep what they refer to
                logger.error("the observer failed on %s\n%s", type(event).__name__, traceback.format_exc())
