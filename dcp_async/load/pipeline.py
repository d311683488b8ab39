"""Loading, as coroutines joined by bounded queues.

    plan -[LoadPlan]-> batch -[list of Span]-> read -[Fetched]-> place -[values]-> whoever loads
                                                                   |
                                              pool <-[Slot]- recycle, for what goes to a device

Enters: an opened checkpoint and what is wanted of it. Leaves: filled tensors and leaf values, or an error
before anything was touched. Invariant: leaves are decoded, and pickled tensors are judged by their heads, so
that trust is decided before the first tensor is written to.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import anyio
import torch

from .._concurrency import BlockingThreads, Pipe, StuckThreadError, collection_paused, run_blocking
from .._foreign import storage_errors
from ..catalog import Contents
from ..formats import StoredItem
from ..staging import Stager
from ..state import Region
from ..trust import Trust
from .device_writes import DeviceWrites, Slot
from .failures import DamagedError, LoadFailures
from .fetch import Check, FetchBuffers, SlotBuffers, goes_to_device
from .place import copy_all, scatter
from .read_plan import ReadPlan
from .source import Source
from .spans import Span, make_batches, make_spans
from .wrapped_load import Wrapped, want_distributed

P = ParamSpec("P")
_QUEUE_BATCHES = 2
"""Between two stages: one that is worked on, one that waits. More would only hold memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadServices:
    """What the engine lends to its loads."""

    threads: BlockingThreads
    stager: Stager
    """Its pool and its devices, for what goes to one."""
    io_concurrency: int
    timeout: float
    trust: Trust
    most_at_once: int | None = None
    """The most that is read at once, where that is to be less than what a slot holds."""

    @property
    def part_bytes(self) -> int:
        """The most that is read at once: a slot holds as much."""
        return min(self.stager.options.part_bytes, self.most_at_once or sys.maxsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What is read of one checkpoint, in two passes over its files."""

    leaves: ReadPlan
    """First: what is decoded, and what is compared before anything is touched."""
    tensors: ReadPlan
    """Then: what is read into the targets."""
    values: dict[str, Any] = field(default_factory=dict)
    """Name -> value of each leaf, as they arrive."""
    items: dict[str, bytes] = field(default_factory=dict)
    """Name -> item of each leaf that somebody else decodes, as they arrive."""
    unfolded: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """(name, target, source) of tensors that lay inside of leaves, which were read to find them."""

    @property
    def nbytes(self) -> int:
        """Bytes that both passes read."""
        return self.leaves.nbytes + self.tensors.nbytes


@dataclass(slots=True)
class Fetched:
    """One batch, read and verified."""

    buffers: list[FetchBuffers]
    slot: Slot | None
    """What they lie in, where bytes of them go to a device."""


class LoadPipeline:
    """Reads what is wanted of one opened checkpoint.

    1. ``plan`` says which bytes go where.
    2. ``read_leaves`` decodes the leaves and decides on trust; no target is written to.
    3. ``fill`` reads into the targets.

    Each raises CorruptCheckpointError, IncompatibleStateError, UntrustedCheckpointError or LoadError inside
    of ``failures.explained()``. Cancellation joins the reads and copies in progress; targets may be partly
    filled.
    """

    def __init__(
        self,
        contents: Contents,
        services: LoadServices,
        failures: LoadFailures,
        writes: DeviceWrites | None = None,
    ) -> None:
        """``writes``: what reaches targets on devices; None where there are none."""
        self._contents = contents
        self._services = services
        self._failures = failures
        self._writes = writes
        self.source = Source.of(contents, services.trust)

    def plan(
        self,
        tensors: Mapping[str, Iterable[Region]],
        leaves: Iterable[str],
        *,
        items: Iterable[str] = (),
        wrapped: Wrapped | None = None,
    ) -> LoadPlan:
        """What has to be read to fill ``tensors`` and to have the values of ``leaves``, and the bytes of
        ``items``. ``wrapped``: what is made of other tensors; nothing of it is written to by the pipeline."""
        plan = LoadPlan(leaves=ReadPlan(self.source), tensors=ReadPlan(self.source, self._writes))
        with collection_paused():  # a plan of many tensors is as many objects, and all of them live on
            for leaf in leaves:
                if (inner := self._contents.unfolded_leaf(leaf)) is not None:
                    plan.values[leaf] = inner.value
                elif wrapped is not None and leaf in wrapped.like:
                    want_distributed(plan.leaves, leaf, wrapped.like[leaf], plan.values)
                else:
                    plan.leaves.want_leaf(leaf, plan.values.__setitem__)
            for item in items:
                plan.leaves.want_bytes(item, plan.items.__setitem__)
            for name, regions in tensors.items():
                if (inner := self._contents.unfolded_leaf(name)) is not None:
                    plan.unfolded.extend((name, region.tensor, region.of(inner.value)) for region in regions)
                else:
                    plan.tensors.want_tensor(name, regions)
            if wrapped is not None:
                for name, regions in wrapped.regions.items():
                    plan.leaves.want_pairs(name, regions, wrapped.hold)
        return plan

    async def read_leaves(self, plan: LoadPlan, *, fresh: bool) -> None:
        """Read ``plan.values``. ``fresh``: nobody else has seen the tensors of the plan, so a failure while
        they are filled leaves nothing half loaded."""
        if not (fresh or self._services.trust.unsafe):  # else nothing is at stake, or nothing is refused
            await self.judge(plan.tensors.items)
        await self._flow(plan.leaves)

    async def judge(self, items: Iterable[StoredItem]) -> None:
        """Whether trust admits ``items``, of which nothing is kept."""
        # heads first: they settle most items, and a trial decodes one that is decoded once more later
        heads, trials = ReadPlan(self.source), ReadPlan(self.source)
        doubtful: list[StoredItem] = []
        for item in items:
            heads.want_head(item, doubtful.append)
        await self._flow(heads)
        for item in doubtful:
            trials.want_trial(item)
        await self._flow(trials)

    async def fill(self, plan: LoadPlan, *, fresh: bool) -> None:
        """Read the tensors of ``plan`` into their targets. ``fresh``: as for ``read_leaves``."""
        # before the first read, which may go straight into a target
        self._failures.touched = self._failures.touched or not fresh
        await self._flow(plan.tensors)
        if plan.unfolded:
            await self.copy(*zip(*plan.unfolded, strict=True))

    async def copy(
        self, names: Sequence[str], targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> None:
        """Copy values that lie in host memory into their targets, wherever those lie. Raises FillError."""
        if self._writes is None:
            await self._services.threads.run(copy_all, names, targets, sources)
            return
        async with self._writes.finishing():
            await self._blocking(self._writes.put_all, names, targets, sources)

    async def read(self, tensors: Mapping[str, Iterable[Region]], leaves: Iterable[str]) -> dict[str, Any]:
        """Fill fresh ``tensors``; gives the values of ``leaves``."""
        with self._failures.explained():
            plan = self.plan(tensors, leaves)
            await self.read_leaves(plan, fresh=True)
            await self.fill(plan, fresh=True)
        return plan.values

    async def read_wanted(self, want: Callable[[ReadPlan], None]) -> int:
        """Read what ``want`` asks a plan for; gives the number of bytes."""
        with self._failures.explained():
            plan = ReadPlan(self.source, self._writes)
            want(plan)
            await self._flow(plan)
        return plan.nbytes

    async def _flow(self, plan: ReadPlan) -> None:
        # a flow of its own: in one, a batch of numbers might come to be placed before its scales are there
        if plan.before is not None:
            await self._flow(plan.before)
        if not plan.pieces:
            return
        readers = self._services.io_concurrency
        batches: Pipe[list[Span]] = Pipe(_QUEUE_BATCHES)
        fetched: Pipe[Fetched] = Pipe(_QUEUE_BATCHES, producers=readers)
        copied: Pipe[Slot] = Pipe(_QUEUE_BATCHES)
        # a failure in one stage cancels the others, which join the reads that they wait for
        async with self._devices(plan), anyio.create_task_group() as group:
            group.start_soon(self._batch, plan, batches)
            # as many as may read at once: one more would only hold the memory of another batch
            for _ in range(readers):
                group.start_soon(self._read, batches, fetched)
            group.start_soon(self._place, fetched, copied)
            if self._writes is not None:
                group.start_soon(self._recycle, copied, self._writes)

    def _devices(self, plan: ReadPlan) -> AbstractAsyncContextManager[None]:
        """Around a flow: slots for it, and the end of its copies."""
        if self._writes is None:
            return contextlib.nullcontext()
        # one for each reader, one whose bytes are placed, one whose copies run
        return self._writes.finishing(plan.nbytes, num_slots=self._services.io_concurrency + 2)

    async def _batch(self, plan: ReadPlan, batches: Pipe[list[Span]]) -> None:
        part_bytes = self._services.part_bytes
        digests, image_bytes = self._contents.digests, self._contents.image_bytes
        spans = make_spans(plan.pieces, digests, image_bytes, part_bytes=part_bytes)
        for batch in make_batches(spans, part_bytes=part_bytes):
            await batches.put(batch)
        await batches.close()

    async def _read(self, batches: Pipe[list[Span]], fetched: Pipe[Fetched]) -> None:
        async for batch in batches:
            slot: Slot | None = None
            if self._writes is not None and goes_to_device(batch):
                slot = await self._writes.lease()
            try:
                filled = await self._fetch(batch, slot)
            except DamagedError as error:
                # nothing has left the buffers, and another tier may have the file whole
                if not await self._contents.turn_to_copy(batch[0].file, str(error)):
                    raise
                filled = await self._fetch(batch, slot)
            # most spans were read straight into their targets: no need to pass them on
            if slot is not None or any(buffers.is_unfinished for buffers in filled):
                await fetched.put(Fetched(filled, slot))
        await fetched.close()

    async def _fetch(self, batch: list[Span], slot: Slot | None) -> list[FetchBuffers]:
        """Read and verify ``batch``, which is of one file. Raises DamagedError."""
        with collection_paused():
            filled = [FetchBuffers(span) for span in batch] if slot is None else _in_slot(batch, slot)
        segments = [segment for buffers in filled for segment in buffers.segments]
        check = Check(filled)
        try:
            await self._contents.reader.read_into(batch[0].file, segments, check.arrived)
        except (DamagedError, BaseExceptionGroup):  # found by ``check``, in the storage's own call
            raise
        except BaseException as error:
            # a cancellation tells by its cause that the call which it was to end hangs
            hangs = isinstance(error, StuckThreadError) or isinstance(error.__cause__, StuckThreadError)
            if slot is not None and hangs:
                slot.lose()  # the call that hangs may still write into it
            # whatever a storage raises is its failure, with the file that it concerns
            with storage_errors("read", f"{batch[0].file} of {self._contents.info.checkpoint_id!r}"):
                raise error from error.__cause__
        if not check.done:  # a storage need not say what has arrived
            await self._blocking(check.finish)
        return filled

    async def _place(self, fetched: Pipe[Fetched], copied: Pipe[Slot]) -> None:
        # one at a time: items are decoded here, and torch.load holds the GIL
        async for batch in fetched:
            if batch.slot is None:
                await self._blocking(scatter, batch.buffers)
                continue
            try:
                if any(buffers.is_unfinished for buffers in batch.buffers):
                    await self._blocking(scatter, batch.buffers)
                assert self._writes is not None
                await self._blocking(self._writes.enqueue, batch.slot, batch.buffers)
            except StuckThreadError:
                batch.slot.lose()  # the thread that hangs may still queue copies out of it
                raise
            await copied.put(batch.slot)
        await copied.close()

    async def _recycle(self, copied: Pipe[Slot], writes: DeviceWrites) -> None:
        # in the order in which they were queued; the next slots are read and placed meanwhile
        async for slot in copied:
            await writes.wait(slot)

    async def _blocking(self, fn: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        await run_blocking(self._services.threads, self._services.timeout, fn, *args, **kwargs)


def _in_slot(batch: Iterable[Span], slot: Slot) -> list[FetchBuffers]:
    """Buffers for the spans of a batch, one behind the other in ``slot``."""
    buffers: list[FetchBuffers] = []
    start = 0
    for span in batch:
        buffers.append(SlotBuffers(span, slot.memory, start))
        start += span.stop - span.start
    return buffers
