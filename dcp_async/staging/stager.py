"""Staging: from live tensors to parts of a file image, in the slots of a pool.

Enters: a captured state, then a StageJob and a range of parts. Leaves: Runs, whose leased slots hold the
image's bytes. Owns the pool and the thread that copies into it; how it copies is in ``copier``. Invariant: a
slot is given back only when neither a thread nor a device may still write into it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

import anyio
import torch
from torch.distributed.checkpoint.planner import SavePlanner

from .._concurrency import BlockingThreads, StuckThreadError, run_blocking
from ..errors import EngineStateError
from ..formats import BLOCK_BYTES
from ..planning import CompiledPlan
from ..state import PLAIN_TENSORS, Captured, meta_error
from .aside import ASIDE_BYTES, take_snapshots, watched
from .copier import Copier, UnsettledError
from .device import Backend, CaptureInProgressError, Event, TorchBackend
from .job import Run, StageJob
from .memory import Bounce, BufferPool, Lease, Pinner, touch
from .packing import Snapshot
from .prepared import Prepared
from .watch import MutationWatch

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MiB = 1 << 20
_TOUCHED_BYTES = 1 << 30
"""How much memory one call makes: other saves wait for the thread."""
_RUN_PARTS = 8
"""How many parts one run has at most: writing starts after the first, so it is a compromise between few calls
and an early start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingOptions:
    """How a state gets out of the trainer's way."""

    overlap: bool = False
    """Return from ``save()`` after capture and copy during the next forward and backward. Needs the optimizer
    in the state."""
    budget_bytes: int | None = None
    """The most memory that staging holds. None: pending saves x the state, so that staging never waits for
    the disk."""
    part_bytes: int = 32 * MiB
    """The unit of flow, a multiple of 64 KiB. Larger parts cost fewer calls, smaller ones less memory under a
    small budget."""
    pinned: bool | None = None
    """Whether the pool is pinned, which makes copies from an accelerator several times faster. None: for
    states that have tensors on one, and where the system refuses, a line in the log says what to do; True:
    the same, and the line is a warning; False: never, and bytes come through two small pinned buffers. The
    memory of host-only states is never pinned. ``engine.prepare(state)`` pins ahead of the first save."""

    def __post_init__(self) -> None:
        if self.part_bytes < BLOCK_BYTES or self.part_bytes % BLOCK_BYTES:
            raise ValueError(
                f"StagingOptions(part_bytes=...) is a multiple of {BLOCK_BYTES}, not {self.part_bytes}"
            )
        least = self.part_bytes + (ASIDE_BYTES if self.overlap else 0)
        if self.budget_bytes is not None and self.budget_bytes < least:
            raise ValueError(f"StagingOptions(budget_bytes=...) is at least {least}, not {self.budget_bytes}")

    @property
    def pool_bytes(self) -> int | None:
        """What of the budget is for parts; the rest is for tensors copied aside."""
        if self.budget_bytes is None:
            return None
        return self.budget_bytes - (ASIDE_BYTES if self.overlap else 0)


