"""The memory that spans are read into, and the verification of what has arrived there.

Enters: batches of Spans, and slots of the staging pool for those that go to a device. Leaves: filled
destinations, or DamagedError. Invariant: nothing leaves scratch memory or a slot before its block was
verified.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterable, Sequence

import xxhash

from ..formats import BLOCK_BYTES
from .failures import DamagedError
from .spans import DeviceTarget, Fill, Piece, Span

_SMALL_BYTES = BLOCK_BYTES
"""Pieces below this are read through a scratch buffer and copied: a buffer of their own in the call would
cost more."""


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
        # straight into their targets, so before they are verified: a bad block leaves one half overwritten,
        # and the error says so (partially_loaded)
        direct = [piece for piece in span.pieces if piece.nbytes >= _SMALL_BYTES]
        # one allocation for all that is not read directly: small pieces, gaps, and edges of blocks
        scratch = memoryview(bytearray(span.stop - span.start - sum(piece.nbytes for piece in direct)))
        used = 0
        end = span.start
        runs: list[tuple[int, int, memoryview]] = []
        for piece in direct:
            if end < piece.offset:
                runs.append((end, piece.offset, scratch[used : used + piece.offset - end]))
                self.segments.append((end, runs[-1][2]))
                used += piece.offset - end
            self.segments.append((piece.offset, piece.memory()))
            end = piece.offset + piece.nbytes
        if end < span.stop:
            runs.append((end, span.stop, scratch[used:]))
            self.segments.append((end, runs[-1][2]))
        following = iter(runs)
        start, stop, memory = next(following, (0, 0, memoryview(b"")))
        for piece in span.pieces:
            if piece.nbytes < _SMALL_BYTES and piece.nbytes:
                # both ascend, so one pass pairs them; runs end at large pieces only, so none cuts a small one
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
            # a block seldom crosses segments, and hashing it in one call is faster than in a stream
            if start + len(memory) >= high:
                value = one_shot(memory[low - start : high - start])
            else:
                value = self._stream(index, low, high)
            if value != digests[low // BLOCK_BYTES]:
                self._bad.append((low, low + BLOCK_BYTES))
            low = high
        self._verified, self._segment = low, index
        # not at the first: the error names all tensors that are concerned
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
        # afterwards: the last piece of a Fill may be a small one
        for piece in self.span.pieces:
            if isinstance(piece.target, Fill):
                piece.target.filled(piece.nbytes)


class SlotBuffers(FetchBuffers):
    """A span that is read whole into a slot, since bytes of it go to a device from there."""

    def __init__(self, span: Span, slot: memoryview, start: int) -> None:
        """``start``: where in the slot the span begins."""
        self.span = span
        memory = slot[start : start + span.stop - span.start]
        self.segments = [(span.start, memory)]
        self._scattered = []
        self._verified, self._segment, self._bad = span.start, 0, []
        self.on_device: list[tuple[Piece, DeviceTarget, int]] = []
        """(piece, its target, where in the slot its bytes lie)."""
        for piece in span.pieces:
            offset = piece.offset - span.start
            if isinstance(piece.target, DeviceTarget):
                self.on_device.append((piece, piece.target, start + offset))
            elif piece.nbytes:
                self._scattered.append((piece, memory[offset : offset + piece.nbytes]))


def goes_to_device(batch: Iterable[Span]) -> bool:
    """Whether bytes of ``batch`` go to a device."""
    return any(isinstance(piece.target, DeviceTarget) for span in batch for piece in span.pieces)


class Check:
    """Verifies the spans of one file's batch in the order in which they arrive, while their bytes are still
    in the processor's caches. What was found damaged is never done. Not for two threads at once."""

    def __init__(self, batch: Iterable[FetchBuffers]) -> None:
        self._waiting = deque(buffers for buffers in batch if buffers.span.digests is not None)
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
            buffers = self._waiting[0]
            whole = buffers.span.stop - buffers.span.start
            buffers.verify(nbytes - self._before)
            if self._before + whole > nbytes:
                return
            self._before += whole
            self._waiting.popleft()

    def finish(self) -> None:
        """Everything is in its buffers. Raises DamagedError."""
        self.arrived(sys.maxsize)
