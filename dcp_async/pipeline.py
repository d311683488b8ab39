"""The path of a tensor, as coroutines joined by bounded queues. The only module that makes queues and starts
tasks.

    save   capture() -[SaveRequest]-> plan -[part]-> stage -[StagedPart]-> write -[WrittenPart]-> digest ->
    commit

Data goes one way. Queues bound items, the stager's pool bounds bytes. Invariant: however a save ends, its
tasks have ended, its slots are free and its transaction is committed or aborted; resources live as long as
the engine, tasks as long as one save.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import torch
from torch.distributed.checkpoint.api import CheckpointException

from ._concurrency import BlockingThreads, Pipe, StuckThreadError, run_blocking
from .coordinator import Coordinator
from .device import Event as DeviceEvent
from .errors import Phase
from .formats.distcp import BLOCK_BYTES, Footer, block_digests
from .formats.manifest import FileEntry, encode_manifest
from .formats.metadata import data_file_name
from .formats.structure import JSON
from .global_plan import check_leaves
from .observer import Event, SaveProgress, SaveStaged
from .offer import group_hashes, leaf_hashes
from .planner import CompiledPlan, PlanningOptions, compile_plan, draft_plan
from .pool import Lease
from .publication import GlobalPlan, Placement
from .remote import PhaseFailure, RemoteFailure
from .response import AsyncSaveResponse
from .staging import StageJob, Stager, num_parts, parts_between
from .state import Captured
from .storage.base import Storage, Transaction

logger = logging.getLogger(__name__)

_BATCH_PARTS = 8
"""How many parts one copy fills at most: writing starts after the first batch, so it is a compromise between
few calls and an early start."""


@contextmanager
def in_phase(phase: Phase) -> Iterator[None]:
    """Label whatever is raised inside."""
    try:
        yield
    except PhaseFailure:
        raise
    except (Exception, CheckpointException, SystemExit, KeyboardInterrupt) as error:
        # the last two, raised by a storage of the user's, would end the engine's loop with its saves on it
        raise PhaseFailure(phase, error) from error


def first_failure(error: BaseException) -> BaseException:
    """The first of several: the others are its echo in sibling tasks, or lose nothing by not being told."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@dataclass(slots=True, kw_only=True)
