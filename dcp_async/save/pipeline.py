"""The path of a tensor, as coroutines joined by bounded queues. The only module that makes queues and starts
tasks.

    save   capture() -[SaveRequest]-> plan -[part]-> stage -[StagedPart]-> write -[WrittenPart]-> digest ->
    commit

Data goes one way. Queues bound items, the stager's pool bounds bytes. A rank stages under the plan that it
has while the ranks agree on whether that still holds; before they do, nothing is written and nobody told
"staged". Invariant: however a save ends, its tasks have ended, its slots are free and its transaction is
committed or aborted; resources live as long as the engine, tasks as long as one save.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypedDict

import anyio
import torch
from torch.distributed.checkpoint.api import CheckpointException

from .._concurrency import (
    Pipe,
    SignalSafeFuture,
    StuckThreadError,
    collection_paused,
    run_blocking,
    run_unless,
)
from .._names import data_file
from ..coordination import PhaseFailure, RemoteError, RemoteFailure
from ..errors import Phase
from ..events import SaveProgress, SaveStaged
from ..formats import (
    BLOCK_BYTES,
    FileEntry,
    Footer,
    ManifestHead,
    block_digests,
    encode_manifest,
    uids_named_in,
)
from ..info import JSON
from ..planning import CompiledPlan, GlobalPlan, Publication, prove_head
from ..response import AsyncSaveResponse, ResponseWriter
from ..staging import Lease, Prepared, StageJob, num_parts, parts_between
from ..storage import Transaction
from .plan_agreement import PlanAgreement
from .replica_check import Digest, Kind, differing
from .replica_comparison import ReplicaComparison
from .services import Carryover, SaveServices

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


@dataclass(slots=True, kw_only=True)
class SaveRequest:
    """One save, from capture to its end."""

    writer: ResponseWriter
    """Settles what the caller was given."""
    ordinal: int
    """Its number among the verbs that all ranks call."""
    prepared: Prepared
    """The captured state, on its way to be staged."""
    plan: CompiledPlan | None
    """The compiled plan that the captured structure belongs to; None if it has to be made."""
    notes: Mapping[str, JSON]
    replace: bool
    started: float
    """time.monotonic() of the request."""
    uid: str = ""
    """Its id, the same on all ranks; given when it runs."""
    has_returned: SignalSafeFuture[None] = field(default_factory=SignalSafeFuture)
    """Done once save() has returned to its caller: nothing is committed before, so that a save() that raises
    leaves nothing."""
    staged_seconds: float = 0.0
    """How long capture and staging took."""
    has_started: bool = False
    """It was given to the runner, which ends it whatever happens."""
    scope: anyio.CancelScope | None = None
    """Of the running save."""
    cancelled: bool = False
    """Somebody asked to cancel it."""
    verdict: Mapping[int, RemoteError] = field(default_factory=dict)
    """Of a save that failed: what each rank failed at; empty where nobody else was asked."""
    committing: bool = False
    """Past this point the save can't be cancelled."""

    @property
    def response(self) -> AsyncSaveResponse:
        """What the caller was given."""
        return self.writer.response

    def allow_commit(self) -> None:
        """``save()`` returns to its caller."""
        self.writer.returned()
        self.has_returned.set_result(None)


@dataclass(frozen=True, slots=True)
class StagedPart:
    """A slot that holds bytes [offset, offset + len(memory)) of the image."""

    number: int
    offset: int
    memory: memoryview
    lease: Lease
    slot: int


File = tuple[str, int, str]
"""(name, length, digest) of what a rank wrote."""


class Outcome(TypedDict):
    """How a rank's part of a save went. Plain data: it travels."""

    file: File | None
    replicas: list[Digest]


class Conclusion(TypedDict):
    """What the coordinator made of it. Plain data: it travels."""

    published: tuple[float, int, int]
    """(time, files, bytes), unless something differs."""
    differing: list[tuple[int, Kind]]
    """Groups of replicas that are not alike."""


@dataclass(frozen=True, slots=True)
class CommitOutcome:
    """What was published."""

    time: float
    num_files: int
    nbytes: int


