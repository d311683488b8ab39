"""DeviceWrites: what one load writes on devices, on streams of our own and in order with the trainer's.

Enters: verified bytes in slots of the staging pool, values in host memory, the ends of the trainer's queues
when the load began. Leaves: queued copies, and slots that come back when theirs are done. Imports ``staging``
for its pool, which is pinned, and its devices: a load's copies need what a save's do. Invariant: what is
written here comes after whatever the trainer had queued, and a slot that a copy may still read is never given
back.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import anyio
import torch

from .._concurrency import BlockingThreads, StuckThreadError, run_blocking
from .._foreign import ENDINGS, FillError, words
from ..formats import BLOCK_BYTES
from ..staging import Bounce, BufferPool, Event, Lease, Stager, Stream
from .fetch import FetchBuffers, SlotBuffers
from .place import copy_all, is_plain
from .spans import DeviceTarget, Piece

logger = logging.getLogger(__name__)

_SMALL_BYTES = 1 << 20
"""Pieces below this are brought to the device together: a transfer of their own costs several microseconds,
as long as this takes."""
_SCRATCH_BYTES = 32 << 20
"""The most that is brought to a device's scratch memory at once."""
_ALIGNMENT = 64
"""Where in a file our format puts the elements of tensors: a scratch that begins so can be seen as any
dtype."""


@dataclass(slots=True, eq=False)
class Slot:
    """One slot of the pool, and the copies out of it."""

    pool: BufferPool
    lease: Lease
    copies: list[Event] = field(default_factory=list)

    @property
    def memory(self) -> memoryview:
        """All of its bytes."""
        return self.lease.memory(0, self.lease.slot_bytes)

    @property
    def is_pinned(self) -> bool:
        """Whether a device may read it."""
        return self.lease.arena.is_pinned(self.lease.offset, self.lease.offset + self.lease.slot_bytes)

    def release(self) -> None:
        """Nobody reads into it, and no copy out of it runs any more."""
        self.pool.release(self.lease, 0)

    def lose(self) -> None:
        """A thread or a device that hangs may still touch it."""
        self.pool.release(self.lease, 0, lost=True)

    def bytes(self, start: int, stop: int) -> torch.Tensor:
        """Its bytes [start, stop)."""
        return self.lease.arena.tensor[self.lease.offset + start : self.lease.offset + stop]


