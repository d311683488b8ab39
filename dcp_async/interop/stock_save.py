"""A save through any StorageWriter of stock's, with an engine's handles, errors and common outcome.

Enters: a state, a writer, a planner, a stager of anybody's. Leaves: a response whose handles are settled
once, whatever happens. Invariant: the writer's ``finish`` is called once all ranks have written, on the
coordinator alone, and never for a save that failed or was cancelled before.
Source: torch/distributed/checkpoint/state_dict_saver.py (the order of calls).

    (caller's thread) state_dict() of Statefuls, AsyncStager.stage
    (all ranks) reset, storage_meta, set_up_planner, set_up_storage_writer, create_local_plan,
        prepare_local_plan
    (coordinator) create_global_plan, prepare_global_plan
    (all ranks) finish_plan, write_data
    (coordinator) finish
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import logging
import os
import pickle
import time
from collections.abc import Sequence
from typing import Any

import anyio
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter

from .._concurrency import Job, Wait, first_failure, run_unless
from .._foreign import ENDINGS
from ..coordination import Coordination, PhaseFailure, RemoteError
from ..engine import ExitGuard, fail_unless_seen
from ..errors import CheckpointError, SaveCancelled
from ..info import CheckpointInfo
from ..response import AsyncSaveResponse, Place, ResponseWriter
from ..save import Cancellation, cancelled_error, forget_locals, save_error, tell_others
from .snapshot import snapshot
from .stagers import synchronizing
from .stock_call import Claim, StockCall, asked, check_state, packed, require

logger = logging.getLogger(__name__)

_WRITER = (
    "reset",
    "set_up_storage_writer",
    "prepare_local_plan",
    "prepare_global_plan",
    "write_data",
    "finish",
)
_PLANNER = ("set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data")
_ABORT_SECONDS = 20.0
"""How long a call of a writer's that is under way may take to end when the process does."""

Staged = dict[str, Any] | concurrent.futures.Future[Any]
"""What a stager gave: a state dict, or one to come."""


async def save_through(
    writer: StorageWriter,
    state_dict: dict[str, Any],
    *,
    planner: SavePlanner | None = None,
    coordination: Coordination,
    checkpoint_id: str | os.PathLike[str] | None = None,
    stager: AsyncStager | None = None,
    blocking: bool,
) -> AsyncSaveResponse:
    """Save ``state_dict`` through ``writer``, in DCP's order of calls, all of them from one thread.

    The state is staged whole before the writer sees it: by ``stager``, else by a copy in host memory, which
    takes as much as the state and is freed with the save. ``state_dict()`` and ``stage()`` are called in the
    caller's thread. Where ``stage()`` gives a future, this returns at once and ``staging_completion`` is done
    when that future is. The stager is the caller's to close.

    ``await info.metadata()`` of what ``upload_completion`` gives is the Metadata that was finished.

    Args:
        planner: for this save; None for DCP's default one.
        checkpoint_id: what ``writer.reset`` is called with; None: it is not called.
        stager: see above.
        blocking: whether this returns only when the checkpoint is finished and everything released.
    Ranks: all call it, in the same order. A writer, planner or stager that another save uses is waited for.
    Raises: SaveError, if staging fails, or, with ``blocking``, if anything does; TypeError for what is no
        writer, planner or stager; EngineStateError where ranks can't meet.
    Cancellation: until it has returned it cancels the save; the call of the writer's that is under way is
        waited for.
    """
    planner = DefaultSavePlanner() if planner is None else planner
    require(writer, "a StorageWriter", _WRITER)
    require(planner, "a SavePlanner", _PLANNER)
    if stager is not None:
        require(stager, "an AsyncStager", ("stage",))
    check_state(state_dict)
    claim = Claim((writer, planner, stager))
    await claim.take()
    try:
        call = StockCall(coordination, "save")
    except BaseException:
        claim.release()
        raise
    save = _Save(call, claim, writer, planner, stager, checkpoint_id)
    try:
        await save.open()
        return await save.started(state_dict, blocking=blocking)
    finally:
        save.response.returned()


