"""Bytes of public files that no rank holds a whole block of: who puts them together, and out of what.

Enters: where each rank's bytes lie in its image, and which blocks are written already. Leaves: a Merge per
rank; from that, the reads that fill a stretch of a file. Pure: no I/O. Invariant: a stretch is filled out of
each rank's file of loose bytes by few reads, in whatever way its tensors are cut.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from operator import attrgetter
from typing import NamedTuple, TypedDict

import torch

from .._geometry import Box, Offsets, box_at, common, contiguous_run, extents, flat_slices, relative, slices
from ..formats import BLOCK_BYTES
from .conflicts import ConflictError

_GAP_BYTES = 64 << 10
"""Up to here it is faster to read what lies between two pieces than to read twice."""


class Part(NamedTuple):
    """What a Merge says of a tensor, or of a file's head. Plain data: it travels."""

    file: int
    offset: int
    """Where it begins."""
    shape: Offsets
    itemsize: int
    pieces: list[tuple[int, int, Offsets, Offsets]]
    """(rank, where in its image, offsets, shape)."""

    @property
    def stop(self) -> int:
        return self.offset + math.prod(self.shape) * self.itemsize

    def stretches(self) -> list[Stretch] | None:
        """What it is made of, if no piece is scattered over it."""
        stretches: list[Stretch] = []
        for rank, in_image, offsets, shape in self.pieces:
            run = contiguous_run(box_at(offsets, shape), self.shape)
            if run is None:
                return None
            start = self.offset + run[0] * self.itemsize
            stretches.append((self.file, start, run[1] * self.itemsize, rank, in_image))
        return stretches


Stretch = tuple[int, int, int, int, int]
"""(file, where in it, length, rank, where in its image): bytes that follow each other in both."""
PlainPart = tuple[int, int, Offsets, int, list[tuple[int, int, Offsets, Offsets]]]


class Merge(TypedDict):
    """What one rank has to put together of several ranks' bytes. Plain data: it travels."""

    spans: list[tuple[int, int, int]]
    """(file, start, stop), from a block's start on."""
    stretches: bytes
    """array("Q") of a Stretch each, ascending: what lies in the spans."""
    parts: list[PlainPart]
    """A Part each, of tensors of which pieces are scattered."""


def make_merge(spans: Sequence[tuple[int, int, int]], parts: Iterable[Part]) -> Merge:
    """``parts``: what lies in ``spans``."""
    scattered: list[PlainPart] = []
    stretches: list[Stretch] = []
    for part in parts:
        mine = part.stretches()
        if mine is None:
            scattered.append((part.file, part.offset, part.shape, part.itemsize, part.pieces))
        else:
            stretches += mine
    # as numbers: there are as many as small tensors and ranks
    numbers = array("Q", chain.from_iterable(sorted(stretches)))
    return Merge(spans=list(spans), stretches=numbers.tobytes(), parts=scattered)


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of one rank's pieces file, and where they go in a buffer."""

    rank: int
    offset: int
    nbytes: int
    first: int
    """Where in the buffer the region begins that they go into."""
    shape: tuple[int, ...]
    """The region's, with an element's bytes as the last dimension."""
    index: tuple[slice, ...]
    """Which of the region."""


class Assembly:
    """What one rank puts together, ready to be asked. Any thread may."""

    def __init__(self, merge: Merge) -> None:
        numbers = iter(array("Q", merge["stretches"]))
        self._stretches: list[Stretch] = list(zip(numbers, numbers, numbers, numbers, numbers, strict=True))
        self._parts = [Part(*part) for part in merge["parts"]]

    def reads(self, file: int, start: int, stop: int, most_bytes: int) -> list[Read]:
        """What bytes [start, stop) of ``file`` are put together from: reads of at most ``most_bytes`` where
        pieces are not longer."""
        merged: list[Read] = []
        copies = [*self._plain(file, start, stop), *self._scattered(file, start, stop)]
        # by rank and place: what lies together in a file comes by one call, in whatever order it goes where
        for copy in sorted(copies, key=attrgetter("rank", "offset")):
            end = copy.offset + copy.nbytes
            last = merged[-1] if merged else None
            if (
                last is not None
                and last.rank == copy.rank
                and copy.offset - last.stop <= _GAP_BYTES
                and end - last.start <= most_bytes
            ):
                last.copies.append(copy)
                last.stop = max(last.stop, end)
            else:
                merged.append(Read(copy.rank, copy.offset, end, [copy]))
        return merged

    def _plain(self, file: int, start: int, stop: int) -> Iterator[Copy]:
        # the one before may reach in here
        index = max(bisect_left(self._stretches, (file, start)) - 1, 0)
        for number, offset, nbytes, rank, in_image in islice(self._stretches, index, None):
            if (number, offset) >= (file, stop):
                break
            low, high = max(offset, start), min(offset + nbytes, stop)
            if number == file and low < high:
                yield Copy(rank, in_image + low - offset, high - low, low - start, (high - low,), ())

    def _scattered(self, file: int, start: int, stop: int) -> Iterator[Copy]:
        # large ones, most of the time: few enough to be looked through
        for part in self._parts:
            if part.file == file and part.offset < stop and start < part.stop:
                yield from _copies(part, start, stop)