class SavePipeline:
    """One save's boxes and the queues between them."""

    def __init__(self, request: SaveRequest, services: SaveServices, carryover: Carryover) -> None:
        self._request = request
        self._services = services
        self._carryover = carryover
        self._transaction: Transaction | None = None
        self._plan: CompiledPlan
        self._share: Prepared | None = None
        """What this rank writes of the state."""
        self._leases: list[Lease] = []
        self._begun = anyio.Event()
        self._calm = anyio.Event()
        self._written_bytes = 0
        self._comparison = ReplicaComparison(
            carryover.replicas,
            uid=request.uid,
            stager=services.stager,
            coordinator=services.coordinator,
            threads=services.threads,
            timeout=services.timeout,
        )
        self._told: list[Digest] = []
        """Of what this rank holds as others do."""
        self._file = data_file(services.coordinator.rank, 0, request.uid)

    async def run(self) -> CommitOutcome:
        """Plan, stage, write, commit.

        Raises: PhaseFailure. Cancellation: everything is undone, unless the commit has begun.
        """
        failed = functools.partial(self._services.coordinator.failed, self._request.uid)
        try:
            return await run_unless(failed, self._run)
        except BaseException as error:
            self._tell(error)
            if not isinstance(error, asyncio.CancelledError):
                self._request.verdict, _ = await self._services.coordinator.settle(self._request.uid)
            raise
        finally:
            self._let_go()
            with anyio.CancelScope(shield=True):
                await self._clean_up()

    def _let_go(self) -> None:
        """Of the trainer's tensors."""
        self._request.prepared.release()
        if self._share is not None:
            self._share.release()

    def _tell(self, error: BaseException) -> None:
        """Let the other ranks know, unless one of them said it first. Before anything is cleaned up: they
        would take files that vanish for the failure."""
        cause = error.cause if isinstance(error, PhaseFailure) else error
        if not isinstance(cause, RemoteFailure):
            self._services.coordinator.fail(self._request.uid, "plan", error)

    async def _run(self) -> CommitOutcome:
        request, services = self._request, self._services
        ranks = PlanAgreement(
            request.prepared.captured,
            request.plan,
            uid=request.uid,
            coordinator=services.coordinator,
            threads=services.threads,
            options=services.planning,
            lead=self._lead,
            comparison=self._comparison,
        )
        cached, agreed = request.plan, False
        # under a budget, memory that waits for a late rank would be missed by other saves
        if cached is not None and not services.stager.pool.has_budget:
            agreed = await self._flow(cached, ranks.is_agreed)
        else:
            with in_phase("plan"):
                agreed = await ranks.is_agreed()
            if agreed and cached is not None:
                await self._flow(cached, None)
        if not agreed:
            with in_phase("plan"):
                plan = await ranks.compile()
            self._carryover.plan = plan
            await self._flow(plan, None)
        with in_phase("commit"):
            return await self._commit()

    async def _flow(self, plan: CompiledPlan, is_agreed: Callable[[], Awaitable[bool]] | None) -> bool:
        """Stage and write what ``plan`` says. False if ``is_agreed``, asked meanwhile, says that it does not
        hold: then what was staged is dropped, and the state still held."""
        self._plan = plan
        self._share = self._request.prepared.share(plan.tensors, plan.leaves)
        pool = self._services.stager.pool
        self._num_parts = num_parts(plan.layout.image_bytes, pool.slot_bytes)
        pool.reserve(self._services, self._num_parts * self._services.pending_saves)
        self._digests: list[array[int]] = [array("Q")] * self._num_parts
        self._calm = anyio.Event()
        writers = self._services.io_concurrency
        # each staged part holds a slot, so these bounds are never felt: only the pool makes staging wait
        slots = pool.num_slots
        parts: Pipe[int] = Pipe(_BATCH_PARTS)
        staged: Pipe[StagedPart] = Pipe(slots)
        written: Pipe[StagedPart] = Pipe(slots, producers=writers)
        async with anyio.create_task_group() as group:
            group.start_soon(self._begin, is_agreed, group.cancel_scope)
            group.start_soon(self._emit, parts)
            group.start_soon(self._stage, parts, staged)
            for _ in range(writers):
                group.start_soon(self._write, staged, written)
            group.start_soon(self._digest, written)
        if not self._begun.is_set():
            self._drop_staged()
        return self._begun.is_set()

    async def _lead(self, plan: CompiledPlan) -> None:
        """Ranks that are told to go on write at once, and must find the directory leased."""
        with in_phase("write"):
            await self._open_transaction(plan)

    async def _begin(
        self, is_agreed: Callable[[], Awaitable[bool]] | None, staging: anyio.CancelScope
    ) -> None:
        """Sweep leftovers and open the transaction, beside staging: no copy need wait for other ranks or a
        directory."""
        with in_phase("plan"):
            if is_agreed is not None and not await is_agreed():
                staging.cancel()
                return
        with in_phase("write"):
            with anyio.CancelScope(shield=True):
                await self._sweep()
            await self._open_transaction(self._plan)
        self._begun.set()

    async def _open_transaction(self, plan: CompiledPlan) -> None:
        """Once: the coordinator needs it before the others are told to write."""
        coordinator = self._services.coordinator
        if self._transaction is None:
            self._transaction = await self._services.storage.begin(
                self._request.response.checkpoint_id,
                {self._file: plan.layout.file_bytes} if plan.layout.image_bytes else {},
                uid=self._request.uid,
                replace=self._request.replace,
                led_from=None if coordinator.is_coordinator else coordinator.coordinator_host,
            )

    async def _sweep(self) -> None:
        """Remove what dead saves left, and finish what could not be undone before. Failing at it loses
        nothing."""
        try:
            for transaction in list(self._carryover.unfinished):
                await transaction.abort()
                if transaction in self._carryover.unfinished:
                    self._carryover.unfinished.remove(transaction)
            if self._services.coordinator.is_coordinator:
                await self._services.storage.sweep(named=uids_named_in)
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
        assert self._share is not None
        job = StageJob(plan=self._plan, prepared=self._share)
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
        await staged.close()
        with in_phase("stage"):
            await self._comparison.read(self._plan, self._request.prepared)
        self._calm.set()
        # that other ranks need a new plan, that a name is taken or a root can't be written, is the caller's
        # business: its state is held for the first, and it is told of the others before save() returns
        await self._begun.wait()
        self._let_go()
        nbytes, seconds = self._plan.layout.image_bytes, time.monotonic() - self._request.started
        response = self._request.response
        self._request.staged_seconds = seconds
        services.observe(
            SaveStaged(
                checkpoint_id=response.checkpoint_id, step=response.step, nbytes=nbytes, seconds=seconds
            )
        )
        self._request.writer.staged()
        self._told = await self._comparison.digests()

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
        if entry is not None and not self._services.coordinator.is_coordinator:  # it looks at all of them
            await self._transaction.verify({entry[0]: entry[1]})
        self._transaction.hand_over()
        if not self._services.coordinator.is_coordinator:
            self._request.committing = True  # the coordinator may publish as soon as it hears from this rank
        message = Outcome(file=entry, replicas=self._told)
        coordinator = self._services.coordinator
        verdict = await coordinator.exchange(self._request.uid, "commit", message, self._conclude)
        if verdict["differing"]:
            await self._comparison.explain(verdict["differing"])
        self._comparison.matched()
        return CommitOutcome(*verdict["published"])

    async def _conclude(self, outcomes: Sequence[Outcome]) -> list[Conclusion]:
        """Publish, unless ranks hold other bytes under one name."""
        found = differing([outcome["replicas"] for outcome in outcomes])
        if found:
            return [Conclusion(published=(0.0, 0, 0), differing=found)] * len(outcomes)
        published = await self._publish([outcome["file"] for outcome in outcomes])
        return [Conclusion(published=published, differing=[])] * len(outcomes)

    async def _finish_file(self) -> File | None:
        """Append the footer and sync; None if this rank has no file."""
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

    async def _publish(self, entries: Sequence[File | None]) -> tuple[float, int, int]:
        assert self._transaction is not None
        assert self._plan.shared is not None
        request, response = self._request, self._request.response
        publication = await self._services.threads.run(_published, self._plan.shared)
        metadata = publication.metadata.render(request.uid)
        now = time.time()
        ranks = [entry and FileEntry(name=entry[0], nbytes=entry[1], digest=entry[2]) for entry in entries]
        files = tuple(entry for entry in ranks if entry is not None)
        head = ManifestHead(
            checkpoint_id=response.checkpoint_id,
            uid=request.uid,
            step=response.step,
            time=now,
            world_size=self._services.coordinator.world_size,
            torch_version=torch.__version__,
            files=files,
            notes=request.notes,
        )
        prove_head(head, publication.ends, ranks)
        manifest = encode_manifest(**head, metadata=metadata, constant=publication.manifest_json)
        await anyio.lowlevel.checkpoint_if_cancelled()
        await self._transaction.verify({file.name: file.nbytes for file in files})
        self._services.coordinator.check_steady("commit")
        request.committing = True
        with anyio.CancelScope(shield=True):
            await self._transaction.commit(metadata, manifest, replace=request.replace)
        return now, len(files), sum(file.nbytes for file in files)

    def _drop_staged(self) -> None:
        while self._leases:  # emptied, so that an error's frames do not keep the pool's memory
            self._services.stager.pool.release_all(self._leases.pop())

    async def _clean_up(self) -> None:
        self._drop_staged()
        self._comparison.close()
        if self._transaction is not None:
            try:
                await self._transaction.abort()
            except Exception as error:
                # the save has its own outcome; the next one tries again
                self._carryover.unfinished.append(self._transaction)
                logger.warning("could not clean up after %r: %s", self._request.response.checkpoint_id, error)


def _published(shared: GlobalPlan) -> Publication:
    with collection_paused():  # to prove it makes as many objects as it has tensors
        return shared.publication()
