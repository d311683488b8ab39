"""The verb ``save``: admission and capture in the caller's thread, then one job on the engine's loop.

Enters: what callers pass to ``save``. Leaves: a response whose handles are settled exactly once, whatever
happens, events, one line in the log. Invariant: a place that was taken is given back if the caller's thread
is interrupted at any line, or when the save ends; nobody who keeps a failure keeps the staging pool.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .._concurrency import Verb, Wait, first_failure
from .._foreign import ENDINGS
from ..coordination import RemoteError, RemoteFailure
from ..errors import EngineStateError, SaveCancelled, SaveError, StorageError
from ..events import SaveCommitted, SaveFailed, SaveStarted
from ..info import JSON, CheckpointInfo
from ..planning import CompiledPlan, custom_planner
from ..response import AsyncSaveResponse, Place, ResponseWriter
from ..save import (
    Attachment,
    Cancellation,
    Carryover,
    CommitOutcome,
    Preparation,
    Preparing,
    ReplicaCheck,
    SavePipeline,
    SaveRequest,
    Subject,
    cancelled_error,
    forget_locals,
    save_error,
)
from ..staging import Prepared
from ..state import LeafRules, capture
from .admission import SaveArguments, brief, checkpoint_name
from .attaching import Attachable, reading_attachments
from .lifetime import Lifetime
from .retention import RetentionRuns

logger = logging.getLogger(__name__)


async def _nothing(messages: Sequence[None]) -> list[None]:
    return [None] * len(messages)


class Saves:
    """The verb, in the caller's thread. Owns nothing but its runner."""

    def __init__(
        self,
        life: Lifetime,
        saved: Callable[[AsyncSaveResponse, float], object] = lambda response, seconds: None,
    ) -> None:
        """``saved`` is told the response of each save, and for how many seconds its caller was held."""
        self._life, self._saved = life, saved
        self._runner = SaveRunner(life)
        self._leaf_rules = LeafRules(life.setup.trust)

    def saving(
        self,
        state: Mapping[str, Any],
        step: int | None,
        checkpoint_id: str | None,
        notes: Mapping[str, JSON] | None,
        replace: bool,
        *,
        files: Attachable | None = None,
        is_path: bool = False,
    ) -> Verb[AsyncSaveResponse]:
        """``CheckpointEngine.save``. Ranks: all must call it, in the same order.

        ``is_path``: ``checkpoint_id`` is the name of a directory which nobody asks for by "latest".
        """
        began = time.monotonic()
        try:
            # refused within: what can't be saved while the process ends is lost, and is told so
            response = yield from self._admitting(state, step, checkpoint_id, notes, files, replace, is_path)
            self._saved(response, time.monotonic() - began)
            return response
        except BaseException as error:
            self._life.lose(brief(step if checkpoint_id is None else checkpoint_id), error)
            raise

    def _admitting(
        self,
        state: Mapping[str, Any],
        step: int | None,
        checkpoint_id: str | None,
        notes: Mapping[str, JSON] | None,
        files: Attachable | None,
        replace: bool,
        is_path: bool,
    ) -> Verb[AsyncSaveResponse]:
        self._life.check_open()
        try:
            asked = SaveArguments(step, checkpoint_id, notes, files, replace, is_path=is_path)
            attached = yield from reading_attachments(self._life, asked.files)
        except (TypeError, ValueError, StorageError) as error:
            self._runner.refuse_arguments(error)
            raise
        book, place = self._life.book, Place()
        request: SaveRequest | None = None
        try:
            yield from self._waiting(asked, place)
            request = yield from self._captured(state, asked, attached, place)
            yield from self._started(request)
            yield from self._life.finishing(request.writer)
        except BaseException:
            if request is None or not book.holds(request.writer):
                book.release(place)  # it did not start, or has ended: then nobody minds
                if request is not None:
                    _end_staging(request.writer)
            else:
                request.response.cancel()
                request.writer.returned()
            raise
        return request.response

    # apart: in CPython 3.13 an interrupt between two rounds of a loop passes by a `try` of the same frame
    def _waiting(self, asked: SaveArguments, place: Place) -> Verb[None]:
        """Until no save of this name is in flight, and ``place`` is taken."""
        book = self._life.book
        while asked.replace and asked.name and (earlier := book.in_flight(asked.name)) is not None:
            yield Wait(earlier.upload.future)  # two of one name must land in order
        while (room := book.take_place(place)) is not None:
            yield Wait(room)
            self._life.check_open()

    def _captured(
        self, state: Mapping[str, Any], asked: SaveArguments, attached: Mapping[str, Attachment], place: Place
    ) -> Verb[SaveRequest]:
        """Admission and capture, in the caller's thread and in one piece."""
        started = time.monotonic()
        ordinal, step = self._life.book.admit(asked.step, asked.checkpoint_id)
        # the response comes first: what fails before there is a request names the save by it
        runner, cancellation = self._runner, Cancellation()
        writer = ResponseWriter(
            checkpoint_id=checkpoint_name(step, asked.checkpoint_id),
            step=step,
            cancel=lambda: runner.cancel(cancellation),
            on_own_thread=self._life.on_own_thread,
            place=place,
            has_far=self._life.setup.tiered is not None,
        )
        try:
            prepared, plan = self._capture(state, asked, writer)
            # inside: interrupted behind it, nobody would know of the writer that optimizers wait for
            return SaveRequest(
                writer=writer,
                ordinal=ordinal,
                prepared=prepared,
                plan=plan,
                notes=asked.notes,
                files=attached,
                replace=asked.replace,
                started=started,
                cancellation=cancellation,
            )
        except ENDINGS as error:
            _end_staging(writer)
            runner.refuse_at_once(ordinal, writer.response.checkpoint_id, error)
            raise
        except BaseException as error:  # the trainer's own code, which may raise anything
            _end_staging(writer)
            raise (yield from self._refused(ordinal, writer.response, error)) from error

    def _refused(self, ordinal: int, subject: Subject, error: BaseException) -> Verb[SaveError]:
        """The state could not be captured: the other ranks are told. Gives what to raise."""
        rank, verdict = self._life.resources.coordinator.rank, {}
        with contextlib.suppress(EngineStateError):  # closed meanwhile: the others are told by that
            refusing = self._life.submit(self._runner.refuse(ordinal, subject.checkpoint_id, error))
            verdict = yield refusing.join()
        return save_error(error, "capture", subject, rank=rank, verdict=verdict)

    def _capture(
        self, state: Mapping[str, Any], asked: SaveArguments, writer: ResponseWriter
    ) -> tuple[Prepared, CompiledPlan | None]:
        """The state as it is now, watched if the trainer goes on; and the plan of its structure."""
        life, name = self._life, writer.response.checkpoint_id
        if not asked.replace and life.book.in_flight(name) is not None:
            raise FileExistsError(name)
        prepared, plan = self._prepared(state)
        if life.setup.stager.options.overlap:
            optimizers = prepared.captured.optimizers
            life.hooks.watch(optimizers, writer.staging.future, lambda: prepared.captured.tensors)
        return prepared, plan

    def _prepared(self, state: Mapping[str, Any]) -> tuple[Prepared, CompiledPlan | None]:
        """The state as it is now, and the plan that its structure has by now."""
        life = self._life
        ranks = life.resources.coordinator
        planner = custom_planner(life.setup.planning)
        # a planner may decide otherwise in each save, so it gets the whole state and no plan
        is_reused = life.setup.planning.cache and planner is None
        latest = self._runner.carryover.latest if is_reused else None
        plan, known = latest if latest is not None else (None, None)
        with ranks.activity.watched():
            captured = capture(
                state,
                known,
                rank=ranks.rank,
                world_size=ranks.world_size,
                rules=self._leaf_rules,
                fetch=life.setup.stager.leaf_fetch(),
            )
        if captured.is_new:
            plan = None
        return life.setup.stager.prepare(captured, plan, planner=planner), plan

    def preparing(self, state: Mapping[str, Any]) -> Verb[None]:
        """``CheckpointEngine.prepare``. Ranks: all must call it, in the same order as saves."""
        life, runner = self._life, self._runner
        life.check_open()
        ordinal = life.book.next_ordinal()
        try:
            prepared, plan = self._prepared(state)
        except ENDINGS as error:
            runner.refuse_at_once(ordinal, Preparing.checkpoint_id, error)
            raise
        except BaseException as error:  # the trainer's own code, which may raise anything
            raise (yield from self._refused(ordinal, Preparing(), error)) from error
        # the trainer waits, and nothing is saved: what changes meanwhile harms nobody
        prepared.watch = None
        try:
            yield life.submit(runner.prepare(ordinal, prepared, plan)).join()
        finally:
            prepared.release()  # cancelled before its first step, the job has not

    def _started(self, request: SaveRequest) -> Verb[None]:
        """Start the save, and wait until the state may be mutated or its optimizers wait for that."""
        if self._life.setup.stager.options.overlap:
            request.allow_commit()  # save() returns as soon as it is started
            self._runner.start(request)
        else:
            self._runner.start(request)
            yield Wait(request.writer.staging.future)
            request.response.staging_completion.result()  # raises its failure
            request.allow_commit()


