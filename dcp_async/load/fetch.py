"""Spans: ranges of files that are read, verified, and spread over the memory that they are for.

Enters: Pieces, each a range of a file with its destination. Leaves: Spans, block-aligned where there are
checksums, and batches of them that one call reads; then filled destinations, or DamagedError. Pure: no I/O,
nothing is allocated but on demand. Invariant: nothing leaves scratch memory before its block was verified.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash

from ..formats import BLOCK_BYTES

_SMALL_BYTES = BLOCK_BYTES
"""Pieces below this are read through a scratch buffer and copied: a buffer of their own in the call would
cost more."""


_memory_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_WRITABLE = 0x200


class DamagedError(ValueError):
    """A checkpoint contradicts itself; ``names`` are the tensors concerned."""

    def __init__(
        self, message: str, names: Sequence[str], *, file: str = "", ranges: Sequence[tuple[int, int]] = ()
    ) -> None:
        """``ranges``: bytes of ``file`` that are bad, whatever else lies there."""
        super().__init__(message)
        self.names = tuple(names)
        self.file = file
        self.ranges = ranges


def host_memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable; valid while the tensor is alive."""
    nbytes = tensor.nbytes
    if nbytes == 0:
        return memoryview(bytearray())
    memory: memoryview = _memory_at(tensor.data_ptr(), nbytes, _WRITABLE)
    return memory


class Fill:
    """A buffer that is read in pieces and used when it is whole: a leaf's item, or rows that don't lie as in
    the target."""

    __slots__ = ("_buffer", "_finish", "_left", "_nbytes")

    def __init__(self, nbytes: int, finish: Callable[[bytearray], None]) -> None:
        self._nbytes = self._left = nbytes
        self._finish = finish
        self._buffer: bytearray | None = None

    def memory(self) -> memoryview:
        """The buffer, made when the first piece wants it."""
        if self._buffer is None:
            self._buffer = bytearray(self._nbytes)
        return memoryview(self._buffer)

    def filled(self, nbytes: int) -> None:
        """``nbytes`` more have arrived and were verified; the last ones finish it and free the buffer."""
        self._left -= nbytes
        if self._left == 0:
            buffer, self._buffer = self._buffer or bytearray(), None
            self._finish(buffer)


@dataclass(slots=True)
class Piece:
    """Bytes [offset, offset + nbytes) of a file go to ``target`` at ``at``."""

    offset: int
    nbytes: int
    target: memoryview | Fill
    at: int
    name: str

    def memory(self) -> memoryview:
        whole = self.target.memory() if isinstance(self.target, Fill) else self.target
        return whole[self.at : self.at + self.nbytes]

    def split(self, nbytes: int) -> tuple[Piece, Piece]:
        """The first ``nbytes`` and the rest."""
        rest = Piece(self.offset + nbytes, self.nbytes - nbytes, self.target, self.at + nbytes, self.name)
        return Piece(self.offset, nbytes, self.target, self.at, self.name), rest


@dataclass(slots=True)
class Span:
    """A range of a file that is read by one call; with ``digests`` it starts and ends at blocks."""

    file: str
    start: int
    stop: int
    pieces: list[Piece]
    digests: array[int] | None
    """Checksums of the file's blocks; None if its writer recorded none."""


