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
from .observer import Event, SaveProgress, SaveStaged
from .planner import CompiledPlan, PlanningOptions, draft_plan
from .pool import Lease
from .response import AsyncSaveResponse
from .staging import StageJob, Stager, num_parts, parts_between
from .state import Captured
from .storage.base import Storage, Transaction

logger = logging.getLogger(__name__)

_BATCH_PARTS = 8
"""How many parts one copy fills at most: writing starts after the first batch, so it is a compromise between
few calls and an early start."""


class PhaseFailure(Exception):
    """Says in which phase its cause was raised; the engine turns it into a SaveError."""

    def __init__(self, phase: Phase, cause: BaseException) -> None:
        super().__init__(phase)
        self.phase: Phase = phase
        self.cause = cause


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
    uid: str
    captured: Captured
    plan: CompiledPlan | None
    """The compiled plan that the captured structure belongs to; None if it has to be made."""
    events: dict[torch.device, DeviceEvent]
    notes: Mapping[str, JSON]
    replace: bool
    started: float
    """time.monotonic() of the request."""
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

    files: tuple[FileEntry, ...]
    time: float


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

    async def run(self) -> CommitOutcome:
        """Plan, stage, write, commit.

        Raises: PhaseFailure. Cancellation: everything is undone, unless the commit has begun.
        """
        try:
            with in_phase("plan"):
                self._plan = await self._make_plan()
            self._file = data_file_name(self._services.coordinator.rank, 0, self._request.uid)
            pool = self._services.stager.pool
            self._num_parts = num_parts(self._plan.layout.image_bytes, pool.slot_bytes)
            pool.reserve(self._services.owner, self._num_parts * self._services.pending_saves)
            self._digests: list[array[int]] = [array("Q")] * self._num_parts
            await self._flow()
            with in_phase("commit"):
                return await self._commit()
        except BaseExceptionGroup as group:
            raise first_failure(group) from group
        finally:
            self._request.captured.release()
            with anyio.CancelScope(shield=True):
                await self._clean_up()

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
        request, services = self._request, self._services
        coordinator = services.coordinator

        async def compare(digests: Sequence[str | None]) -> list[bool]:
            return [None not in digests] * len(digests)

        plan = request.plan
        reuse = await coordinator.exchange(request.uid, "verdict", plan.digest if plan else None, compare)
        if plan is None or not reuse:
            plan = await self._compile()
            services.on_plan(plan)
        return plan

    async def _compile(self) -> CompiledPlan:
        """Planning takes a while for tens of thousands of tensors, so it runs in a thread."""
        captured, services = self._request.captured, self._services
        coordinator, run = services.coordinator, services.threads.run
        draft = await run(
            draft_plan,
            captured,
            services.planning,
            rank=coordinator.rank,
            is_coordinator=coordinator.is_coordinator,
        )

        async def merge(messages: Sequence[Any]) -> list[Any]:
            return await run(draft.merge, messages)

        answer = await coordinator.exchange(self._request.uid, "plan", draft.message, merge)
        plan = await run(draft.compile, answer)
        captured.flat = None
        return plan

    async def _begin(self) -> None:
        """Sweep leftovers and open the transaction, beside staging: no copy need wait for a directory."""
        # shielded: a transaction that was begun must be known to whoever cleans up
        with in_phase("write"), anyio.CancelScope(shield=True):
            await self._sweep()
            self._transaction = await self._services.storage.begin(
                self._request.response.checkpoint_id,
                {self._file: self._plan.layout.file_bytes},
                uid=self._request.uid,
                replace=self._request.replace,
            )
        self._begun.set()

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
        assert self._transaction is not None
        layout = self._plan.layout
        digests = array("Q")
        for part in self._digests:
            digests.extend(part)
        assert len(digests) == -(-layout.image_bytes // BLOCK_BYTES)
        footer = Footer(image_bytes=layout.image_bytes, digests=digests)
        with in_phase("write"):
            await self._transaction.put(self._file, layout.image_bytes, memoryview(footer.encode()))
            await self._transaction.seal(self._file)
        entry = FileEntry(name=self._file, nbytes=layout.file_bytes, digest=footer.digest)
        await asyncio.shield(asyncio.wrap_future(self._request.has_returned))
        return await self._services.coordinator.exchange(self._request.uid, "commit", entry, self._publish)

    async def _publish(self, entries: Sequence[FileEntry]) -> list[CommitOutcome]:
        assert self._transaction is not None
        request, response = self._request, self._request.response
        metadata = self._plan.metadata.render(request.uid)
        now = time.time()
        manifest = encode_manifest(
            checkpoint_id=response.checkpoint_id,
            uid=request.uid,
            step=response.step,
            time=now,
            world_size=self._services.coordinator.world_size,
            torch_version=torch.__version__,
            metadata=metadata,
            files=tuple(entries),
            notes=request.notes,
            constant=self._plan.manifest_json,
        )
        await anyio.lowlevel.checkpoint_if_cancelled()
        request.committing = True
        with anyio.CancelScope(shield=True):
            await self._transaction.commit(metadata, manifest, replace=request.replace)
        return [CommitOutcome(tuple(entries), now)] * len(entries)

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