class _Calls:
    """The calls of a writer and a planner on one rank, in the thread of the save."""

    def __init__(
        self,
        writer: StorageWriter,
        planner: SavePlanner,
        checkpoint_id: str | os.PathLike[str] | None,
        *,
        rank: int,
        is_coordinator: bool,
    ) -> None:
        self._writer, self._planner, self._checkpoint_id = writer, planner, checkpoint_id
        self._rank, self._is_coordinator = rank, is_coordinator
        self.metadata: Metadata
        """What ``create_global_plan`` says is saved, and ``finish`` completes; the coordinator's alone."""

    def local_plan(self, state: dict[str, Any]) -> bytes:
        """This rank's plan, for the coordinator."""
        writer, planner = self._writer, self._planner
        if self._checkpoint_id is not None:  # as stock does: a writer without one goes on with its own
            writer.reset(self._checkpoint_id)
        storage_meta = writer.storage_meta()
        # parts from before torch 2.3 and 2.7 take less, and stock asks the same way
        if "storage_meta" in inspect.signature(planner.set_up_planner).parameters:
            planner.set_up_planner(
                state_dict=state, storage_meta=storage_meta, is_coordinator=self._is_coordinator
            )
        else:
            planner.set_up_planner(state, self._is_coordinator)  # type: ignore[arg-type]
        if "kwargs" in inspect.signature(writer.set_up_storage_writer).parameters:
            writer.set_up_storage_writer(self._is_coordinator, rank=self._rank, use_collectives=True)
        else:
            writer.set_up_storage_writer(self._is_coordinator)
        return packed("the plan", writer.prepare_local_plan(planner.create_local_plan()))

    def global_plans(self, plans: Sequence[bytes]) -> list[bytes]:
        """All ranks' plans -> each rank's; the coordinator's alone."""
        made, self.metadata = self._planner.create_global_plan([pickle.loads(plan) for plan in plans])
        prepared = self._writer.prepare_global_plan(made)
        if len(prepared) != len(plans):
            raise ValueError(f"{len(prepared)} plans were made for {len(plans)} ranks")
        return [packed("the plan", plan) for plan in prepared]

    def write(self, answer: bytes) -> bytes:
        """Write this rank's part; gives its results, for the coordinator."""
        plan: SavePlan = self._planner.finish_plan(pickle.loads(answer))
        written = self._writer.write_data(plan, self._planner)
        written.wait()
        return packed("what write_data() gave", written.value())

    def finish(self, results: Sequence[bytes]) -> list[Any]:
        """Publish; the coordinator's alone. Gives what all ranks are told."""
        loaded = [pickle.loads(result) for result in results]
        self._writer.finish(metadata=self.metadata, results=loaded)
        # nothing below may fail, whatever results a writer of anybody's gives: it is published
        nbytes = sum(int(getattr(result, "size_in_bytes", 0) or 0) for rank in loaded for result in rank)
        stored = self.metadata.storage_data
        places = stored.values() if isinstance(stored, dict) else ()
        num_files = len({str(getattr(place, "relative_path", "")) for place in places})
        raw = b""
        if len(results) > 1:
            try:
                raw = pickle.dumps(self.metadata)
            except Exception as error:
                logger.warning("the metadata can't be pickled, so only the coordinator has it: %s", error)
        return [(time.time(), nbytes, num_files, raw)] * len(results)


