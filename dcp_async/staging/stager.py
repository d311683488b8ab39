"""Staging: from live tensors to parts of a file image, one batched copy per run of parts.

Enters: a StageJob (plan, prepared state) and a range of parts. Leaves: leased slots that hold the image's
bytes, constant bytes included. Invariant: once a job's last part is staged nothing refers to the trainer's
tensors any more. Few, large calls: beside a busy Python thread each release of the GIL costs up to 5 ms.
"""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

import torch

from .._concurrency import BlockingThreads, StuckThreadError, run_blocking
from .._geometry import flat_slices
from ..errors import EngineStateError
from ..formats import BLOCK_BYTES
from ..planning import CompiledPlan
from ..state import Captured, meta_error
from .buffer_pool import Arena, BufferPool, Lease
from .device import Backend, Event, Stream, TorchBackend
from .mutation_watch import MutationWatch
from .prepared import ASIDE_BYTES, Prepared, watched
from .vectored_copy import RefusedError
from .views import BatchViews, ViewCache

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MiB = 1 << 20


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
    """Pin the pool for copies from an accelerator. None: if there is one."""

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


@dataclass(slots=True, kw_only=True)
class StageJob:
    """What one save stages."""

    plan: CompiledPlan
    prepared: Prepared
    """What this rank writes."""
    items: list[bytes] = field(default_factory=list)
    """Padded items of the leaves, made by the first copy: not in the trainer's time."""


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
        self._helper: BlockingThreads | None = None
        self.has_vectored_copy = True
        """Whether the kernel copies small tensors for us."""
        self._views = ViewCache(keeps=options.budget_bytes is None)
        self._pinned: Arena | None = None
        self._pinned_at: tuple[torch.device, int] = (torch.device("cpu"), 0)

    def __repr__(self) -> str:
        return f"<Stager {'open' if self._threads else 'closed'} {self.pool!r}>"

    async def open(self) -> Self:
        """Start the copying thread; a second call does nothing."""
        if self._threads is None:
            # one: a copy of two threads costs the trainer's own more than twice what one of one does
            self._threads = BlockingThreads("dcp_async-stage", 1)
            if not self.options.overlap:
                self._helper = BlockingThreads("dcp_async-stage-helper", 1)
        return self

    async def close(self) -> None:
        """End the thread and let the pool's memory go. Its engines must be closed before."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        if self._helper is not None:
            self._helper.shutdown()
            self._helper = None
        # before the pool lets its pages go: CUDA must not keep a registration of what is unmapped
        if self._pinned is not None:
            self.backend.unpin(*self._pinned_at)
            self._pinned = None
        self._views.clear()
        self.pool.close()

    def abandon(self) -> None:
        """Stop waiting for a copy that hangs."""
        if self._threads is not None:
            self._threads.abandon()
        if self._helper is not None:
            self._helper.abandon()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def prepare(self, captured: Captured) -> Prepared:
        """In the caller's thread, right after capture: copies aside what overlap needs, marks the devices'
        queues."""
        cache = captured.known.cache
        devices = cache.devices
        if devices is None:
            devices = cache.devices = self.backend.devices(captured.tensors)
        # here, so that save() itself raises: what has no bytes would fail in the copying thread at best
        if any(device.type == "meta" for device in devices):
            names = captured.structure.tensor_names
            raise meta_error(next(n for n, t in zip(names, captured.tensors, strict=True) if t.is_meta))
        watch: MutationWatch | None = None
        if self.options.overlap:
            captured, watch = watched(captured)
        # after the copies aside, which are queued on the devices as well
        events = {device: self.backend.record(device) for device in devices}
        return Prepared(captured=captured, events=events, watch=watch)

    async def stage(self, job: StageJob, first: int, count: int, *, patience: float) -> Lease:
        """Stage up to ``count`` parts from ``first`` on; the lease tells how many. ``patience`` in seconds.

        Cancellation: the copy in progress is joined, then the slots are free again.
        Raises: MutatedTensors; StuckThreadError, after which the slots are lost.
        """
        if self._threads is None:
            raise EngineStateError(
                "the stager is closed; keep `async with Stager(...)` open around its engines"
            )
        lease = await self.pool.lease(count)
        try:
            await run_blocking(self._threads, patience, self._copy, job, first, lease)
        except StuckThreadError:
            # the thread that hangs may still write into them
            for index in range(lease.count):
                self.pool.release(lease, index, lost=True)
            raise
        except BaseException:
            self.pool.release_all(lease)
            raise
        return lease

    def _copy(self, job: StageJob, first: int, lease: Lease) -> None:
        layout, arena = job.plan.layout, lease.arena
        start = first * lease.slot_bytes
        stop = min(start + lease.count * lease.slot_bytes, layout.image_bytes)
        # in each copy, since a pool that grew has another arena
        self._pin(arena, job.prepared.events)
        marks = [(job.plan, first + number) for number in range(lease.count)]
        slots = slice(lease.first, lease.first + lease.count)
        if arena.resident[slots] != marks:
            arena.resident[slots] = [None] * lease.count  # until the slots are whole again
            layout.fill_constants(lease.memory(0, stop - start), start)
        self._copy_leaves(job, start, stop, lease)
        views = self._copy_small(job, first, stop, lease)
        tensors = job.prepared.captured.tensors
        sources = list(views.whole.pick(tensors))
        targets = list(views.targets)
        for index in views.cut.indices:
            for source, target in self._cut(job, index, start, stop, lease):
                sources.append(source)
                targets.append(target)
        # all at once: beside a busy trainer each call waits for the GIL, 5 ms
        self.copy_tensors(job.prepared.events, targets, sources)
        self._check_changed(job.prepared, views, is_last=stop == layout.image_bytes)
        arena.resident[slots] = marks  # the next save of this plan finds the constant bytes there

    def _copy_leaves(self, job: StageJob, start: int, stop: int, lease: Lease) -> None:
        """What of the leaves lies in the image's bytes [start, stop)."""
        memory = lease.memory(0, stop - start)
        if not job.items:
            job.items = job.plan.padded(job.prepared.captured.leaf_items)
        for (offset, length), item in zip(job.plan.layout.rooms(), job.items, strict=True):
            low, high = max(offset, start), min(offset + length, stop)
            if low < high:
                memory[low - start : high - start] = item[low - offset : high - offset]

    def _copy_small(self, job: StageJob, first: int, stop: int, lease: Lease) -> BatchViews:
        """Let the kernel copy the small tensors; the views say what is left to torch."""
        prepared = job.prepared
        # to the kernel the address of an accelerator's memory means nothing
        vectored = self.has_vectored_copy and prepared.captured.pointers is not None and not prepared.events
        views = self._views.views(job.plan, first, stop, lease, vectored=vectored)
        self._check_memory(prepared, views)
        try:
            self._copy_vectored(views, prepared.captured)
        except RefusedError as error:
            # the kernel refuses memory that is gone as well, which says nothing of the next save
            prepared.refuse(prepared.displaced(views.small))
            self.give_up_vectored_copy(error)
            views = self._views.views(job.plan, first, stop, lease, vectored=False)
            self._check_memory(prepared, views)
        return views

    def _copy_vectored(self, views: BatchViews, captured: Captured) -> None:
        """Copy the small tensors. Raises RefusedError."""
        vectored = views.vectored
        if vectored is None:
            return
        assert captured.pointers is not None
        vectored.read_from(views.small.pick(captured.pointers))
        # while the trainer waits its core is free; beside a running one a second thread costs more than it
        # gives
        half = vectored.num_calls // 2 if self._helper is not None else 0
        if not half or self._helper is None:
            vectored.copy(0, vectored.num_calls)
            return
        rest = self._helper.submit(vectored.copy, half, vectored.num_calls)
        try:
            vectored.copy(0, half)
        finally:
            concurrent.futures.wait([rest])  # it writes into the slots, so they are not given up before
        rest.result()

    def _cut(
        self, job: StageJob, index: int, start: int, stop: int, lease: Lease
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(source, target) boxes of a tensor that reaches over the run's ends."""
        # made in each copy, and not kept as other views are: at most two tensors reach over the ends of a run
        layout, tensor = job.plan.layout, job.prepared.captured.tensors[index].detach()
        size = tensor.dtype.itemsize
        payload = layout.payload_offsets[index]
        low = max(start - payload, 0) // size
        high = min(stop - payload, layout.payload_bytes[index]) // size
        flat = lease.arena.typed(tensor.dtype)
        base = (lease.offset + payload - start) // size
        if tensor.is_contiguous():
            yield tensor.view(-1)[low:high], flat[base + low : base + high]
            return
        for box, begin, end in flat_slices(tensor.shape, low, high):
            source = tensor[box]
            yield source, flat[base + begin : base + end].view(source.shape)

    def give_up_vectored_copy(self, error: RefusedError) -> None:
        """The kernel does not copy for us, here and in later saves."""
        logger.info("small tensors are copied one by one: %s", error)
        self.has_vectored_copy = False

    async def run(self, patience: float, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn`` in the thread that copies, after what it is at. Cancellation: joins it. Raises
        StuckThreadError."""
        assert self._threads is not None
        return await run_blocking(self._threads, patience, fn, *args, **kwargs)

    def copy_tensors(
        self, events: dict[torch.device, Event], targets: list[torch.Tensor], sources: list[torch.Tensor]
    ) -> None:
        """Copy, from the devices as they were at ``events``; in the thread that copies."""
        if events:
            pairs = list(zip(targets, sources, strict=True))
            streams = [self._enqueue(device, event, pairs) for device, event in events.items()]
            for stream in streams:
                stream.synchronize()
            pairs = [pair for pair in pairs if self.backend.device_of(pair[1]) is None]
            targets, sources = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if sources:
            torch._foreach_copy_(targets, sources)

    def _enqueue(
        self, device: torch.device, event: Event, pairs: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> Stream:
        stream = self.backend.stream(device, "save")
        stream.wait_event(event)
        on_device = [pair for pair in pairs if self.backend.device_of(pair[1]) == device]
        if on_device:
            stream.copy(*map(list, zip(*on_device, strict=True)))
        return stream

    def _check_memory(self, prepared: Prepared, views: BatchViews) -> None:
        """A storage may have been freed since capture. Of the small tensors the kernel tells; of the others
        only a crash would."""
        if prepared.watch is not None:  # else the trainer waits
            prepared.refuse(prepared.displaced(views.whole) | prepared.displaced(views.cut))

    def _check_changed(self, prepared: Prepared, views: BatchViews, *, is_last: bool) -> None:
        """Looked at after the copy: what was changed while it ran counts too. Raises MutatedTensors."""
        if prepared.watch is None:
            return
        changed: set[int] = set()
        for selection in (views.whole, views.cut, views.small):
            changed |= prepared.changed(selection)
        # not before: of what changes between a look and a later copy nothing would be seen
        if is_last:
            changed |= prepared.changed_unseen()
        prepared.refuse(changed)

    def _pin(self, arena: Arena, devices: Collection[torch.device]) -> None:
        if self.options.pinned is False or self._pinned is arena or not devices:
            return
        if self._pinned is not None:
            self.backend.unpin(*self._pinned_at)
            self._pinned = None
        device = next(iter(devices))
        if self.backend.pin(device, arena.tensor.data_ptr(), arena.tensor.nbytes):
            self._pinned, self._pinned_at = arena, (device, arena.tensor.data_ptr())


def parts_between(first: int, count: int, slot_bytes: int, image_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) in the image of each of ``count`` parts from ``first`` on."""
    for part in range(first, first + count):
        start = part * slot_bytes
        yield start, min(slot_bytes, image_bytes - start)


def num_parts(image_bytes: int, slot_bytes: int) -> int:
    """How many parts an image has."""
    return -(-image_bytes // slot_bytes)
