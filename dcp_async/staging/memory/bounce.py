"""Copies between a device and memory that is not pinned, through two pinned buffers.

Enters: tensors on a device, and as many in host memory. Leaves: their bytes on the other side, when the call
returns. Invariant: a device sees the buffers alone, never the memory behind them, which may be registered in
part or just now; and a buffer that a device may still write to is used no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from ..._geometry import flat_slices
from ..device import Backend, Event, Stream

BOUNCE_BYTES = 32 << 20
"""A transfer of that size runs at the line's rate, and the first one is soon through."""
_ALIGN = 64
"""Where a tensor in a buffer begins: a multiple of every itemsize."""

_Pair = tuple[torch.Tensor, torch.Tensor]


class _Buffer:
    """One of the two: what a device fills, or reads, while the CPU is at the other."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.event: Event | None = None
        """When the device is through with it."""
        self.hosts: list[torch.Tensor] = []
        self.views: list[torch.Tensor] = []
        """Where in the memory each of ``hosts`` lies."""


class Bounce:
    """Owns the buffers, a pair for each device, made when they are first needed; one more for a thread that
    comes while they are in use, or when one hangs with them."""

    def __init__(self, backend: Backend, *, nbytes: int = BOUNCE_BYTES) -> None:
        """``nbytes``: how large a buffer is."""
        self._backend = backend
        self._nbytes = nbytes
        self._idle: dict[torch.device, list[_Buffer]] = {}
        """Not those in use: a thread that hangs keeps its own, and so does a device that failed."""
        self._lost: list[list[_Buffer]] = []

    def copy_to_host(
        self, stream: Stream, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> None:
        """Copy ``sources``, which lie on the device of ``stream``, into row-major ``targets``; returns when
        the bytes are there."""
        self._run(stream, list(zip(targets, sources, strict=True)), is_load=False)

    def copy_to_device(
        self, stream: Stream, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> None:
        """Copy row-major ``sources`` into ``targets``, which lie on the device of ``stream``; returns when
        the bytes are there."""
        self._run(stream, list(zip(sources, targets, strict=True)), is_load=True)

    def close(self) -> None:
        """Let the buffers go."""
        self._idle.clear()

    def _run(self, stream: Stream, pairs: list[_Pair], *, is_load: bool) -> None:
        """``pairs``: (on the host, on the device)."""
        pairs = [pair for pair in pairs if pair[0].numel()]
        if not pairs:
            return
        device = self._backend.device_of(pairs[0][1])
        assert device is not None
        buffers = self._idle.pop(device, None) or [self._make(device), self._make(device)]
        try:
            for number, batch in enumerate(self._batches(pairs)):
                buffer = buffers[number % 2]
                self._finish(buffer, is_load=is_load)
                self._begin(buffer, stream, batch, is_load=is_load)
            for buffer in buffers:
                self._finish(buffer, is_load=is_load)
        except BaseException:
            self._lost.append(buffers)  # unless the device can say that it is through with them
            stream.synchronize()
            self._lost.remove(buffers)
            raise
        self._idle[device] = buffers

    def _make(self, device: torch.device) -> _Buffer:
        memory = self._backend.pinned_buffer(device, self._nbytes)
        # where nothing can be pinned the device's own copies are as slow; the buffer keeps them apart from
        # memory that may be registered in part
        if memory is None:
            memory = torch.empty(self._nbytes, dtype=torch.uint8, device="cpu")
        return _Buffer(memory)

    def _begin(self, buffer: _Buffer, stream: Stream, batch: list[_Pair], *, is_load: bool) -> None:
        offset = 0
        buffer.hosts, buffer.views = [host for host, _ in batch], []
        for host, _ in batch:
            raw = buffer.memory[offset : offset + host.nbytes]
            buffer.views.append(raw.view(host.dtype).view(host.shape))
            offset += -(-host.nbytes // _ALIGN) * _ALIGN
        on_device = [tensor for _, tensor in batch]
        if is_load:
            torch._foreach_copy_(buffer.views, buffer.hosts)
            stream.copy(on_device, buffer.views)
        else:
            stream.copy(buffer.views, on_device)
        buffer.event = stream.record()

    def _finish(self, buffer: _Buffer, *, is_load: bool) -> None:
        if buffer.event is None:
            return
        buffer.event.synchronize()
        if not is_load:
            torch._foreach_copy_(buffer.hosts, buffer.views)
        buffer.event, buffer.hosts, buffer.views = None, [], []

    def _batches(self, pairs: list[_Pair]) -> Iterator[list[_Pair]]:
        """What fits into a buffer at once."""
        batch: list[_Pair] = []
        used = 0
        for pair in pairs:
            for host, on_device in self._cut(*pair):
                nbytes = -(-host.nbytes // _ALIGN) * _ALIGN
                if batch and used + nbytes > self._nbytes:
                    yield batch
                    batch, used = [], 0
                batch.append((host, on_device))
                used += nbytes
        yield batch

    def _cut(self, host: torch.Tensor, on_device: torch.Tensor) -> Iterator[_Pair]:
        """A tensor in pieces that each fit into a buffer."""
        assert host.is_contiguous()
        if host.nbytes <= self._nbytes:
            yield host, on_device
            return
        step = self._nbytes // host.dtype.itemsize
        numel, flat = math.prod(host.shape), host.view(-1)
        for low in range(0, numel, step):
            high = min(low + step, numel)
            if on_device.is_contiguous():
                yield flat[low:high], on_device.view(-1)[low:high]
                continue
            # with gaps it has no flat view; a box of it is copied as well
            for box, first, last in flat_slices(host.shape, low, high):
                inner = on_device[box]
                yield flat[first:last].view(inner.shape), inner