class _Save:
    """One save on one rank. Owns its call and its claim, and ends them with itself."""

    def __init__(
        self,
        call: StockCall,
        claim: Claim,
        writer: StorageWriter,
        planner: SavePlanner,
        stager: AsyncStager | None,
        checkpoint_id: str | os.PathLike[str] | None,
    ) -> None:
        self._call, self._claim, self._stager = call, claim, stager
        self._cancellation = Cancellation()
        self._verdict: dict[int, RemoteError] = {}
        self._guard: ExitGuard | None = None
        self._job: Job[None]
        ranks = call.coordinator
        self._calls = _Calls(
            writer, planner, checkpoint_id, rank=ranks.rank, is_coordinator=ranks.is_coordinator
        )
        name = type(writer).__name__ if checkpoint_id is None else os.fspath(checkpoint_id)
        self.response = ResponseWriter(
            checkpoint_id=name,
            step=None,
            cancel=self._cancel,
            on_own_thread=call.loop.is_current,
            place=Place(),
        )

    def _cancel(self) -> None:
        self._call.loop.call_soon(self._cancellation.request)

    async def open(self) -> None:
        """Meet the other ranks. Raises EngineStateError."""
        try:
            await self._call.loop.submit(self._call.coordinator.open()).join().wait()
        except BaseException:
            await Wait(self._call.loop.submit(self._call.close()).future, shielded=True).wait()
            self._ended()
            raise

    async def started(self, state_dict: dict[str, Any], *, blocking: bool) -> AsyncSaveResponse:
        """Stage in the caller's thread, and start the rest. See ``save_through``."""
        staged: Staged | PhaseFailure
        ending: BaseException | None = None
        try:
            staged = self._staging(state_dict)
        except PhaseFailure as failure:
            # not raised yet: the other ranks have to be told, which the job does. Without this frame, which
            # goes on, among those whose locals are forgotten with the failure
            staged = failure.with_traceback(None)
            ending = failure.cause if isinstance(failure.cause, ENDINGS) else None
        response = self.response.response
        self._job = self._call.loop.submit(self._run(staged))
        self.response.started()
        if not blocking:
            self._guard = ExitGuard(self._drain, self._drain, self._call.timeouts.exit_grace + _ABORT_SECONDS)
        self._job.future.add_done_callback(lambda _: self._ended())
        ended = Wait(self._job.future, cancel=self._cancel)
        if ending is not None:
            await ended.wait()
            raise ending
        if blocking:
            await ended.wait()
            await response.upload_completion
        elif not isinstance(staged, concurrent.futures.Future):
            await Wait(self.response.staging.future, cancel=self._cancel).wait()
            if self.response.staging.failure() is not None:
                await ended.wait()
            await response.staging_completion
        return response

    def _staging(self, state_dict: dict[str, Any]) -> Staged:
        """Ask Statefuls, call the stager. Raises PhaseFailure."""
        try:
            state = asked(state_dict, self._call.coordinator.activity)
        except BaseException as error:
            raise PhaseFailure("capture", error) from error
        try:
            if self._stager is None:
                return snapshot(state)
            return self._stager.stage(state)
        except BaseException as error:
            raise PhaseFailure("stage", error) from error

    async def _run(self, staged: Staged | PhaseFailure) -> None:
        coordinator, response = self._call.coordinator, self.response.response
        uid = coordinator.uid(0, response.checkpoint_id)
        try:
            try:
                with self._cancellation.scope() as scope:
                    info = await self._together(uid, staged)
            except ENDINGS as error:  # the loop ends
                self._fail(error)
                raise
            except BaseException as error:
                self._fail(error)
            else:
                if scope.cancelled_caught:
                    self.response.failed(cancelled_error(response))
                else:
                    self.response.committed(info)
        finally:
            with anyio.CancelScope(shield=True):
                coordinator.forget(uid)
                await self._call.close()

    def _fail(self, error: BaseException) -> None:
        error = first_failure(error)
        forget_locals(error)
        rank = self._call.coordinator.rank
        failure = save_error(error, "plan", self.response.response, rank=rank, verdict=self._verdict)
        self.response.failed(failure)
        # whoever has cancelled it knows
        if self._guard is not None and not isinstance(failure, SaveCancelled):
            logger.error("%s", failure)  # nobody may ever ask the handles
            fail_unless_seen(self.response.response)

    async def _together(self, uid: str, staged: Staged | PhaseFailure) -> CheckpointInfo:
        """With the other ranks: what one fails at, all fail at."""
        coordinator = self._call.coordinator
        try:
            return await run_unless(
                functools.partial(coordinator.failed, uid), functools.partial(self._uploaded, uid, staged)
            )
        except BaseException as error:
            tell_others(coordinator, uid, error)
            if not isinstance(error, asyncio.CancelledError):
                verdict, _ = await coordinator.settle(uid)
                self._verdict = dict(verdict)
            raise

    async def _uploaded(self, uid: str, staged: Staged | PhaseFailure) -> CheckpointInfo:
        call, calls, exchange = self._call, self._calls, self._call.coordinator.exchange
        state = await self._staged(staged)
        del staged  # freed when the writer has no more use for it
        self.response.staged()

        async def plans(messages: Sequence[bytes]) -> list[bytes]:
            return await call.run("plan", calls.global_plans, messages)

        plan = await exchange(uid, "plan", await call.run("plan", calls.local_plan, state), plans)
        del state
        results: list[bytes] = []

        async def gather(messages: Sequence[bytes]) -> list[None]:
            results.extend(messages)
            return [None] * len(messages)

        async def finish(messages: Sequence[None]) -> list[Any]:
            told: list[Any] = []
            with anyio.CancelScope(shield=True):  # once begun it may have published
                told = await call.run("commit", calls.finish, results)
            return told

        await exchange(uid, "written", await call.run("write", calls.write, plan), gather)
        # all ranks have written. One that was cancelled before here keeps the coordinator from finishing:
        # that waits for each rank's word
        self._cancellation.close()
        told = await exchange(uid, "commit", None, finish)
        return self._info(*told)

    def _info(self, committed: float, nbytes: int, num_files: int, raw: bytes) -> CheckpointInfo:
        coordinator = self._call.coordinator
        name = self.response.response.checkpoint_id
        own = self._calls.metadata if coordinator.is_coordinator else None

        async def metadata(_: str) -> Metadata:
            if own is None and not raw:
                raise CheckpointError(f"the metadata of {name!r} could not be sent; the coordinator has it")
            decoded: Metadata = own if own is not None else pickle.loads(raw)
            return decoded

        return CheckpointInfo(
            checkpoint_id=name,
            step=None,
            time=committed,
            nbytes=nbytes,
            num_files=num_files,
            world_size=coordinator.world_size,
            torch_version=torch.__version__,
            producer="stock",
            _metadata=metadata,
        )

    async def _staged(self, staged: Staged | PhaseFailure) -> dict[str, Any]:
        """The staged state, once it is there. Raises PhaseFailure."""
        if isinstance(staged, PhaseFailure):
            raise staged
        if isinstance(staged, concurrent.futures.Future):
            ended, loop = asyncio.Event(), self._call.loop
            # not wrapped: a cancelled save would cancel the stager's own work
            staged.add_done_callback(lambda _: loop.call_soon(ended.set))
            await ended.wait()
            try:
                staged = staged.result()
            except BaseException as error:
                raise PhaseFailure("stage", error) from error
        elif (synchronize := synchronizing(self._stager)) is not None:
            await self._call.run("stage", synchronize)
        if not isinstance(staged, dict):
            wrong = TypeError(f"stage() gave {type(staged).__name__}, not a state dict or a Future of one")
            raise PhaseFailure("stage", wrong)
        return staged

    def _drain(self, limit: float) -> bool:
        """The process ends: wait, then cancel; whether it has ended within ``limit`` seconds."""
        assert self._guard is not None
        for seconds in (limit - _ABORT_SECONDS, _ABORT_SECONDS):
            self._job.future.wait(seconds)
            if self._job.future.done():
                return True
            logger.error("the process ends, and %r is not saved: cancelled", self.response.response)
            self._guard.lost = True
            self._cancel()
        return False

    def _ended(self) -> None:
        """Release everything."""
        self._claim.release()
        self._call.stop()
        if self._guard is not None:
            self._guard.dismiss()