class Stager:
    """Owns the pool and the thread that copies into it.

    ``async with Stager(options) as stager`` may serve several engines; they never close it. An engine that
    was given options makes its own and closes it.
    """

    def __init__(self, options: StagingOptions = StagingOptions(), *, backend: Backend | None = None) -> None:
        self.options = options
        self.backend: Backend = backend or TorchBackend()
        self.pool = BufferPool(slot_bytes=options.part_bytes, budget_bytes=options.pool_bytes)
        self._threads: BlockingThreads | None = None
        self.pinner = Pinner(self.backend, options.pinned)
        self.bounce = Bounce(self.backend)
        self._leaf_bounce = Bounce(self.backend, nbytes=8 * MiB)
        self._leaf_lock = threading.Lock()
        self.copier = Copier(self.backend, self.pinner, self.bounce, keeps_views=options.budget_bytes is None)

    def __repr__(self) -> str:
        return f"<Stager {'open' if self._threads else 'closed'} {self.pool!r}>"

    async def open(self) -> Self:
        """Start the copying thread; a second call does nothing."""
        if self._threads is None:
            # one: a copy of two threads costs the trainer's own more than twice what one of one does
            self._threads = BlockingThreads("dcp_async-stage", 1)
            self.pinner.open()
            if not self.options.overlap:
                self.copier.helper = BlockingThreads("dcp_async-stage-helper", 1)
        return self

    async def close(self) -> None:
        """End the thread and let the pool's memory go. Its engines must be closed before."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        if self.copier.helper is not None:
            self.copier.helper.shutdown()
            self.copier.helper = None
        # behind the threads, since no copy may run, and before the pool lets its pages go
        self.pinner.close()
        self.bounce.close()
        self._leaf_bounce.close()
        self.copier.clear()
        self.pool.close()

    def abandon(self) -> None:
        """Stop waiting for a copy that hangs."""
        if self._threads is not None:
            self._threads.abandon()
        if self.copier.helper is not None:
            self.copier.helper.abandon()
        self.pinner.abandon()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def prepare(
        self,
        captured: Captured,
        plan: CompiledPlan | None = None,
        *,
        planner: SavePlanner | None = None,
    ) -> Prepared:
        """In the caller's thread, right after capture: copies aside what overlap needs, marks the devices'
        queues.

        Args:
            plan: the one that the structure belongs to, if there is one yet.
            planner: the user's, that decides on what is written.
        Raises: CaptureError; CaptureInProgressError.
        """
        cache = captured.known.cache
        if cache.devices is None:
            cache.devices = self.backend.devices(captured.tensors)
            cache.located = list(map(self.backend.device_of, captured.tensors)) if cache.devices else []
        if not cache.is_pinned_known:
            cache.pinned = frozenset(self.backend.pinned_among(captured.tensors))
            cache.is_pinned_known = True
        devices, located = cache.devices, cache.located
        # here, so that save() itself raises: what has no bytes would fail in the copying thread at best
        if any(device.type == "meta" for device in devices):
            names = captured.structure.tensor_names
            raise meta_error(next(n for n, t in zip(names, captured.tensors, strict=True) if t.is_meta))
        streams = {device: self.backend.current_stream(device) for device in devices}
        watch: MutationWatch | None = None
        snapshots: dict[torch.device, Snapshot] = {}
        if self.options.overlap:
            packs = self.copier.packs.known(plan, located) if plan is not None and devices else {}
            snapshots = take_snapshots(captured, packs, streams)
            # a planner sees distributed tensors themselves, so copies of their local parts would hide changes
            in_place = captured.distributed_parts() if planner is not None else frozenset()
            captured, watch = watched(captured, located, snapshots, streams, in_place)
        # after the copies aside, which are queued on the devices as well
        events = {device: stream.record() for device, stream in streams.items()}
        return Prepared(
            captured=captured,
            events=events,
            watch=watch,
            located=located,
            snapshots=snapshots,
            arrivals=[*events.values(), *self._queued(devices)] if cache.pinned else [],
            planner=planner,
        )

    def _queued(self, besides: Collection[torch.device]) -> list[Event]:
        """What the caller has queued on its current device, if that is none of ``besides``."""
        device = self.backend.current_device()
        if device is None or device in besides:
            return []
        try:
            return [self.backend.record(device)]
        except CaptureInProgressError:
            # it is recording: what it queued before was done when it began, what it queues now does not run
            return []

    def queued_for(self, tensors: Sequence[torch.Tensor]) -> list[Event]:
        """What the caller has queued that may still fill, or read, those of ``tensors`` that lie in pinned
        host memory."""
        if self.backend.current_device() is None:
            return []
        # of other kinds not all answer whether they are pinned
        plain = [
            tensor
            for tensor in tensors
            if type(tensor) in PLAIN_TENSORS
            and tensor.is_cpu
            and tensor.layout is torch.strided
            and not tensor.is_nested
        ]
        if not self.backend.pinned_among(plain):
            return []
        devices = {device for device in self.backend.devices(tensors) if device.type != "meta"}
        return [*map(self.backend.record, devices), *self._queued(devices)]

    def leaf_fetch(
        self,
    ) -> Callable[[Sequence[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]], None] | None:
        """What brings leaves that are pickled from devices to the host; None where no device is in use."""
        return self._fetch if self.backend.current_device() is not None else None

    def _fetch(
        self, sources: Sequence[torch.Tensor], target_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Copy those of ``sources`` that lie on devices, in the order of the caller's current streams, and
        wait. Raises CaptureInProgressError; what a device says."""
        pairs: defaultdict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for source, device in zip(sources, map(self.backend.device_of, sources), strict=True):
            if device is not None:
                pairs[device].append((target_of(source), source))
        for device, on_device in pairs.items():
            stream = self.backend.current_stream(device)
            # threads of several callers may be here, and the copying thread has buffers of its own
            with self._leaf_lock:
                self._leaf_bounce.copy_to_host(stream, *zip(*on_device, strict=True))

    async def enqueue(self, job: StageJob, first: int, count: int, *, patience: float) -> list[Run]:
        """Copy up to ``count`` parts from ``first`` on into slots of the pool, or queue their copies on the
        devices; the runs tell how many. ``patience`` in seconds.

        Waits for a free slot if there is none. What lies on devices is queued as far ahead as there are free
        slots; under a budget a run at a time. Cancellation: the copy in progress is joined, then the slots
        are free again.

        Raises: MutatedTensors; StuckThreadError, after which the slots are lost.
        """
        threads = self._open_threads()
        leases = [await self.pool.lease(min(count, _RUN_PARTS))]
        try:
            if job.is_on_device and not self.pool.has_budget:
                # all in one call: the devices are never idle for want of the GIL
                self._lease_more(leases, count)
            return await run_blocking(threads, patience, self.copier.enqueue, job, first, leases)
        except BaseException as error:
            # the thread that hangs, or a device, may still write into them
            lost = isinstance(error, (StuckThreadError, UnsettledError))
            if not lost:  # a cancellation comes when all is queued
                with anyio.CancelScope(shield=True):
                    lost = not await self.settle(job, patience=patience)
            for lease in leases:
                self.pool.release_all(lease, lost=lost)
            raise

    async def rehearse(self, job: StageJob, *, patience: float) -> None:
        """Stage all of ``job``, and let go of it: what saves of its plan need is there afterwards, memory
        (pinned, if a device copies to it), views, constant bytes.

        Cancellation and errors: as ``enqueue``; what was made stays.
        """
        await self._make_memory(job, patience=patience)
        first, count = 0, num_parts(job.plan.layout.image_bytes, self.pool.slot_bytes)
        while first < count:
            runs = await self.enqueue(job, first, count - first, patience=patience)
            is_settled = False
            try:
                for run in runs:
                    await self.arrive(run, patience=patience)
                is_settled = True
            finally:
                if not is_settled:
                    with anyio.CancelScope(shield=True):
                        is_settled = await self.settle(job, patience=patience)
                for run in runs:
                    self.pool.release_all(run.lease, lost=not is_settled)
            first += sum(run.lease.count for run in runs)

    async def _make_memory(self, job: StageJob, *, patience: float) -> None:
        """All of the pool's memory, also what a second save in flight will use."""
        # the first lease maps what was reserved
        self.pool.release_all(await self.pool.lease(1))
        for arena in self.pool.arenas:
            if job.is_on_device:
                pinning = self.pinner.want(arena, min(job.prepared.events, key=str))
                if await asyncio.wrap_future(pinning):  # which makes the memory, too
                    continue
            for start in range(0, arena.nbytes, _TOUCHED_BYTES):
                stop = min(start + _TOUCHED_BYTES, arena.nbytes)
                if not await self.run(patience, touch, arena, start, stop):
                    break

    def _lease_more(self, leases: list[Lease], count: int) -> None:
        """Until they are ``count`` slots, or no more are free."""
        while (left := count - sum(lease.count for lease in leases)) > 0:
            if (lease := self.pool.lease_now(min(left, _RUN_PARTS))) is None:
                return
            leases.append(lease)

    async def arrive(self, run: Run, *, patience: float) -> None:
        """Return once all bytes of ``run`` are in its slots, which are then the caller's.

        Raises: MutatedTensors; StuckThreadError; what a device says.
        """
        if not run.arrivals:
            return
        try:
            await run_blocking(self._open_threads(), patience, self.copier.wait, run)
        except StuckThreadError:
            run.job.is_stuck = True
            raise

    async def settle(self, job: StageJob, *, patience: float) -> bool:
        """Whether no device writes into slots of ``job`` any more; waits for it. Never raises."""
        if not job.is_on_device:
            return True
        if job.is_stuck:  # it was waited for, and did not answer
            return False
        try:
            await run_blocking(self._open_threads(), patience, self.copier.settle, job)
        except (StuckThreadError, UnsettledError) as error:
            logger.warning("staging buffers are given up, a device may still write into them: %s", error)
            return False
        return True

    def _open_threads(self) -> BlockingThreads:
        if self._threads is None:
            raise EngineStateError(
                "the stager is closed; keep `async with Stager(...)` open around its engines"
            )
        return self._threads

    async def run(self, patience: float, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn`` in the thread that copies, after what it is at. Cancellation: joins it. Raises
        StuckThreadError."""
        return await run_blocking(self._open_threads(), patience, fn, *args, **kwargs)


def parts_between(first: int, count: int, slot_bytes: int, image_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) in the image of each of ``count`` parts from ``first`` on."""
    for part in range(first, first + count):
        start = part * slot_bytes
        yield start, min(slot_bytes, image_bytes - start)


def num_parts(image_bytes: int, slot_bytes: int) -> int:
    """How many parts an image has."""
    return -(-image_bytes // slot_bytes)