class SaveRequest:
    """One save, from capture to its end."""

    response: AsyncSaveResponse
    ordinal: int
    """Its number among the verbs that all ranks call."""
    captured: Captured
    plan: CompiledPlan | None
    """The compiled plan that the captured structure belongs to; None if it has to be made."""
    events: dict[torch.device, DeviceEvent]
    notes: Mapping[str, JSON]
    replace: bool
    started: float
    """time.monotonic() of the request."""
    uid: str = ""
    """Its id, the same on all ranks; given when it runs."""
    has_returned: concurrent.futures.Future[None] = field(default_factory=concurrent.futures.Future)
    """Done once save() has returned to its caller: nothing is committed before, so that a save() that raises
    leaves nothing."""
    staged_seconds: float = 0.0
    """How long capture and staging took."""
    scope: anyio.CancelScope | None = None
    """Of the running save."""
    cancelled: bool = False
    """Somebody asked to cancel it."""
    committing: bool = False
    """Past this point the save can't be cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveServices:
    """What the engine lends to its saves."""

    owner: object
    """In whose name pool slots are reserved."""
    stager: Stager
    storage: Storage
    coordinator: Coordinator
    threads: BlockingThreads
    planning: PlanningOptions
    io_concurrency: int
    pending_saves: int
    timeout: float
    """Seconds that one blocking call may take."""
    on_plan: Callable[[CompiledPlan], None]
    """Told each new plan, for the saves to come."""
    observe: Callable[[Event], None]
    unfinished: list[Transaction] = field(default_factory=list)
    """Transactions whose abort failed."""


@dataclass(frozen=True, slots=True)
class StagedPart:
    """A slot that holds bytes [offset, offset + len(memory)) of the image."""

    number: int
    offset: int
    memory: memoryview
    lease: Lease
    slot: int


@dataclass(frozen=True, slots=True)
class CommitOutcome:
    """What was published."""

    time: float
    num_files: int
    nbytes: int


class SavePipeline:
    """One save's boxes and the queues between them."""

    def __init__(self, request: SaveRequest, services: SaveServices) -> None:
        self._request = request
        self._services = services
        self._transaction: Transaction | None = None
        self._leases: list[Lease] = []
        self._begun = anyio.Event()
        self._calm = anyio.Event()
        self._written_bytes = 0
        self._file = data_file_name(services.coordinator.rank, 0, request.uid)

    async def run(self) -> CommitOutcome:
        """Plan, stage, write, commit.

        Raises: PhaseFailure. Cancellation: everything is undone, unless the commit has begun.
        """
        try:
            async with anyio.create_task_group() as group:
                if self._services.coordinator.world_size > 1:
                    group.start_soon(self._services.coordinator.failed, self._request.uid)
                outcome = await self._run()
                group.cancel_scope.cancel()
            return outcome
        except anyio.get_cancelled_exc_class() as cancelled:
            self._tell(cancelled)
            raise
        except BaseExceptionGroup as group_error:
            failure = first_failure(group_error)
            self._tell(failure)
            raise failure from group_error
        finally:
            self._request.captured.release()
            with anyio.CancelScope(shield=True):
                await self._clean_up()

    def _tell(self, error: BaseException) -> None:
        """Let the other ranks know, unless one of them said it first. Before anything is cleaned up: they
        would take files that vanish for the failure."""
        cause = error.cause if isinstance(error, PhaseFailure) else error
        if not isinstance(cause, RemoteFailure):
            self._services.coordinator.fail(self._request.uid, "plan", error)

    async def _run(self) -> CommitOutcome:
        with in_phase("plan"):
            self._plan = await self._make_plan()
            self._request.captured.keep(self._plan.tensors, self._plan.leaves)
        pool = self._services.stager.pool
        self._num_parts = num_parts(self._plan.layout.image_bytes, pool.slot_bytes)
        pool.reserve(self._services.owner, self._num_parts * self._services.pending_saves)
        self._digests: list[array[int]] = [array("Q")] * self._num_parts
        await self._flow()
        with in_phase("commit"):
            return await self._commit()

    async def _flow(self) -> None:
        writers = self._services.io_concurrency
        # each staged part holds a slot, so these bounds are never felt: only the pool makes staging wait
        slots = self._services.stager.pool.num_slots
        parts: Pipe[int] = Pipe(_BATCH_PARTS)
        staged: Pipe[StagedPart] = Pipe(slots)
        written: Pipe[StagedPart] = Pipe(slots, producers=writers)
        async with anyio.create_task_group() as group:
            group.start_soon(self._begin)
            group.start_soon(self._emit, parts)
            group.start_soon(self._stage, parts, staged)
            for _ in range(writers):
                group.start_soon(self._write, staged, written)
            group.start_soon(self._digest, written)

    async def _make_plan(self) -> CompiledPlan:
        """The cached plan if all ranks still have theirs, else a new one."""
        plan, coordinator, uid = self._request.plan, self._services.coordinator, self._request.uid
        hashes: list[int] = []
        message: dict[str, Any] = {"generation": None, "groups": [], "shared": []}
        if plan is not None:
            if plan.groups:
                hashes = await self._services.threads.run(leaf_hashes, self._request.captured)
            message = {
                "generation": plan.generation,
                "groups": [group for group, _ in plan.groups],
                "shared": group_hashes(hashes, [leaves for _, leaves in plan.groups]),
            }
        verdict = await coordinator.exchange(uid, "verdict", message, self._judge)
        if verdict == "compare" and plan is not None:
            named = dict(zip(plan.structure.leaf_names, hashes, strict=True))
            shared = {plan.structure.leaf_names[index] for _, leaves in plan.groups for index in leaves}
            mine = {name: value for name, value in named.items() if name in shared}
            await coordinator.exchange(uid, "leaves", mine, self._compare)
        elif verdict != "reuse" or plan is None:
            plan = await self._compile(plan)
            self._services.on_plan(plan)
        return plan

    async def _judge(self, messages: Sequence[dict[str, Any]]) -> list[str]:
        """The coordinator's verdict: whether every rank can use the plan that it has."""
        plan = self._request.plan
        if plan is None or any(message["generation"] != plan.generation for message in messages):
            return ["replan"] * len(messages)
        seen: dict[int, str] = {}
        for message in messages:
            for group, digest in zip(message["groups"], message["shared"], strict=True):
                if seen.setdefault(group, digest) != digest:
                    return ["compare"] * len(messages)
        await self._lead(plan)
        return ["reuse"] * len(messages)

    async def _lead(self, plan: CompiledPlan) -> None:
        """Ranks that are told to go on write at once, and must find the directory leased."""
        if self._services.coordinator.world_size > 1:
            with in_phase("write"):
                await self._open_transaction(plan)

    async def _compare(self, hashes: Sequence[dict[str, int]]) -> list[None]:
        check_leaves(hashes)
        return [None] * len(hashes)

    async def _compile(self, previous: CompiledPlan | None) -> CompiledPlan:
        """Planning takes a while for tens of thousands of tensors, so it runs in a thread."""
        request, services, uid = self._request, self._services, self._request.uid
        coordinator, run = services.coordinator, services.threads.run
        shared: GlobalPlan | None = None
        draft = await run(
            draft_plan,
            request.captured,
            previous,
            services.planning,
            is_coordinator=coordinator.is_coordinator,
        )

        async def merge(messages: Sequence[Any]) -> list[Any]:
            nonlocal shared
            answers, shared = await run(draft.merge, messages)
            return answers

        async def place(placements: Sequence[Placement]) -> list[None]:
            assert shared is not None
            for rank, each in enumerate(placements):
                await run(shared.place, rank, each)
            await self._lead(plan)
            return [None] * len(placements)

        answer = await coordinator.exchange(uid, "plan", draft.message, merge)
        structure = request.captured.structure
        plan, placement = await run(compile_plan, structure, draft.offer, draft.assigned(answer), uid, shared)
        await coordinator.exchange(uid, "place", placement, place)
        return plan

    async def _begin(self) -> None:
        """Sweep leftovers and open the transaction, beside staging: no copy need wait for a directory."""
        with in_phase("write"):
            with anyio.CancelScope(shield=True):
                await self._sweep()
            await self._open_transaction(self._plan)
        self._begun.set()

    async def _open_transaction(self, plan: CompiledPlan) -> None:
        """Once: the coordinator needs it before the others are told to write."""
        if self._transaction is None:
            self._transaction = await self._services.storage.begin(
                self._request.response.checkpoint_id,
                {self._file: plan.layout.file_bytes} if plan.layout.image_bytes else {},
                uid=self._request.uid,
                replace=self._request.replace,
                lead=self._services.coordinator.is_coordinator,
            )

    async def _sweep(self) -> None:
        """Remove what dead saves left, and finish what could not be undone before. Failing at it loses
        nothing."""
        try:
            for transaction in list(self._services.unfinished):
                await transaction.abort()
                if transaction in self._services.unfinished:
                    self._services.unfinished.remove(transaction)
            if self._services.coordinator.is_coordinator:
                await self._services.storage.sweep()
        except Exception as error:
            logger.warning("could not sweep leftovers under %r: %s", self._services.storage, error)

    async def _emit(self, parts: Pipe[int]) -> None:
        for number in range(self._num_parts):
            await parts.put(number)
        await parts.close()

    async def _stage(self, parts: Pipe[int], staged: Pipe[StagedPart]) -> None:
        """Copy runs of parts; the first thing a caller waits for, so nothing else may compete with it for
        cores."""
        services = self._services
        pool = services.stager.pool
        job = StageJob(plan=self._plan, captured=self._request.captured, events=self._request.events)
        while batch := await parts.batch(_BATCH_PARTS):
            first, left = batch[0], len(batch)
            while left:
                if (
                    pool.full
                ):  # the copy has to wait for slots, so whoever frees them need not hold back any more
                    self._calm.set()
                with in_phase("stage"):
                    lease = await services.stager.stage(job, first, left, patience=services.timeout)
                self._leases.append(lease)
                spans = parts_between(first, lease.count, pool.slot_bytes, self._plan.layout.image_bytes)
                for slot, (offset, nbytes) in enumerate(spans):
                    start = slot * pool.slot_bytes
                    memory = lease.memory(start, start + nbytes)
                    await staged.put(StagedPart(first + slot, offset, memory, lease, slot))
                first, left = first + lease.count, left - lease.count
        self._request.captured.release()
        self._calm.set()
        await staged.close()
        # a name that is taken, or a root that can't be written, is the caller's business: tell it before
        # save() returns
        await self._begun.wait()
        nbytes, seconds = self._plan.layout.image_bytes, time.monotonic() - self._request.started
        response = self._request.response
        self._request.staged_seconds = seconds
        services.observe(
            SaveStaged(
                checkpoint_id=response.checkpoint_id, step=response.step, nbytes=nbytes, seconds=seconds
            )
        )
        response._settle_staged()

    async def _write(self, staged: Pipe[StagedPart], written: Pipe[StagedPart]) -> None:
        """Hand parts to the storage as they are. Direct writes take hardly any CPU, so they need not wait for
        staging."""
        await self._begun.wait()
        assert self._transaction is not None
        async for part in staged:
            with in_phase("write"):
                try:
                    await self._transaction.put(self._file, part.offset, part.memory)
                except StuckThreadError:
                    self._services.stager.pool.release(part.lease, part.slot, lost=True)
                    raise
            await written.put(part)
        await written.close()

    async def _digest(self, written: Pipe[StagedPart]) -> None:
        """Checksum parts and free their slots. Takes CPU, so it waits until no caller waits for staging."""
        services, response = self._services, self._request.response
        await self._calm.wait()
        async for part in written:
            with in_phase("write"):
                self._digests[part.number] = await run_blocking(
                    services.threads, services.timeout, block_digests, part.memory
                )
            services.stager.pool.release(part.lease, part.slot)
            self._written_bytes += len(part.memory)
            services.observe(
                SaveProgress(
                    checkpoint_id=response.checkpoint_id,
                    step=response.step,
                    written_bytes=self._written_bytes,
                    nbytes=self._plan.layout.image_bytes,
                )
            )

    async def _commit(self) -> CommitOutcome:
        entry = await self._finish_file()
        await asyncio.shield(asyncio.wrap_future(self._request.has_returned))
        assert self._transaction is not None
        self._transaction.hand_over()
        if not self._services.coordinator.is_coordinator:
            self._request.committing = True  # the coordinator may publish as soon as it hears from this rank
        told = await self._services.coordinator.exchange(self._request.uid, "commit", entry, self._publish)
        return CommitOutcome(*told)

    async def _finish_file(self) -> tuple[str, int, str] | None:
        """Append the footer and sync: (name, length, digest) of this rank's file, if it has one."""
        assert self._transaction is not None
        layout = self._plan.layout
        if not layout.image_bytes:
            return None
        digests = array("Q")
        for part in self._digests:
            digests.extend(part)
        assert len(digests) == -(-layout.image_bytes // BLOCK_BYTES)
        footer = Footer(image_bytes=layout.image_bytes, digests=digests)
        with in_phase("write"):
            await self._transaction.put(self._file, layout.image_bytes, memoryview(footer.encode()))
            await self._transaction.seal(self._file)
        return self._file, layout.file_bytes, footer.digest

    async def _publish(self, entries: Sequence[tuple[str, int, str] | None]) -> list[tuple[float, int, int]]:
        assert self._transaction is not None
        assert self._plan.shared is not None
        request, response = self._request, self._request.response
        publication = await self._services.threads.run(self._plan.shared.publication)
        metadata = publication.metadata.render(request.uid)
        now = time.time()
        files = tuple(
            FileEntry(name=entry[0], nbytes=entry[1], digest=entry[2])
            for entry in entries
            if entry is not None
        )
        manifest = encode_manifest(
            checkpoint_id=response.checkpoint_id,
            uid=request.uid,
            step=response.step,
            time=now,
            world_size=self._services.coordinator.world_size,
            torch_version=torch.__version__,
            metadata=metadata,
            files=files,
            notes=request.notes,
            constant=publication.manifest_json,
        )
        await anyio.lowlevel.checkpoint_if_cancelled()
        request.committing = True
        with anyio.CancelScope(shield=True):
            await self._transaction.commit(metadata, manifest, replace=request.replace)
        return [(now, len(files), sum(file.nbytes for file in files))] * len(entries)

    async def _clean_up(self) -> None:
        while self._leases:  # emptied, so that an error's frames do not keep the pool's memory
            self._services.stager.pool.release_all(self._leases.pop())
        if self._transaction is not None:
            try:
                await self._transaction.abort()
            except Exception as error:
                # the save has its own outcome; the next one tries again
                self._services.unfinished.append(self._transaction)
                logger.warning("could not clean up after %r: %s", self._request.response.checkpoint_id, error)
