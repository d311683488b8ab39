"""Fills leased slots with parts of a file image. For the copying thread alone.

Enters: a StageJob and leases. Leaves: Runs. What lies in host memory is in the slots when ``enqueue``
returns; what lies on a device is queued there, behind the state's capture, and is in the slots after
``wait``. Invariant: once a job's last run has arrived nothing refers to the trainer's tensors any more. Few,
large calls: beside a busy Python thread each release of the GIL costs up to 5 ms.
"""

from __future__ import annotations

import concurrent.futures
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from .._concurrency import BlockingThreads
from .._geometry import flat_slices
from ..state import Captured
from .device import Backend, Event, Stream
from .job import Run, StageJob
from .memory import Bounce, Lease, Pinner
from .packing import NO_PACKS, Packs, Snapshot
from .prepared import Prepared
from .vectored_copy import RefusedError
from .views import BatchViews, DeviceViews, Placement, ViewCache

logger = logging.getLogger(__name__)

Events = Mapping[torch.device, Event]
Pairs = tuple[list[torch.Tensor], list[torch.Tensor]]
"""(targets, sources)"""


class UnsettledError(Exception):
    """A device may still write into slots, and does not say when it is done."""


class Copier:
    """Owns what is made once for the copies of a plan: views and packs."""

    def __init__(self, backend: Backend, pinner: Pinner, bounce: Bounce, *, keeps_views: bool) -> None:
        self._backend = backend
        self._pinner = pinner
        self._bounce = bounce
        self._views = ViewCache(keeps=keeps_views)
        self.packs = Packs()
        self.helper: BlockingThreads | None = None
        """Takes half of the small tensors, while the trainer waits."""
        self.has_vectored_copy = True
        """Whether the kernel copies small tensors for us."""

    def clear(self) -> None:
        """Let memory go."""
        self._views.clear()
        self.packs.clear()

    def enqueue(self, job: StageJob, first: int, leases: Sequence[Lease]) -> list[Run]:
        """Copy the parts from ``first`` on into the slots of ``leases``, one run into each.

        Raises: MutatedTensors; what a device says, once its queued copies have ended; UnsettledError if they
        may not have.
        """
        streams = self._ordered(job.prepared.events)
        runs: list[Run] = []
        try:
            job.prepared.await_arrivals()
            if job.sample is None and job.prepared.watch is not None:
                job.sample = job.prepared.watch.device_sample.fetch(self._backend, streams)
            if job.placement is None:
                job.placement = self._pack(job, streams)
            for lease in leases:
                if streams:
                    # in each copy, since a pool that grew has another arena
                    self._pinner.want(lease.arena, min(streams, key=str))
                runs.append(self._copy(job, first, lease, streams))
                first += lease.count
        except BaseException as error:
            # of the batch that failed, part may be queued, and its slots are about to be given up
            self._drain(streams.values(), error)
            raise
        return runs

    def wait(self, run: Run) -> None:
        """Return once the bytes of ``run`` are in its slots. Raises MutatedTensors; what a device says."""
        for event in run.arrivals:
            event.synchronize()
        self._finish(run)

    def settle(self, job: StageJob) -> None:
        """Return once no device writes into slots of ``job`` any more. Raises UnsettledError."""
        self._drain([self._backend.stream(device, "save") for device in job.prepared.events], None)

    def copy_tensors(self, events: Events, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """Copy, from the devices as they were at ``events``; returns when the bytes are there."""
        streams = self._ordered(events)
        try:
            for device, pairs in self._sorted(events, targets, sources).items():
                if device is None:
                    torch._foreach_copy_(*pairs)
                else:  # into memory that is not the pool's, so it is not pinned
                    self._bounce.copy_to_host(streams[device], *pairs)
        finally:
            for stream in streams.values():
                stream.synchronize()

    def give_up_vectored_copy(self, error: RefusedError) -> None:
        """The kernel does not copy for us, here and in later saves."""
        logger.info("small tensors are copied one by one: %s", error)
        self.has_vectored_copy = False

    def _sorted(
        self, events: Events, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> dict[torch.device | None, Pairs]:
        """Pairs by the accelerator that the sources lie on."""
        if not sources:
            return {}
        if not events:
            return {None: (list(targets), list(sources))}
        pairs: defaultdict[torch.device | None, Pairs] = defaultdict(lambda: ([], []))
        for target, source in zip(targets, sources, strict=True):
            device = self._backend.device_of(source)
            pairs[device][0].append(target)
            pairs[device][1].append(source)
        return pairs

    def _ordered(self, events: Events) -> dict[torch.device, Stream]:
        """The devices' streams; what is queued there from now on comes after ``events``."""
        streams = {device: self._backend.stream(device, "save") for device in events}
        for device, event in events.items():
            streams[device].wait_event(event)
        return streams

    def _to_host(
        self,
        stream: Stream,
        lease: Lease,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
    ) -> None:
        start = lease.offset
        if lease.arena.is_pinned(start, start + lease.count * lease.slot_bytes):
            stream.copy(targets, sources)
        else:
            self._bounce.copy_to_host(stream, targets, sources)

    def _drain(self, streams: Iterable[Stream], cause: BaseException | None) -> None:
        for stream in streams:
            try:
                stream.synchronize()
            except Exception as error:  # whatever a device says: it is not known to be done
                raise UnsettledError(f"a device does not end its copies: {error}") from cause or error

    def _pack(self, job: StageJob, streams: Mapping[torch.device, Stream]) -> Placement:
        """Gather the small tensors of each device; gives what that leaves to be copied one by one."""
        prepared = job.prepared
        if not streams:
            return Placement(prepared.located, NO_PACKS)
        for device, pack in self.packs.made(job.plan, prepared.located).items():
            taken = prepared.snapshots.get(device)
            if taken is not None and taken.pack is pack:
                job.scratches[device] = taken.scratch
                continue
            try:
                # of this job alone until its bytes have arrived: others may be queued between its runs
                job.taken[device] = Snapshot(pack, pack.take(streams[device]))
            except RuntimeError as error:
                logger.warning("small tensors are not packed, %s has no room for it: %s", device, error)
                self.packs.give_up(job.plan, device)
                continue
            prepared.refuse(prepared.displaced(pack.selection))
            job.scratches[device] = job.taken[device].scratch
            pack.fill(job.scratches[device], streams[device], prepared.captured.tensors)
        return Placement(prepared.located, self.packs.known(job.plan, prepared.located))

    def _copy(self, job: StageJob, first: int, lease: Lease, streams: Mapping[torch.device, Stream]) -> Run:
        layout, arena = job.plan.layout, lease.arena
        start = first * lease.slot_bytes
        stop = min(start + lease.count * lease.slot_bytes, layout.image_bytes)
        views = self._views_of(job, first, stop, lease)
        run = Run(
            job=job, first=first, lease=lease, views=views, is_last=stop == layout.image_bytes, arrivals=[]
        )
        slots = slice(lease.first, lease.first + lease.count)
        if arena.resident[slots] != run.marks:
            layout.fill_constants(lease.memory(0, stop - start), start)
        arena.resident[slots] = [None] * lease.count  # until the slots are whole again
        self._copy_leaves(job, start, stop, lease)
        self._check_memory(job.prepared, views)
        cut = self._cut(run, start, stop)
        # with the last run the job ends, also where its earlier ones alone hold what a device copies
        awaited = set(streams) if run.is_last else set()
        # devices first: they copy beside the CPU
        for device, on_device in views.away.items():
            targets, sources = self._on_device(job, device, on_device)
            targets += cut[device][0]
            sources += cut[device][1]
            if sources:
                self._to_host(streams[device], lease, targets, sources)
                awaited.add(device)
        run.arrivals = [streams[device].record() for device in awaited]
        run.views = self._copy_small(run, stop)
        targets, sources = cut[None]
        targets += run.views.targets
        sources += run.views.whole.pick(job.prepared.captured.tensors)
        if sources:
            # all at once: beside a busy trainer each call waits for the GIL, 5 ms
            torch._foreach_copy_(targets, sources)
        if not run.arrivals:
            self._finish(run)
        return run

    def _on_device(self, job: StageJob, device: torch.device, views: DeviceViews) -> Pairs:
        targets = list(views.targets)
        sources = list(views.whole.pick(job.prepared.captured.tensors))
        if views.stretches:
            targets += views.stretch_targets
            sources += job.scratches[device].bytes_of(views.stretches)
        return targets, sources

    def _finish(self, run: Run) -> None:
        """All bytes of ``run`` are in its slots."""
        self._check_changed(run)
        if run.is_last:
            run.job.give_back()
        lease = run.lease
        # the next save of this plan finds the constant bytes there
        lease.arena.resident[lease.first : lease.first + lease.count] = run.marks

    def _views_of(self, job: StageJob, first: int, stop: int, lease: Lease) -> BatchViews:
        prepared = job.prepared
        # to the kernel the address of an accelerator's memory means nothing
        vectored = self.has_vectored_copy and prepared.captured.pointers is not None and not prepared.events
        assert job.placement is not None
        return self._views.views(job.plan, first, stop, lease, job.placement, vectored=vectored)

    def _copy_leaves(self, job: StageJob, start: int, stop: int, lease: Lease) -> None:
        """What of the leaves lies in the image's bytes [start, stop)."""
        memory = lease.memory(0, stop - start)
        if not job.items:
            job.items = job.plan.padded(job.prepared.captured.leaf_items)
        for (offset, length), item in zip(job.plan.layout.rooms(), job.items, strict=True):
            low, high = max(offset, start), min(offset + length, stop)
            if low < high:
                memory[low - start : high - start] = item[low - offset : high - offset]

    def _copy_small(self, run: Run, stop: int) -> BatchViews:
        """Let the kernel copy the small tensors; the views say what is left to torch."""
        job, prepared, views = run.job, run.job.prepared, run.views
        try:
            self._copy_vectored(views, prepared.captured)
        except RefusedError as error:
            # the kernel refuses memory that is gone as well, which says nothing of the next save
            prepared.refuse(prepared.displaced(views.small))
            self.give_up_vectored_copy(error)
            views = self._views_of(job, run.first, stop, run.lease)
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
        half = vectored.num_calls // 2 if self.helper is not None else 0
        if not half or self.helper is None:
            vectored.copy(0, vectored.num_calls)
            return
        rest = self.helper.submit(vectored.copy, half, vectored.num_calls)
        try:
            vectored.copy(0, half)
        finally:
            concurrent.futures.wait([rest])  # it writes into the slots, so they are not given up before
        rest.result()

    def _cut(self, run: Run, start: int, stop: int) -> defaultdict[torch.device | None, Pairs]:
        """Boxes of the tensors that reach over the run's ends, by accelerator."""
        located, plan = run.job.prepared.located, run.job.plan
        pairs: defaultdict[torch.device | None, Pairs] = defaultdict(lambda: ([], []))
        for index in run.views.cut.indices:
            device = located[plan.tensors[index]] if located else None
            for source, target in self._boxes(run, index, start, stop):
                pairs[device][0].append(target)
                pairs[device][1].append(source)
        return pairs

    def _boxes(
        self, run: Run, index: int, start: int, stop: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(source, target) boxes of one tensor."""
        # made in each copy, and not kept as other views are: at most two tensors reach over the ends of a run
        layout, lease = run.job.plan.layout, run.lease
        tensor = run.job.prepared.captured.tensors[index].detach()
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

    def _check_memory(self, prepared: Prepared, views: BatchViews) -> None:
        """A storage may have been freed since capture. Of the small tensors the kernel tells; of the others
        only a crash would."""
        if prepared.watch is not None:  # else the trainer waits
            selections = [views.whole, views.cut, *(on_device.whole for on_device in views.away.values())]
            prepared.refuse(set().union(*map(prepared.displaced, selections)))

    def _check_changed(self, run: Run) -> None:
        """Looked at after the copy: what was changed while it ran counts too. Raises MutatedTensors."""
        prepared = run.job.prepared
        if prepared.watch is None:
            return
        changed = set().union(*map(prepared.changed, run.views.selections))
        # not before: of what changes between a look and a later copy nothing would be seen
        if run.is_last:
            changed |= prepared.changed_unseen()
            # what was gathered in save() may change since then
            packed = [taken.pack.selection for taken in run.job.taken.values()]
            changed = changed.union(*map(prepared.changed, packed))
        if (sample := run.job.sample) is not None:
            layout, start = run.job.plan.layout, run.first * run.lease.slot_bytes
            nbytes = min(run.lease.count * run.lease.slot_bytes, layout.image_bytes - start)
            changed |= sample.differing(layout, start, run.lease.memory(0, nbytes))
        prepared.refuse(changed)
