"""The path of a tensor, as coroutines joined by bounded queues. With load's pipeline the only module that
makes queues and starts tasks.

    save   capture() -[SaveRequest]-> plan -> stage -[Run]-> arrive -[StagedPart]-> write -[WrittenPart]->
    digest -> commit

Data goes one way. Queues bound items, the stager's pool bounds bytes. A rank stages under the plan that it
has while the ranks agree on whether that still holds; before they do, nothing is written and nobody told
"staged". Invariant: however a save ends, its tasks have ended, its slots are free and its transaction is
committed or aborted; resources live as long as the engine, tasks as long as one save.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Mapping

import anyio

from .._concurrency import Pipe, run_unless
from ..coordination import RemoteError
from ..events import SaveProgress, SaveStaged
from ..planning import CompiledPlan
from ..staging import Lease, Prepared, Run, StageJob, num_parts, parts_between
from .attachments import Attachments
from .commit import Commit, CommitOutcome, Written
from .directory import SaveDirectory
from .failures import in_phase, tell_others
from .file_writer import FileWriter, StagedPart
from .plan_agreement import PlanAgreement
from .replica_check import Digest
from .replica_comparison import ReplicaComparison
from .request import SaveRequest
from .services import Carryover, SaveServices

_RUNS_AHEAD = 1
"""How many runs are queued on devices, under a budget, beside the one that is waited for and the one that is
being queued: a device never waits for us, and no more memory is taken than that needs."""


class SavePipeline:
    """One save's boxes and the queues between them. What becomes of a save is written here and nowhere else.

    Attributes:
        staged_seconds: how long capture and staging took.
        verdict: of a save that failed, what each rank failed at; empty where nobody else was asked.
    """

    def __init__(
        self, request: SaveRequest, services: SaveServices, carryover: Carryover, *, uid: str
    ) -> None:
        """``uid``: the save's id, the same on all ranks."""
        self.staged_seconds = 0.0
        self.verdict: Mapping[int, RemoteError] = {}
        self._request = request
        self._services = services
        self._carryover = carryover
        self._uid = uid
        self._attachments = Attachments(request.files, uid)
        self._directory = SaveDirectory(request, services, carryover, uid=uid, attachments=self._attachments)
        self._comparison = ReplicaComparison(
            carryover.replicas,
            uid=uid,
            stager=services.stager,
            coordinator=services.coordinator,
            threads=services.threads,
            timeout=services.timeout,
        )
        self._flow: _Flow | None = None
        """The one that runs, or ran last."""
        self._made: Prepared | None = None
        """What a planner of the user's made of the state; it may refer to the trainer's tensors."""

    async def run(self) -> CommitOutcome:
        """Plan, stage, write, commit.

        Raises: PhaseFailure. Cancellation: everything is undone, unless the commit has begun.
        """
        # beside the work: or a rank would notice the failure of another only where it waits for it
        failed = functools.partial(self._services.coordinator.failed, self._uid)
        try:
            return await run_unless(failed, self._run)
        except BaseException as error:
            # before anything is cleaned up: the other ranks would take files that vanish for the failure
            tell_others(self._services.coordinator, self._uid, error)
            # all ranks raise one error, so each waits to hear what the others failed at; a cancelled one
            # raises none
            if not isinstance(error, asyncio.CancelledError):
                self.verdict, _ = await self._services.coordinator.settle(self._uid)
            raise
        finally:
            self._let_go()
            with anyio.CancelScope(shield=True):  # a second cancellation must not leave files behind
                await self._clean_up()

    def _let_go(self) -> None:
        """The trainer may have its tensors back."""
        self._request.prepared.release()
        if self._made is not None:
            self._made.release()
        if self._flow is not None:
            self._flow.share.release()

    async def _clean_up(self) -> None:
        if self._flow is not None:
            await self._flow.drop_staged()
        self._comparison.close()
        await self._directory.close()

    async def _run(self) -> CommitOutcome:
        request, services = self._request, self._services
        ranks = PlanAgreement(
            request.prepared,
            request.plan,
            checkpoint_id=request.response.checkpoint_id,
            uid=self._uid,
            coordinator=services.coordinator,
            threads=services.threads,
            options=services.planning,
            format=services.format,
            lead=self._lead,
            comparison=self._comparison,
            attachments=self._attachments,
        )
        known, written = ranks.plan, None
        # staging under a plan that may not hold is a bet that it does, as it nearly always does. Not under a
        # budget: memory that waits for a late rank would be missed by other saves
        if known is not None and not services.stager.pool.has_budget:
            written = await self._write_under(known, ranks.is_agreed)
        else:
            with in_phase("plan"):
                agreed = await ranks.is_agreed()
            if agreed and known is not None:
                written = await self._write_under(known, None)
        if written is None:
            with in_phase("plan"):
                plan = await ranks.compile()
            if ranks.captured is request.prepared.captured:
                # for the saves to come, whatever becomes of this one
                self._carryover.latest = plan, ranks.captured.known
            else:  # its planner is asked anew in each save
                self._made = Prepared.of_made(ranks.captured)
            written = await self._write_under(plan, None)
            assert written is not None
        commit = Commit(
            request,
            services,
            self._carryover,
            uid=self._uid,
            directory=self._directory,
            comparison=self._comparison,
            attachments=self._attachments,
        )
        with in_phase("commit"):
            return await commit.run(written)

    async def _lead(self, plan: CompiledPlan) -> None:
        """Ranks that are told to go on write at once, and must find the directory leased."""
        with in_phase("write"):
            await self._directory.open(plan.layout)

    async def _write_under(
        self, plan: CompiledPlan, is_agreed: Callable[[], Awaitable[bool]] | None
    ) -> Written | None:
        """Stage and write what ``plan`` says. None if ``is_agreed``, asked meanwhile, says that it does not
        hold: then what was staged is dropped, and the state still held."""
        self._flow = _Flow(
            plan,
            self._request,
            self._services,
            self._directory,
            self._comparison,
            self._attachments,
            self._staged,
            self._made,
        )
        return await self._flow.run(is_agreed)

    def _staged(self, nbytes: int) -> None:
        """All of this rank's share lies in the pool, and nothing stands in the way of the save so far."""
        self._let_go()
        self.staged_seconds = time.monotonic() - self._request.started
        response = self._request.response
        self._services.observe(
            SaveStaged(
                checkpoint_id=response.checkpoint_id,
                step=response.step,
                nbytes=nbytes,
                seconds=self.staged_seconds,
            )
        )
        self._request.writer.staged()