class FetchBuffers:
    """The memory that one span is read into: large pieces directly, everything else through scratch."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.segments: list[tuple[int, memoryview]] = []
        """(offset in the file, memory), adjacent, from span.start to span.stop."""
        self._scattered: list[tuple[Piece, memoryview]] = []
        self._verified = span.start
        self._segment = 0
        """Where the next block begins: its byte in the file, and the first segment that may hold it."""
        self._bad: list[tuple[int, int]] = []
        direct = [piece for piece in span.pieces if piece.nbytes >= _SMALL_BYTES]
        scratch = memoryview(bytearray(span.stop - span.start - sum(piece.nbytes for piece in direct)))
        used = 0
        at = span.start
        runs: list[tuple[int, int, memoryview]] = []
        for piece in direct:
            if at < piece.offset:
                runs.append((at, piece.offset, scratch[used : used + piece.offset - at]))
                self.segments.append((at, runs[-1][2]))
                used += piece.offset - at
            self.segments.append((piece.offset, piece.memory()))
            at = piece.offset + piece.nbytes
        if at < span.stop:
            runs.append((at, span.stop, scratch[used:]))
            self.segments.append((at, runs[-1][2]))
        following = iter(runs)
        start, stop, memory = next(following, (0, 0, memoryview(b"")))
        for piece in span.pieces:
            if piece.nbytes < _SMALL_BYTES and piece.nbytes:
                while piece.offset >= stop:
                    start, stop, memory = next(following)
                self._scattered.append(
                    (piece, memory[piece.offset - start : piece.offset - start + piece.nbytes])
                )

    def verify(self, nbytes: int) -> None:
        """Check the blocks that lie in the span's first ``nbytes``, each once. Raises DamagedError once the
        whole span was checked, with the names of all tensors in bad blocks, and then at each call."""
        digests, span = self.span.digests, self.span
        if digests is None:
            return
        low, index = self._verified, self._segment
        one_shot = xxhash.xxh3_64_intdigest
        while low < span.stop and (high := min(low + BLOCK_BYTES, span.stop)) <= span.start + nbytes:
            while index + 1 < len(self.segments) and self.segments[index + 1][0] <= low:
                index += 1
            start, memory = self.segments[index]
            if start + len(memory) >= high:
                value = one_shot(memory[low - start : high - start])
            else:
                value = self._stream(index, low, high)
            if value != digests[low // BLOCK_BYTES]:
                self._bad.append((low, low + BLOCK_BYTES))
            low = high
        self._verified, self._segment = low, index
        if self._bad and low == span.stop:
            raise self._damage(self._bad)

    def _damage(self, ranges: Sequence[tuple[int, int]]) -> DamagedError:
        span = self.span
        names = {
            piece.name: None
            for piece in span.pieces
            if any(piece.offset < high and low < piece.offset + piece.nbytes for low, high in ranges)
        }
        shown = ", ".join(f"[{low}, {high})" for low, high in ranges[:3])
        return DamagedError(
            f"{len(ranges)} block(s) of {span.file} do not match their checksum, first at bytes {shown}",
            list(names),
            file=span.file,
            ranges=ranges,
        )

    def _stream(self, index: int, low: int, high: int) -> int:
        digest = xxhash.xxh3_64()
        for start, memory in itertools.islice(self.segments, index, None):
            if start >= high:
                break
            digest.update(memory[max(low - start, 0) : high - start])
        return digest.intdigest()

    @property
    def is_unfinished(self) -> bool:
        """Whether anything is left to do once the bytes are there and verified."""
        return bool(self._scattered) or any(isinstance(piece.target, Fill) for piece in self.span.pieces)

    def scatter(self) -> None:
        """Copy the small pieces out of scratch, then finish what became whole."""
        for piece, memory in self._scattered:
            piece.memory()[:] = memory
        for piece in self.span.pieces:
            if isinstance(piece.target, Fill):
                piece.target.filled(piece.nbytes)


class Check:
    """Verifies the spans of one file's batch in the order in which they arrive, while their bytes are still
    in the processor's caches. What was found damaged is never done. Not for two threads at once."""

    def __init__(self, batch: Iterable[FetchBuffers]) -> None:
        self._waiting = deque(part for part in batch if part.span.digests is not None)
        self._before = 0
        """Bytes of the spans that are done."""

    @property
    def done(self) -> bool:
        """Whether every block of the batch was verified."""
        return not self._waiting

    def arrived(self, nbytes: int) -> None:
        """The first ``nbytes`` of the batch, counted over its spans, are in their buffers. Raises
        DamagedError."""
        while self._waiting:
            part = self._waiting[0]
            whole = part.span.stop - part.span.start
            part.verify(nbytes - self._before)
            if self._before + whole > nbytes:
                return
            self._before += whole
            self._waiting.popleft()

    def finish(self) -> None:
        """Everything is in its buffers. Raises DamagedError."""
        self.arrived(sys.maxsize)


def make_spans(
    pieces: Mapping[str, list[Piece]],
    digests: Mapping[str, array[int]],
    image_bytes: Mapping[str, int],
    *,
    part_bytes: int,
) -> Iterator[Span]:
    """Group each file's pieces into spans of at most ``part_bytes``, rounded out to blocks where there are
    checksums.

    Gaps smaller than a block are read through: a seek would cost more.
    """
    for file, unsorted in pieces.items():
        table = digests.get(file)
        align = BLOCK_BYTES if table is not None else 1
        queue = sorted((piece for piece in unsorted if piece.nbytes), key=lambda piece: piece.offset)
        queue.reverse()
        while queue:
            start = queue[-1].offset // align * align
            limit = start + part_bytes
            taken: list[Piece] = []
            end = queue[-1].offset
            while queue and queue[-1].offset < limit and queue[-1].offset - end < BLOCK_BYTES:
                piece = queue.pop()
                if piece.offset < end:
                    # two targets want the same bytes: the second gets a span of its own
                    queue.append(piece)
                    break
                if piece.offset + piece.nbytes > limit:
                    piece, rest = piece.split(limit - piece.offset)
                    queue.append(rest)
                taken.append(piece)
                end = piece.offset + piece.nbytes
            stop = -(-end // align) * align
            yield Span(file, start, min(stop, image_bytes[file]) if table is not None else stop, taken, table)


def make_batches(spans: Iterable[Span], *, part_bytes: int) -> Iterator[list[Span]]:
    """Group neighbours of one file, ``part_bytes`` in all, that one call reads: heads of items lie far apart,
    and a call costs more than they do."""
    batch: list[Span] = []
    nbytes = 0
    for span in spans:
        nbytes += span.stop - span.start
        if batch and (nbytes > part_bytes or span.file != batch[0].file):
            yield batch
            batch, nbytes = [], span.stop - span.start
        batch.append(span)
    if batch:
        yield batch