class DeviceWrites:
    """One load's writes on devices. Owns the slots that it leased, until a ``finishing`` block ends.

    Made in the caller's thread. Raises CaptureInProgressError.
    """

    def __init__(
        self, stager: Stager, devices: Iterable[torch.device], threads: BlockingThreads, timeout: float
    ) -> None:
        """``threads``, ``timeout``: where, and for how many seconds, a device is waited for."""
        self._stager = stager
        self._backend = stager.backend
        self._pool = stager.pool
        self._threads = threads
        self._timeout = timeout
        self._ends = {device: self._backend.record(device) for device in devices}
        """The ends of the caller's queues."""
        self._streams: dict[torch.device, Stream] = {}
        """Those that something was queued on."""
        self._slots: set[Slot] = set()
        self._fresh: list[torch.Tensor] = []
        self._left: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        """(name, target, value) of what only torch's own operators can fill."""

    @property
    def devices(self) -> Collection[torch.device]:
        """Those that the caller's queues are known of."""
        return self._ends.keys()

    def device_of(self, tensor: torch.Tensor) -> torch.device | None:
        """The device that ``tensor`` lies on; None for host memory and for what has no memory."""
        return None if tensor.is_meta else self._backend.device_of(tensor)

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        strides: Sequence[int] | None,
        device: torch.device,
    ) -> torch.Tensor:
        """A tensor for the caller, to be filled here."""
        made = self._stream(device).empty(shape, dtype, strides)
        self._fresh.append(made)
        return made

    def put(self, name: str, target: torch.Tensor, value: torch.Tensor) -> None:
        """Copy a value that lies in host memory. Raises FillError."""
        self.put_all([name], [target], [value])

    def put_all(
        self, names: Sequence[str], targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> None:
        """Copy values that lie in host memory, into targets wherever they lie; returns when they are there.
        Raises FillError."""
        on_host: list[int] = []
        on_device: dict[torch.device, list[int]] = {}
        for index, target in enumerate(targets):
            device = self.device_of(target)
            if device is None:
                on_host.append(index)
            elif is_plain(target):
                on_device.setdefault(device, []).append(index)
            else:
                # by operators that allocate: on the caller's stream, whose memory that becomes
                self._left.append((names[index], target, sources[index]))
        for device, chosen in on_device.items():
            stream = self._stream(device)
            try:
                with torch.inference_mode():  # else tensors that were made in it could not be written to
                    self._stager.bounce.copy_to_device(
                        stream,
                        [targets[index] for index in chosen],
                        [sources[index].contiguous() for index in chosen],
                    )
            except ENDINGS:
                raise
            except BaseException as error:
                concerned = tuple(names[index] for index in chosen)
                what = f"{device} would not take their values ({words(error)})"
                raise FillError(f"{', '.join(concerned[:5])}: {what}", concerned) from error
        copy_all(
            [names[index] for index in on_host],
            [targets[index] for index in on_host],
            [sources[index] for index in on_host],
        )

    async def lease(self) -> Slot:
        """A slot to read into; waits for one. It comes back by ``wait``, or when ``finishing`` ends."""
        slot = Slot(self._pool, await self._pool.lease(1))
        self._slots.add(slot)  # before anything else may fail
        arena = slot.lease.arena
        # a save may not have come yet
        self._stager.pinner.want(arena, min(self._ends, key=str))
        arena.resident[slot.lease.first] = None  # a save would take its constant bytes for granted
        return slot

    def enqueue(self, slot: Slot, buffers: Iterable[FetchBuffers]) -> None:
        """Queue the copies of what was read into ``slot``, all verified."""
        by_device: dict[torch.device, list[_Arrived]] = {}
        for span in buffers:
            assert isinstance(span, SlotBuffers)
            for arrived in span.on_device:
                by_device.setdefault(arrived[1].device, []).append(arrived)
        with torch.inference_mode():  # else tensors that were made in it could not be written to
            for device, pieces in by_device.items():
                stream = self._stream(device)
                batch = _Batch(slot, stream)
                for run in _runs(pieces):
                    batch.add(run)
                batch.queue(self._stager.bounce)
                slot.copies.append(stream.record())

    async def wait(self, slot: Slot) -> None:
        """Give ``slot`` back when the copies out of it are done."""
        try:
            for copy in slot.copies:
                await self._in_thread(copy.synchronize)
        except StuckThreadError:
            self._lose_all()  # nor will it answer when it is asked again
            raise
        self._slots.discard(slot)
        slot.release()

    @contextlib.asynccontextmanager
    async def finishing(self, nbytes: int = 0, *, num_slots: int = 0) -> AsyncIterator[None]:
        """Around what queues copies: they are done at the end, however that comes, and all slots are back, so
        that whoever uses the targets next may do so on any stream.

        Args:
            nbytes: bytes that pass through the pool, ``num_slots`` at a time.
        Raises: what a device does, unless something else ends the block; slots that it may still touch are
        lost then.
        """
        # what saves have reserved serves as well: growing it for a load would map, and pin, all of it anew
        needed = min(num_slots, -(-nbytes // self._pool.slot_bytes) + 1) if nbytes else 0
        if needed > self._pool.num_slots:
            self._pool.reserve(self, needed)
        try:
            yield
        except BaseException as error:
            await self._finish_after(error)
            raise
        else:
            await self._finish()
        finally:
            self._pool.forget(self)

    async def _finish(self) -> None:
        # the host waits, though the caller's stream could: slots come back so anyway, and of the copies only
        # the last slot's are left by now
        streams, self._streams = list(self._streams.values()), {}
        is_done = not streams

        def synchronize() -> None:
            nonlocal is_done
            for stream in streams:
                stream.synchronize()
            is_done = True

        try:
            if streams:
                with anyio.CancelScope(shield=True):
                    await self._in_thread(synchronize)
        finally:
            # a cancellation comes when the thread was joined; after a failure nobody knows what still runs
            if not is_done:
                self._lose_all()
            while self._slots:
                self._slots.pop().release()

    def _lose_all(self) -> None:
        self._streams = {}
        while self._slots:
            self._slots.pop().lose()

    async def _finish_after(self, error: BaseException) -> None:
        try:
            await self._finish()
        except ENDINGS:
            raise
        except BaseException as second:
            logger.warning("a device failed after %s: %s", words(error), words(second))

    async def _in_thread(self, fn: Callable[[], None]) -> None:
        await run_blocking(self._threads, self._timeout, fn)

    def hand_out(self) -> None:
        """In the caller's thread, once all is done: what was made for it is its own from here on,
        and what is left is copied on its current streams. Raises FillError."""
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for tensor in self._fresh:
            device = self.device_of(tensor)
            assert device is not None
            by_device.setdefault(device, []).append(tensor)
        for device, tensors in by_device.items():
            self._backend.lend(tensors, device)
        left, self._left, self._fresh = self._left, [], []
        if left:
            copy_all(*zip(*left, strict=True))

    def _stream(self, device: torch.device) -> Stream:
        """Ours of ``device``, behind whatever the caller had queued."""
        if (known := self._streams.get(device)) is None:
            known = self._streams[device] = self._backend.stream(device, "load")
            if (end := self._ends.get(device)) is not None:
                known.wait_event(end)
        return known


_Arrived = tuple[Piece, DeviceTarget, int]
"""(piece, its target, where in the slot its bytes lie)."""


class _Batch:
    """The copies out of one slot to one device: there in one batch, then out of scratch memory in one for
    each pair of dtypes."""

    def __init__(self, slot: Slot, stream: Stream) -> None:
        self._slot = slot
        self._stream = stream
        self._transfers: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._inside: dict[
            tuple[torch.dtype, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]
        ] = {}
        """Copies on the device. Both: (targets, sources)."""

    def add(self, run: Sequence[_Arrived]) -> None:
        """Bring a run of ``_runs`` to where it belongs."""
        if len(run) == 1:
            self._add_alone(*run[0])
            return
        start = run[0][2] // _ALIGNMENT * _ALIGNMENT
        stop = run[-1][2] + run[-1][0].nbytes
        try:
            scratch = self._scratch(stop - start)
        except torch.OutOfMemoryError:  # the device is full of what is loaded: slower, but it needs no room
            for arrived in run:
                self._add_alone(*arrived)
            return
        self._transfer(scratch[: stop - start], start)
        views = {torch.uint8: scratch}
        for piece, target, begin in run:
            dtype, offset = target.dtype, begin - start
            if piece.nbytes < target.nbytes or offset % dtype.itemsize:
                low = piece.start
                self._copy(
                    _bytes_of(target)[low : low + piece.nbytes], scratch[offset : offset + piece.nbytes]
                )
                continue
            if (view := views.get(dtype)) is None:
                view = views[dtype] = scratch.view(dtype)
            tensor = target.tensor
            self._copy(tensor, view.as_strided(tensor.shape, target.strides, offset // dtype.itemsize))

    def _add_alone(self, piece: Piece, target: DeviceTarget, begin: int) -> None:
        if target.is_direct:
            memory = _bytes_of(target)
        else:
            memory = target.memory = self._scratch(target.nbytes) if target.memory is None else target.memory
        self._transfer(memory[piece.start : piece.start + piece.nbytes], begin)
        target.left -= piece.nbytes
        if not target.is_direct and target.left == 0:
            view = memory.view(target.dtype).as_strided(target.tensor.shape, target.strides)
            self._copy(target.tensor, view)
            target.memory = None

    def _scratch(self, nbytes: int) -> torch.Tensor:
        # as many bytes as any dtype's view of them needs; let go of when its copies are queued, and given out
        # again to this stream only
        return self._stream.empty((-(-nbytes // _ALIGNMENT) * _ALIGNMENT,), torch.uint8)

    def _transfer(self, memory: torch.Tensor, start: int) -> None:
        self._transfers[0].append(memory)
        self._transfers[1].append(self._slot.bytes(start, start + memory.numel()))

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        # apart by dtype: torch's kernel for many copies takes one pair of them
        targets, sources = self._inside.setdefault((target.dtype, source.dtype), ([], []))
        targets.append(target)
        sources.append(source)

    def queue(self, bounce: Bounce) -> None:
        """Queue all of it. ``bounce``: what brings memory there that is not pinned."""
        if self._slot.is_pinned:
            self._stream.copy(*self._transfers)
        else:
            bounce.copy_to_device(self._stream, *self._transfers)
        for copies in self._inside.values():
            self._stream.copy(*copies)


def _bytes_of(target: DeviceTarget) -> torch.Tensor:
    """The bytes of a contiguous tensor."""
    if target.memory is None:
        target.memory = target.tensor.view(-1).view(torch.uint8)
    return target.memory


def _runs(pieces: Iterable[_Arrived]) -> Iterator[list[_Arrived]]:
    """Neighbours that are brought to the device together, and others by themselves."""
    run: list[_Arrived] = []
    end = 0
    for arrived in pieces:
        piece, target, begin = arrived
        is_whole = piece.nbytes == target.nbytes and begin % target.dtype.itemsize == 0
        fits = piece.nbytes < _SMALL_BYTES and (target.is_direct or is_whole)
        stop = begin + piece.nbytes
        if run and (not fits or begin - end >= BLOCK_BYTES or stop - run[0][2] > _SCRATCH_BYTES):
            yield run
            run = []
        if fits:
            run.append(arrived)
            end = stop
        else:
            yield [arrived]
    if run:
        yield run