def _end_staging(writer: ResponseWriter) -> None:
    """The save does not start: an optimizer that waits for its staging would wait for ever."""
    writer.staging.settle(cancelled_error(writer.response))


class SaveRunner:
    """Saves on the engine's loop. Owns what each leaves to those after it."""

    def __init__(self, life: Lifetime) -> None:
        self.carryover = Carryover(replicas=ReplicaCheck(life.setup.coordination.replicas, life.setup.stager))
        self._life = life
        self._retention = RetentionRuns(life)

    def start(self, request: SaveRequest) -> None:
        """Run ``request``; its handles tell the rest. Raises EngineStateError if the engine ended."""
        writer = request.writer
        try:
            # inside: interrupted between this and a try behind it, nobody would give the place back
            self._life.book.started(writer)
            job = self._life.submit(self._run(request))
            writer.started()
        except BaseException as error:
            self.cancel(request.cancellation)  # an interrupt may come when it was submitted already
            writer.failed(save_error(error, "capture", writer.response))
            self._life.book.ended(writer)
            writer.upload.handle.observed = True  # the caller is told right here
            raise
        job.future.add_done_callback(lambda done: self._report_crash(writer, done))

    def cancel(self, cancellation: Cancellation) -> None:
        """Stop a save unless its commit has begun; callable from every thread."""
        # on the loop: it alone knows whether the commit has begun
        self._life.resources.loop.call_soon(cancellation.request)

    async def _run(self, request: SaveRequest) -> None:
        writer = request.writer
        with self._life.replication.yielding(writer.response.checkpoint_id):
            await self._save(request)
        del request  # older checkpoints may take long to go, and need nothing of the state
        await self._retention.after(writer)

    async def _save(self, request: SaveRequest) -> None:
        response, have = request.response, self._life.resources
        uid = have.coordinator.uid(request.ordinal, response.checkpoint_id)
        if have.setup.observer is not None:  # adding up the bytes of many tensors takes milliseconds
            nbytes = request.prepared.captured.nbytes
            have.observe(SaveStarted(checkpoint_id=response.checkpoint_id, step=response.step, nbytes=nbytes))
        pipeline = SavePipeline(request, have, self.carryover, uid=uid)
        try:
            with request.cancellation.scope() as scope:
                outcome = await pipeline.run()
        except ENDINGS:  # the loop ends; the job's future tells it to the handles, see _report_crash
            raise
        except BaseException as error:  # a planner, a storage or a tensor's class may raise anything
            error = first_failure(error) if not isinstance(error, Exception) else error
            forget_locals(error)
            rank = have.coordinator.rank
            failure = save_error(error, "plan", response, rank=rank, verdict=pipeline.verdict)
            self._fail(request.writer, failure)
        else:
            # a cancellation that came after the commit had begun was not caught: the checkpoint exists
            if scope.cancelled_caught:
                self._fail(request.writer, cancelled_error(response))
            else:
                self._succeed(request, outcome, pipeline.staged_seconds)
        finally:
            have.coordinator.forget(uid)

    async def prepare(self, ordinal: int, prepared: Prepared, plan: CompiledPlan | None) -> None:
        """Do for ``prepared`` what a save does, but for what it leaves in the storage. Raises SaveError."""
        have = self._life.resources
        uid = have.coordinator.uid(ordinal, Preparing.checkpoint_id)
        preparation = Preparation(prepared, plan, have, self.carryover, uid=uid)
        try:
            await preparation.run()
        except ENDINGS:
            raise
        except BaseException as error:  # a planner or a tensor's class may raise anything
            error = first_failure(error) if not isinstance(error, Exception) else error
            forget_locals(error)
            rank = have.coordinator.rank
            raise save_error(error, "plan", Preparing(), rank=rank, verdict=preparation.verdict) from error
        finally:
            have.coordinator.forget(uid)

    def refuse_arguments(self, error: Exception) -> None:
        """A save was called with arguments that can't be; the other ranks, if theirs can, must not wait for
        this one. Callable from every thread."""
        coordinator = self._life.resources.coordinator
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

        self._life.resources.loop.submit(tell())

    def refuse_at_once(self, ordinal: int, name: str, error: BaseException) -> None:
        """Tell as ``refuse`` does, for a thread that must go on; callable from every thread."""
        coordinator = self._life.resources.coordinator

        def tell() -> None:
            uid = coordinator.uid(ordinal, name)
            coordinator.fail(uid, "capture", error)
            coordinator.forget(uid)

        self._life.resources.loop.call_soon(tell)

    async def refuse(self, ordinal: int, name: str, error: BaseException) -> Mapping[int, RemoteError]:
        """The state of a save could not be captured on this rank. Gives what each rank failed at."""
        coordinator = self._life.resources.coordinator
        uid = coordinator.uid(ordinal, name)
        coordinator.fail(uid, "capture", error)
        try:
            verdict, _ = await coordinator.settle(uid)
        finally:
            coordinator.forget(uid)
        return verdict

    def _succeed(self, request: SaveRequest, outcome: CommitOutcome, staged_seconds: float) -> None:
        response, have = request.response, self._life.resources
        info = CheckpointInfo(
            checkpoint_id=response.checkpoint_id,
            step=response.step,
            time=outcome.time,
            nbytes=outcome.nbytes,
            num_files=outcome.num_files,
            world_size=have.coordinator.world_size,
            torch_version=torch.__version__,
            producer="dcp_async",
            notes=request.notes,
            files=outcome.attached,
            _metadata=self._life.metadata_of,
        )
        seconds = time.monotonic() - request.started
        logger.info(
            "saved %s: %d bytes, staged in %.3f s, durable in %.3f s (%.2f GB/s)",
            *(info.checkpoint_id, info.nbytes, staged_seconds, seconds, info.nbytes / seconds / 1e9),
        )
        # before its handles are settled: who waits for them may save again at once, and finds room
        self._life.book.ended(request.writer)
        self._life.replication.committed(request.writer, info)
        event = SaveCommitted(checkpoint_id=info.checkpoint_id, step=info.step, info=info, seconds=seconds)
        have.observe(event)

    def _fail(self, writer: ResponseWriter, error: SaveError) -> None:
        if writer.is_raised_by_save():
            level = logging.DEBUG  # the caller is told right here
        else:
            level = logging.INFO if isinstance(error, SaveCancelled) else logging.ERROR
        logger.log(level, "%s", error)
        # settled first: the book has to know of a failure that nobody looks at
        writer.failed(error)
        self._life.book.ended(writer)
        failed = SaveFailed(checkpoint_id=error.checkpoint_id, step=error.step, error=error)
        self._life.resources.observe(failed)

    def _report_crash(self, writer: ResponseWriter, done: concurrent.futures.Future[None]) -> None:
        """Handles must end even where a bug of ours ended the task."""
        error = done.exception()
        if error is not None and not writer.upload.future.done():
            self._fail(writer, save_error(error, "plan", writer.response))
