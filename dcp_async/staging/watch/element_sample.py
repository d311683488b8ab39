"""A sample of a state's elements, taken on the devices: notices changes there that move no counter.

Enters: the tensors to be sampled, in the trainer's thread. Leaves: which of them were staged with other
elements than they had in the order of the trainer's queue. Invariant: what is compared is what the file will
hold, so whoever wrote, and whenever, a difference is in the checkpoint. Costs are per save, not per tensor.
"""

from __future__ import annotations

import ctypes
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from ...formats import FileLayout
from ..device import Backend, Stream
from .byte_sample import Place

logger = logging.getLogger(__name__)

_ALIGN = 16
"""Where blocks of another dtype begin: the largest itemsize."""


class Block(NamedTuple):
    """Some elements of a tensor that follow each other in row-major order, and lie evenly in memory."""

    tensor: int
    """Its index."""
    start: int
    """Where they begin among its row-major bytes."""
    numel: int
    step: int
    """Between two of them, in elements."""
    shift: int
    """From the tensor's first element to the first of them, in elements."""


def block_at(place: Place, dtype: torch.dtype, shape: torch.Size, strides: Sequence[int] | None) -> Block:
    """The block at ``place``, or near it where elements do not begin there, of a tensor of that geometry;
    ``strides`` are None if it is row-major."""
    index, offset, length = place
    first, count = offset // dtype.itemsize, length // dtype.itemsize
    if strides is None:
        return Block(index, first * dtype.itemsize, count, 1, first)
    # within the last dimension: elements of two rows do not lie evenly
    column = first % shape[-1]
    rest, shift = first // shape[-1], column * strides[-1]
    for extent, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        rest, number = divmod(rest, extent)
        shift += number * stride
    return Block(index, first * dtype.itemsize, min(count, shape[-1] - column), strides[-1], shift)


@dataclass(frozen=True, slots=True)
class _Copied:
    """The blocks of one device, one behind the other."""

    device: torch.device | None
    memory: torch.Tensor
    """On the device, or on the host where there is none."""
    places: list[tuple[Block, int, int]]
    """(block, first byte, end) in ``memory``."""


@dataclass(frozen=True, slots=True)
class ElementSample:
    """Some elements of tensors, as they are at the moment of capture."""

    copied: list[_Copied]

    @classmethod
    def take(
        cls,
        blocks: Iterable[Block],
        tensors: Sequence[torch.Tensor],
        located: Sequence[torch.device | None],
        streams: Mapping[torch.device, Stream],
    ) -> ElementSample:
        """Copy ``blocks``; on devices by the caller's current ``streams``: what was queued there before is in
        them, and what comes later is not."""
        by_device: defaultdict[torch.device | None, list[Block]] = defaultdict(list)
        for block in blocks:
            by_device[located[block.tensor] if located else None].append(block)
        # a view of a Parameter would be known to autograd
        copied: list[_Copied] = []
        with torch.no_grad():
            for device, mine in by_device.items():
                try:
                    copied.append(_copy(device, mine, tensors, None if device is None else streams[device]))
                except RuntimeError as error:
                    # a device that is full must not fail the trainer: the counters alone tell
                    logger.warning("no room on %s for a sample of the state: %s", device, error)
        return cls(copied)

    def fetch(self, backend: Backend, streams: Mapping[torch.device, Stream]) -> FetchedSample:
        """Queue on ``streams``, which wait for the capture, what brings it to the host."""
        fetched = FetchedSample()
        for copied in self.copied:
            memory = copied.memory
            if copied.device is not None:
                pinned = backend.pinned_buffer(copied.device, memory.nbytes)
                memory = torch.empty_like(memory, device="cpu") if pinned is None else pinned
                streams[copied.device].copy([memory], [copied.memory])
            fetched.add(memory, copied)
        return fetched

    def share(self, new: Mapping[int, int]) -> ElementSample:
        """The sample of the tensors in ``new`` alone, which has their new indices."""
        return ElementSample(
            [
                _Copied(
                    part.device,
                    part.memory,
                    [
                        (Block(new[block.tensor], *block[1:]), start, stop)
                        for block, start, stop in part.places
                        if block.tensor in new
                    ],
                )
                for part in self.copied
            ]
        )


class FetchedSample:
    """A sample that is on the host, or on its way. Keeps the memory that it comes from."""

    def __init__(self) -> None:
        self._blocks: list[tuple[Block, memoryview]] = []
        self._kept: list[tuple[torch.Tensor, _Copied]] = []

    def add(self, memory: torch.Tensor, copied: _Copied) -> None:
        """Take in what ``memory`` holds, or will."""
        raw = (ctypes.c_char * memory.nbytes).from_address(memory.data_ptr())
        view = memoryview(raw).cast("B")
        self._kept.append((memory, copied))
        self._blocks += [(block, view[start:stop]) for block, start, stop in copied.places]

    def differing(self, layout: FileLayout, start: int, memory: memoryview) -> set[int]:
        """Which of the tensors were staged with other elements into ``memory``, which holds the image's bytes
        from ``start`` on. What was copied there from a device was queued behind the sample of it."""
        stop = start + len(memory)
        changed: set[int] = set()
        for block, then in self._blocks:
            low = layout.payload_offsets[block.tensor] + block.start
            first, last = max(low, start), min(low + len(then), stop)
            if first < last and memory[first - start : last - start] != then[first - low : last - low]:
                changed.add(block.tensor)
        return changed


def _copy(
    device: torch.device | None,
    blocks: Sequence[Block],
    tensors: Sequence[torch.Tensor],
    stream: Stream | None,
) -> _Copied:
    # batches of one dtype, and of elements that lie together, take the fast path of _foreach_copy_
    batches: defaultdict[tuple[torch.dtype, bool], list[Block]] = defaultdict(list)
    for block in blocks:
        batches[tensors[block.tensor].dtype, block.step == 1].append(block)
    sizes = [dtype.itemsize * sum(block.numel for block in batch) for (dtype, _), batch in batches.items()]
    starts = list(accumulate((-(-size // _ALIGN) * _ALIGN for size in sizes), initial=0))
    shape = (starts[-1],)
    if stream is None:
        memory = torch.empty(shape, dtype=torch.uint8, device="cpu")
    else:
        memory = stream.empty(shape, torch.uint8)
    places: list[tuple[Block, int, int]] = []
    for ((dtype, _), batch), start, size in zip(batches.items(), starts, sizes, strict=False):
        counts = [block.numel for block in batch]
        targets = list(torch.split(memory[start : start + size].view(dtype), counts))
        begins = {block.tensor: tensors[block.tensor].storage_offset() for block in batch}
        sources = [
            torch.as_strided(tensors[index], (numel,), (step,), begins[index] + shift)
            for index, _, numel, step, shift in batch
        ]
        if stream is None:
            torch._foreach_copy_(targets, sources)
        else:
            stream.copy(targets, sources)
        ends = [start + dtype.itemsize * end for end in accumulate(counts, initial=0)]
        # not strict: ends has one more, where the last one stops
        places += zip(batch, ends, ends[1:], strict=False)
    return _Copied(device, memory, places)
