"""Staging: from live tensors to parts of a file image, one batched copy per run of parts.

Enters: a StageJob (plan, tensors, pickled leaves) and a range of parts. Leaves: leased slots that hold the
image's bytes, constant bytes included. Invariant: once a job's last part is staged nothing refers to the
trainer's tensors any more. Few, large calls: beside a busy Python thread each release of the GIL costs up to
5 ms.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

import torch

from .._concurrency import BlockingThreads, StuckThreadError, run_blocking
from .._geometry import contiguous_strides, flat_slices
from ..errors import EngineStateError
from ..formats import BLOCK_BYTES
from ..planning import CompiledPlan
from ..state import Captured, Watch, meta_error, padded_items, versions_of
from .buffer_pool import Arena, BufferPool, Lease
from .byte_sample import ByteSample, places_to_sample
from .device import Backend, Event, TorchBackend
from .vectored_copy import Gather, RefusedError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MiB = 1 << 20
_SMALL_BYTES = 64 * 1024
"""Up to here a tensor is gathered."""
_ASIDE_TENSOR_BYTES = 64 * 1024
_ASIDE_BYTES = 8 * MiB
_KEPT_PLANS = 4
"""For how many plans views are kept: several engines may share a stager."""


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
        least = self.part_bytes + (_ASIDE_BYTES if self.overlap else 0)
        if self.budget_bytes is not None and self.budget_bytes < least:
            raise ValueError(f"StagingOptions(budget_bytes=...) is at least {least}, not {self.budget_bytes}")

    @property
    def pool_bytes(self) -> int | None:
        """What of the budget is for parts; the rest is for tensors copied aside."""
        if self.budget_bytes is None:
            return None
        return self.budget_bytes - (_ASIDE_BYTES if self.overlap else 0)


class MutatedTensors(Exception):
    """Tensors whose version moved between capture and staging; ``names`` says which."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(", ".join(names))
        self.names = tuple(names)


@dataclass(slots=True, kw_only=True)
class StageJob:
    """What one save stages."""

    plan: CompiledPlan
    captured: Captured
    events: dict[torch.device, Event]
    """Per accelerator, the moment of capture."""
    items: list[bytes] = field(default_factory=list)
    """Padded items of the leaves."""


@dataclass(slots=True)
class _BatchViews:
    """Where the tensors of a run of parts go; kept with the slots, since making views costs more than copying
    small tensors."""

    indices: list[int] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    """Tensors that reach over the run's ends."""
    small: list[int] = field(default_factory=list)
    """Tensors that ``gather`` copies."""
    gather: Gather | None = None

    def gathers(self, pointers: list[int]) -> list[int]:
        """Of these, the addresses of the small tensors; the same list if that is all of them."""
        if len(self.small) == len(pointers):
            return pointers
        return [pointers[index] for index in self.small]


@dataclass(slots=True)
class _PlanViews:
    """The views of one plan, by run and place; holding plan and arena keeps their ids from being used
    again."""

    plan: CompiledPlan
    batches: dict[tuple[int, int, int, int, bool], tuple[Arena, _BatchViews]] = field(default_factory=dict)


def _make_views(plan: CompiledPlan, start: int, stop: int, lease: Lease, small_bytes: int) -> _BatchViews:
    """Where the tensors go that overlap the image's bytes [start, stop); those up to ``small_bytes`` are
    gathered."""
    layout, structure = plan.layout, plan.structure
    views = _BatchViews()
    base = lease.arena.tensor.data_ptr() + lease.offset - start
    run_starts: list[int] = []
    alone = True
    for index in layout.tensors_between(start, stop):
        low, nbytes = layout.payload_offsets[index], layout.payload_bytes[index]
        if nbytes == 0:
            continue
        piece = plan.tensors[index]
        if low < start or low + nbytes > stop:
            views.cut.append(index)
            alone = True
        elif nbytes <= small_bytes and structure.strides[piece] is None:
            if alone:
                run_starts.append(len(views.small))
            views.small.append(index)
            alone = False
        else:
            dtype, shape = structure.dtypes[piece], structure.shapes[piece]
            flat = lease.arena.typed(dtype)
            at = (lease.offset + low - start) // dtype.itemsize
            views.indices.append(index)
            views.targets.append(flat.as_strided(shape, contiguous_strides(shape), at))
            alone = True
    if views.small:
        targets = [base + layout.payload_offsets[index] for index in views.small]
        views.gather = Gather(targets, [layout.payload_bytes[index] for index in views.small], run_starts)
    return views


