"""Pieces and spans: which bytes of which file an item needs, and what one call reads.

Enters: Pieces, each a range of a file with its destination. Leaves: Spans, block-aligned where there are
checksums, and batches of them that one call reads. Pure: no I/O, nothing is allocated but on demand.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..formats import BLOCK_BYTES

# torch gives no writable buffer of a tensor without numpy, which not every installation has
_memory_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
# PyBUF_WRITE of CPython's C API
_WRITABLE = 0x200


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
        # late: a plan has a Fill for each leaf, and only those in flight may take memory
        if self._buffer is None:
            self._buffer = bytearray(self._nbytes)
        return memoryview(self._buffer)

    def filled(self, nbytes: int) -> None:
        """``nbytes`` more have arrived and were verified; the last ones finish it and free the buffer."""
        self._left -= nbytes
        if self._left == 0:
            buffer, self._buffer = self._buffer or bytearray(), None
            self._finish(buffer)


class DeviceTarget:
    """A tensor on a device, and how its elements lie in the bytes that are read for it.

    Those bytes are the tensor's own (``is_direct``), or they are brought to the device first and converted or
    spread there.
    """

    __slots__ = ("device", "dtype", "is_direct", "left", "memory", "nbytes", "strides", "tensor")

    def __init__(
        self,
        tensor: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype,
        nbytes: int,
        strides: Sequence[int] | None = None,
    ) -> None:
        """``dtype``, ``strides``: of the elements as they are read; without ``strides`` they are the tensor's
        bytes."""
        self.tensor = tensor
        self.device = device
        self.dtype = dtype
        self.nbytes = self.left = nbytes
        self.is_direct = strides is None
        self.strides = tensor.stride() if strides is None else strides
        self.memory: torch.Tensor | None = None
        """Where pieces of it go on the device: its own bytes, or memory that holds what was read so far."""


@dataclass(slots=True)
class Piece:
    """Bytes [offset, offset + nbytes) of a file go to ``target`` from its byte ``start`` on."""

    offset: int
    nbytes: int
    target: memoryview | Fill | DeviceTarget
    start: int
    name: str

    def memory(self) -> memoryview:
        """Host memory that the bytes go to."""
        assert not isinstance(self.target, DeviceTarget)
        whole = self.target.memory() if isinstance(self.target, Fill) else self.target
        return whole[self.start : self.start + self.nbytes]

    def split(self, nbytes: int) -> tuple[Piece, Piece]:
        """The first ``nbytes`` and the rest."""
        rest = Piece(self.offset + nbytes, self.nbytes - nbytes, self.target, self.start + nbytes, self.name)
        return Piece(self.offset, nbytes, self.target, self.start, self.name), rest


@dataclass(slots=True)
class Span:
    """A range of a file that is read by one call; with ``digests`` it starts and ends at blocks."""

    file: str
    start: int
    stop: int
    pieces: list[Piece]
    digests: array[int] | None
    """Checksums of the file's blocks; None if its writer recorded none."""


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
        queue.reverse()  # taken from the end, and put back there
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
            # the last block of a file ends with its image: what follows is the footer
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