class _Flow:
    """Parts on their way from the state through the pool to the storage, under one plan."""

    def __init__(
        self,
        plan: CompiledPlan,
        request: SaveRequest,
        services: SaveServices,
        directory: SaveDirectory,
        comparison: ReplicaComparison,
        attachments: Attachments,
        on_staged: Callable[[int], None],
        made: Prepared | None,
    ) -> None:
        """``made``: what is staged in place of the state, whose memory it may share."""
        self._prepared = made or request.prepared
        self.share: Prepared = self._prepared.share(plan.tensors, plan.leaves)
        """What this rank writes of it."""
        self._plan = plan
        self._request = request
        self._services = services
        self._directory = directory
        self._comparison = comparison
        self._attachments = attachments
        self._on_staged = on_staged
        self._num_parts = num_parts(plan.layout.image_bytes, services.stager.pool.slot_bytes)
        self._job = StageJob(plan=plan, prepared=self.share)
        self._leases: list[Lease] = []
        self._in_flight: set[Run] = set()
        """Runs into whose slots a device may still write."""
        self._begun = anyio.Event()
        """The plan holds, and the directory is leased: parts may be written."""
        self._calm = anyio.Event()
        """No caller waits for staging, so hashing may take CPU."""
        self._file = FileWriter(
            directory.names,
            plan.layout,
            pool=services.stager.pool,
            threads=services.threads,
            timeout=services.timeout,
            progress=functools.partial(_tell_progress, services, request, plan.layout.image_bytes),
        )
        self._replicas: list[Digest] = []

    async def run(self, is_agreed: Callable[[], Awaitable[bool]] | None) -> Written | None:
        """Stage and write all parts; None if ``is_agreed`` says no."""
        pool = self._services.stager.pool
        # as much as all saves that may be pending want at once, so that staging never waits for the disk
        pool.reserve(self._services, self._num_parts * self._services.pending_saves)
        writers = self._services.io_concurrency
        # each staged part holds a slot, so these bounds are never felt: only the pool makes staging wait
        slots = pool.num_slots
        # as far ahead as there is memory, but under a budget, which other saves want their share of
        ahead = _RUNS_AHEAD if pool.has_budget else max(self._num_parts, 1)
        runs: Pipe[Run] = Pipe(ahead)
        staged: Pipe[StagedPart] = Pipe(slots)
        written: Pipe[StagedPart] = Pipe(slots, producers=writers)
        async with anyio.create_task_group() as group:
            group.start_soon(self._begin, is_agreed, group.cancel_scope)
            group.start_soon(self._stage, runs)
            group.start_soon(self._arrive, runs, staged)
            for _ in range(writers):  # one writer waits for the disk while another hands over
                group.start_soon(self._write, staged, written)
            # one: it hashes faster than disks write, and a second would take a core from the trainer
            group.start_soon(self._digest, written)
        if not self._begun.is_set():
            with anyio.CancelScope(shield=True):
                await self.drop_staged()
            return None
        return Written(plan=self._plan, file=self._file, replicas=self._replicas)

    async def drop_staged(self) -> None:
        """Free the slots that are still leased, once no device writes into them."""
        pool, lost = self._services.stager.pool, set[int]()
        in_flight, self._in_flight = self._in_flight, set()
        if in_flight and not await self._services.stager.settle(self._job, patience=self._services.timeout):
            lost = {id(run.lease) for run in in_flight}
        while self._leases:  # emptied, so that an error's frames do not keep the pool's memory
            lease = self._leases.pop()
            pool.release_all(lease, lost=id(lease) in lost)

    async def _begin(
        self, is_agreed: Callable[[], Awaitable[bool]] | None, staging: anyio.CancelScope
    ) -> None:
        """Sweep leftovers and open the transaction, beside staging: no copy need wait for other ranks or a
        directory."""
        with in_phase("plan"):
            if is_agreed is not None and not await is_agreed():
                # writers wait for ``_begun``, so nothing has left the pool
                staging.cancel()
                return
        with in_phase("write"):
            with anyio.CancelScope(shield=True):  # half a sweep would leave what no save has to undo
                await self._directory.sweep()
            await self._directory.open(self._plan.layout)
            self._begun.set()
            # beside the parts, which are the longer way
            await self._attachments.write(self._directory.transaction)

    async def _stage(self, runs: Pipe[Run]) -> None:
        """Copy runs of parts, or queue their copies on devices; the first thing a caller waits for, so
        nothing else may compete with it for cores."""
        stager = self._services.stager
        first = 0
        while first < self._num_parts:
            if stager.pool.full:
                # the copy has to wait for slots, so whoever frees them need not hold back any more
                self._calm.set()
            with in_phase("stage"):
                queued = await stager.enqueue(
                    self._job, first, self._num_parts - first, patience=self._services.timeout
                )
            # before any of them is handed on, which may be cancelled
            self._leases += [run.lease for run in queued]
            self._in_flight |= {run for run in queued if run.arrivals}
            for run in queued:
                await runs.put(run)
                first += run.lease.count
        await runs.close()

    async def _arrive(self, runs: Pipe[Run], staged: Pipe[StagedPart]) -> None:
        """Hand on parts as their bytes have come."""
        stager, pool = self._services.stager, self._services.stager.pool
        async for run in runs:
            with in_phase("stage"):
                await stager.arrive(run, patience=self._services.timeout)
            self._in_flight.discard(run)
            spans = parts_between(run.first, run.lease.count, pool.slot_bytes, self._plan.layout.image_bytes)
            for slot, (offset, nbytes) in enumerate(spans):
                start = slot * pool.slot_bytes
                memory = run.lease.memory(start, start + nbytes)
                await staged.put(StagedPart(run.first + slot, offset, memory, run.lease, slot))
        await staged.close()
        # replicas are read last: the share that is written goes to the disk meanwhile
        with in_phase("stage"):
            await self._comparison.read(self._plan, self._prepared)
            if self._prepared is not self._request.prepared:
                # after the last copy: tensors that a planner gave are watched by those that they are views of
                await self._services.threads.run(self._request.prepared.refuse_changes)
        self._calm.set()
        # that other ranks need a new plan, that a name is taken or a root can't be written, is the caller's
        # business: its state is held for the first, and it is told of the others before save() returns
        await self._begun.wait()
        self._on_staged(self._plan.layout.image_bytes)
        # hashed when the caller has its state back: what was read lies in buffers of the check's own
        self._replicas = await self._comparison.digests()

    async def _write(self, staged: Pipe[StagedPart], written: Pipe[StagedPart]) -> None:
        """Hand parts to the storage as they are. Direct writes take hardly any CPU, so they need not wait for
        staging."""
        await self._begun.wait()
        await self._file.write(self._directory.transaction, staged, written)

    async def _digest(self, written: Pipe[StagedPart]) -> None:
        """Checksum parts and free their slots. Takes CPU, so it waits until no caller waits for staging."""
        await self._calm.wait()
        await self._file.digest(written)


def _tell_progress(services: SaveServices, request: SaveRequest, nbytes: int, written_bytes: int) -> None:
    response = request.response
    services.observe(
        SaveProgress(
            checkpoint_id=response.checkpoint_id,
            step=response.step,
            written_bytes=written_bytes,
            nbytes=nbytes,
        )
    )