def _differing(indices: list[int], now: Sequence[object], expected: Sequence[object]) -> set[int]:
    """The indices at which two lists differ."""
    if now == expected:  # compared in C, since it is so nearly always
        return set()
    return {index for index, *pair in zip(indices, now, expected, strict=True) if pair[0] != pair[1]}


def copy_aside(captured: Captured) -> None:
    """Replace small tensors by copies, smallest first: a forward changes those (BatchNorm's counters), and
    they are cheap.

    Records the version of every other tensor. Call before the events are recorded, so that copies on a device
    come first.
    """
    tensors = captured.tensors
    versions = versions_of(tensors)
    smallest = captured.structure.cache.smallest(tensors, _ASIDE_TENSOR_BYTES, _ASIDE_BYTES)
    with torch.no_grad():
        copies = list(map(torch.Tensor.clone, [tensors[index] for index in smallest]))
    for index, copy, version in zip(smallest, copies, versions_of(copies), strict=True):
        tensors[index], versions[index] = copy, version
    if captured.pointers is not None:
        captured.pointers = captured.pointers.copy()
        for index, pointer in zip(smallest, map(torch.Tensor.data_ptr, copies), strict=True):
            captured.pointers[index] = pointer
    captured.versions = versions
    structure = captured.structure
    captured.watch = Watch.of(captured.live, structure.tensor_names, smallest)
    if captured.pointers is not None:
        cache = structure.cache
        if cache.places is None:
            row_major = [strides is None for strides in structure.strides]
            cache.places = places_to_sample([tensor.nbytes for tensor in tensors], row_major, smallest)
        with contextlib.suppress(RefusedError):  # then there is no sample, and the counters alone tell
            captured.watch.sample = ByteSample.take(cache.places, captured.pointers)


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
        self.gathers = True
        """Whether the kernel copies small tensors for us."""
        self._views: OrderedDict[int, _PlanViews] = OrderedDict()
        self._pinned: Arena | None = None

    def __repr__(self) -> str:
        return f"<Stager {'open' if self._threads else 'closed'} {self.pool!r}>"

    async def open(self) -> Self:
        """Start the copying thread; a second call does nothing."""
        if self._threads is None:
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
        if self._pinned is not None:
            self.backend.unpin(self._pinned.tensor.data_ptr())
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

    def prepare(self, captured: Captured) -> dict[torch.device, Event]:
        """In the caller's thread, right after capture: copies aside what overlap needs, marks the devices'
        queues."""
        cache = captured.structure.cache
        devices = cache.devices
        if devices is None:
            devices = cache.devices = self.backend.devices(captured.tensors)
        if any(device.type == "meta" for device in devices):
            names = captured.structure.tensor_names
            raise meta_error(next(n for n, t in zip(names, captured.tensors, strict=True) if t.is_meta))
        if self.options.overlap:
            copy_aside(captured)
        return {device: self.backend.record(device) for device in devices}

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
        memory = lease.memory(0, stop - start)
        self._pin(arena)
        marks = [(job.plan, first + index) for index in range(lease.count)]
        here = slice(lease.first, lease.first + lease.count)
        if arena.resident[here] != marks:
            arena.resident[here] = [None] * lease.count
            layout.fill_constants(memory, start)
        if not job.items:
            job.items = list(padded_items(job.captured, job.plan.reserved_bytes))
        for (offset, length), item in zip(layout.slots(), job.items, strict=True):
            low, high = max(offset, start), min(offset + length, stop)
            if low < high:
                memory[low - start : high - start] = item[low - offset : high - offset]
        views = self._batch_views(job, first, start, stop, lease)
        self._check_memory(job, views)
        try:
            self._gather(views, job.captured)
        except RefusedError as error:
            # the kernel refuses memory that is gone as well, which says nothing of the next save
            self._check_freed(job, [views.small])
            self.gather_no_more(error)
            views = self._batch_views(job, first, start, stop, lease)
            self._check_memory(job, views)
        sources = [job.captured.tensors[index] for index in views.indices]
        targets = list(views.targets)
        for index in views.cut:
            for source, target in self._cut(job, index, start, stop, lease):
                sources.append(source)
                targets.append(target)
        self.copy_tensors(job.events, targets, sources)
        self._check_versions(job, views, whole=stop == layout.image_bytes)
        arena.resident[here] = marks

    def _batch_views(self, job: StageJob, first: int, start: int, stop: int, lease: Lease) -> _BatchViews:
        plan = job.plan
        kept = self._views.get(id(plan))
        gathers = self.gathers and job.captured.pointers is not None and not job.events
        key = (first, id(lease.arena), lease.first, lease.count, gathers)
        if kept is not None and key in kept.batches:
            self._views.move_to_end(id(plan))
            return kept.batches[key][1]
        views = _make_views(plan, start, stop, lease, _SMALL_BYTES if gathers else 0)
        # a small budget deals slots out in ever new combinations; views of those would only pile up
        if self.options.budget_bytes is None:
            kept = self._views.setdefault(id(plan), _PlanViews(plan))
            kept.batches[key] = (lease.arena, views)
            if len(self._views) > _KEPT_PLANS:
                self._views.popitem(last=False)
        return views

    def _gather(self, views: _BatchViews, captured: Captured) -> None:
        """Copy the small tensors. Raises RefusedError."""
        gather = views.gather
        if gather is None:
            return
        assert captured.pointers is not None
        gather.aim(views.gathers(captured.pointers))
        # while the trainer waits its core is free; beside a running one a second thread costs more than it
        # gives
        half = gather.num_calls // 2 if self._helper is not None else 0
        if not half or self._helper is None:
            gather.copy(0, gather.num_calls)
            return
        rest = self._helper.submit(gather.copy, half, gather.num_calls)
        try:
            gather.copy(0, half)
        finally:
            concurrent.futures.wait([rest])
        rest.result()

    def _cut(
        self, job: StageJob, index: int, start: int, stop: int, lease: Lease
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(source, target) boxes of a tensor that reaches over the run's ends."""
        layout, tensor = job.plan.layout, job.captured.tensors[index].detach()
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

    def gather_no_more(self, error: RefusedError) -> None:
        """The kernel does not copy for us."""
        logger.info("small tensors are copied one by one: %s", error)
        self.gathers = False

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
            away = [pair for pair in pairs if not self.backend.is_on_host(pair[1])]
            for device, event in events.items():
                there = away if len(events) == 1 else [pair for pair in away if pair[1].device == device]
                if there:
                    self.backend.copy_to_host(device, event, *map(list, zip(*there, strict=True)))
            pairs = [pair for pair in pairs if self.backend.is_on_host(pair[1])]
            targets, sources = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if sources:
            torch._foreach_copy_(targets, sources)

    def _check_memory(self, job: StageJob, views: _BatchViews) -> None:
        """A storage may have been freed since capture; but for the small ones, only a crash would tell."""
        if job.captured.versions is not None:  # else the trainer waits
            self._check_freed(job, (views.indices, views.cut))

    def _check_freed(self, job: StageJob, groups: Sequence[list[int]]) -> None:
        """Raises MutatedTensors for tensors that lie elsewhere than at capture, or nowhere."""
        captured = job.captured
        moved: set[int] = set()
        for indices in groups:
            now = list(map(torch.Tensor.data_ptr, [captured.tensors[index] for index in indices]))
            if captured.pointers is not None:
                moved |= _differing(indices, now, [captured.pointers[index] for index in indices])
            elif not all(now):
                moved |= {index for index, address in zip(indices, now, strict=True) if not address}
        if moved:
            raise MutatedTensors([job.plan.names[index] for index in sorted(moved)])

    def _check_versions(self, job: StageJob, views: _BatchViews, *, whole: bool) -> None:
        """``whole``: these are the last. Raises MutatedTensors."""
        captured = job.captured
        versions = captured.versions
        if versions is None:
            return
        moved: set[int] = set()
        for indices in (views.indices, views.cut, views.small):
            tensors = [captured.tensors[index] for index in indices]
            expected = [versions[index] for index in indices]
            moved |= _differing(indices, versions_of(tensors), expected) | captured.watch.moved(indices)
            if captured.pointers is not None:  # other memory than was captured
                now, known = list(map(torch.Tensor.data_ptr, tensors)), captured.pointers
                small = indices is views.small
                moved |= _differing(
                    indices, now, views.gathers(known) if small else [known[index] for index in indices]
                )
        if whole:
            moved |= captured.watch.changed_unseen(captured.tensors, versions)
        if moved:
            raise MutatedTensors([job.plan.names[index] for index in sorted(moved)])

    def _pin(self, arena: Arena) -> None:
        wanted = torch.accelerator.is_available() if self.options.pinned is None else self.options.pinned
        if wanted and self._pinned is not arena:
            if self._pinned is not None:
                self.backend.unpin(self._pinned.tensor.data_ptr())
                self._pinned = None
            if self.backend.pin(arena.tensor.data_ptr(), arena.tensor.nbytes):
                self._pinned = arena


def parts_between(first: int, count: int, slot_bytes: int, image_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) in the image of each of ``count`` parts from ``first`` on."""
    for part in range(first, first + count):
        start = part * slot_bytes
        yield start, min(slot_bytes, image_bytes - start)


def num_parts(image_bytes: int, slot_bytes: int) -> int:
    """How many parts an image has."""
    return -(-image_bytes // slot_bytes)