def _copies(part: Part, start: int, stop: int) -> Iterator[Copy]:
    item = part.itemsize
    # whole elements: blocks begin at multiples of any element's length, and so do tensors
    low, high = max(start - part.offset, 0) // item, (min(stop, part.stop) - part.offset) // item
    for index, first, _ in flat_slices(part.shape, low, high):
        box = _box(index, part.shape)
        for rank, in_image, offsets, shape in part.pieces:
            met = common(box, box_at(offsets, shape))
            if met is None:
                continue
            run = contiguous_run(relative(met, offsets), shape)
            # one index in the leading dimensions, a range in one, all of those behind: so in a piece
            assert run is not None
            yield Copy(
                rank=rank,
                offset=in_image + run[0] * item,
                nbytes=run[1] * item,
                first=part.offset + first * item - start,
                shape=(*extents(box), item),
                index=(*slices(relative(met, [side[0] for side in box])), slice(None)),
            )


def _box(index: Sequence[int | slice], shape: Offsets) -> Box:
    sides = [(side, side + 1) if isinstance(side, int) else (side.start, side.stop) for side in index]
    return (*sides, *((0, extent) for extent in shape[len(sides) :]))


@dataclass(slots=True)
class Read:
    """Bytes [start, stop) of one rank's file of loose bytes, and what is copied out of them."""

    rank: int
    start: int
    stop: int
    copies: list[Copy]

    def scatter(self, source: memoryview, target: memoryview) -> None:
        """Copy what was read to where it goes."""
        for copy in self.copies:
            raw = source[copy.offset - self.start :][: copy.nbytes]
            nbytes = math.prod(copy.shape)
            region = target[copy.first : copy.first + nbytes]
            if copy.nbytes == nbytes:  # of each stretch
                region[:] = raw
            else:
                where = torch.frombuffer(region, dtype=torch.uint8).view(copy.shape)[copy.index]
                where.copy_(torch.frombuffer(raw, dtype=torch.uint8).view(where.shape))


def spans_between(file: int, nbytes: int, taken: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """What of a file nobody writes at once. Raises ConflictError."""
    edges = sorted(taken)
    for (_, stop), (start, _) in pairwise(edges):
        if start < stop:
            raise ConflictError(f"two ranks would write byte {start} of one file")
    end = 0
    for start, stop in (*edges, (nbytes, nbytes)):
        if end < start:
            yield file, end, start
        end = stop


def dealt(spans: Sequence[tuple[int, int, int]], num_ranks: int) -> list[list[tuple[int, int, int]]]:
    """``spans`` cut among ranks, about as many blocks for each."""
    # by blocks, whoever holds them: each rank reads from all others anyhow
    total = sum(-(-(stop - start) // BLOCK_BYTES) for _, start, stop in spans)
    quota = -(-total // num_ranks)
    dealt: list[list[tuple[int, int, int]]] = [[] for _ in range(num_ranks)]
    rank, left = 0, quota
    for file, start, end in spans:
        low = start
        while low < end:
            if not left:
                rank, left = rank + 1, quota
            stop = min(end, low + left * BLOCK_BYTES)
            dealt[rank].append((file, low, stop))
            left -= -(-(stop - low) // BLOCK_BYTES)
            low = stop
    return dealt


def overlapping(parts: Sequence[Part], spans: Sequence[tuple[int, int, int]]) -> Iterator[Part]:
    """Those of ``parts``, which ascend without an overlap, that have bytes in ``spans``, each once."""
    # neighbours may be cut by one span's end: the next begins with the same part, which is told once
    starts = [part[:2] for part in parts]
    behind = 0
    for file, start, stop in spans:
        index = max(bisect_right(starts, (file, start)) - 1, behind)
        while index < len(parts) and parts[index][:2] < (file, stop):
            if parts[index].file == file and parts[index].stop > start:
                yield parts[index]
                behind = index + 1
            index += 1
