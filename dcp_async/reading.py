"""What a load reads: from DCP's Metadata and the wanted names to byte ranges of files, each with its
destination.

Enters: a checkpoint's contents and the targets. Leaves: Spans, block-aligned ranges that one call reads and
one pass verifies. Pure: no I/O, nothing is allocated but on demand. Invariant: every byte of every target is
covered before a target is touched.
"""

from __future__ import annotations

import ctypes
import io
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from .formats.distcp import BLOCK_BYTES
from .formats.zip_item import PLAIN_DTYPES, tensor_frame
from .trust import Trust, load_item
from .walk import PLAIN_TENSORS

_SMALL_BYTES = BLOCK_BYTES
"""Pieces below this are read through a scratch buffer and copied: a buffer of their own in the call would
cost more."""

Box = tuple[tuple[int, int], ...]
"""Per dimension, [start, stop)."""


class CoverageError(ValueError):
    """The checkpoint's chunks do not cover what is wanted."""


class DamagedError(ValueError):
    """A checkpoint contradicts itself; ``names`` are the tensors concerned."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


def host_memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable; valid while the tensor is alive."""
    view = ctypes.pythonapi.PyMemoryView_FromMemory
    view.restype = ctypes.py_object
    view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
    writable = 0x200
    if tensor.nbytes == 0:
        return memoryview(bytearray())
    memory: memoryview = view(tensor.data_ptr(), tensor.nbytes, writable)
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

    def verify(self) -> None:
        """Check every block. Raises DamagedError with the names of the tensors in the bad ones."""
        digests, span = self.span.digests, self.span
        if digests is None:
            return
        bad: list[int] = []
        index = 0
        one_shot = xxhash.xxh3_64_intdigest
        for block in range(span.start // BLOCK_BYTES, -(-span.stop // BLOCK_BYTES)):
            low, high = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, span.stop)
            while index + 1 < len(self.segments) and self.segments[index + 1][0] <= low:
                index += 1
            start, memory = self.segments[index]
            if start + len(memory) >= high:
                value = one_shot(memory[low - start : high - start])
            else:
                value = self._stream(index, low, high)
            if value != digests[block]:
                bad.append(block)
        if bad:
            ranges = [(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES) for block in bad]
            names = {
                piece.name: None
                for piece in span.pieces
                if any(piece.offset < high and low < piece.offset + piece.nbytes for low, high in ranges)
            }
            shown = ", ".join(f"[{low}, {high})" for low, high in ranges[:3])
            raise DamagedError(
                f"{len(bad)} block(s) of {span.file} do not match their checksum, first at bytes {shown}",
                list(names),
            )

    def _stream(self, index: int, low: int, high: int) -> int:
        digest = xxhash.xxh3_64()
        for start, memory in itertools.islice(self.segments, index, None):
            if start >= high:
                break
            digest.update(memory[max(low - start, 0) : high - start])
        return digest.intdigest()

    def scatter(self) -> None:
        """Copy the small pieces out of scratch, then finish what became whole."""
        for piece, memory in self._scattered:
            piece.memory()[:] = memory
        for piece in self.span.pieces:
            if isinstance(piece.target, Fill):
                piece.target.filled(piece.nbytes)


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


def contiguous_run(box: Box, shape: Sequence[int]) -> tuple[int, int] | None:
    """(first element, number) if ``box`` is one run of a row-major ``shape``, else None."""
    start, numel, partial = 0, 1, False
    for (low, high), extent in zip(reversed(box), reversed(shape), strict=True):
        if partial and high - low != 1:
            return None
        partial = partial or high - low != extent
        numel *= high - low
    stride = 1
    for (low, _), extent in zip(reversed(box), reversed(shape), strict=True):
        start += low * stride
        stride *= extent
    return start, numel


def check_coverage(shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Raises CoverageError unless ``boxes`` cover every element of ``shape``: never zeros where a chunk is
    missing."""
    if 0 in shape or not shape:
        if not shape and not boxes:
            raise CoverageError("no chunk holds its value")
        return
    edges = [
        sorted({0, extent, *(edge for box in boxes for edge in box[dim])}) for dim, extent in enumerate(shape)
    ]
    cells = torch.zeros([len(edge) - 1 for edge in edges], dtype=torch.bool)
    for box in boxes:
        cells[
            tuple(slice(edges[dim].index(low), edges[dim].index(high)) for dim, (low, high) in enumerate(box))
        ] = True
    if not cells.all():
        hole = [edges[dim][int(at)] for dim, at in enumerate((~cells).nonzero()[0])]
        raise CoverageError(f"no chunk covers the region that starts at {hole}")


@dataclass(slots=True, kw_only=True)
class Source:
    """Where a checkpoint's items lie and how to read them."""

    tensors: Mapping[str, TensorStorageMetadata]
    places: Mapping[MetadataIndex, tuple[str, int, int]]
    """Index -> (file, offset, length)."""
    raw_files: frozenset[str]
    """Files whose plain tensor items are laid out by our format: payload at a known place."""
    exotic: frozenset[str]
    trust: Trust


def _is_inside(box: Box, shape: Sequence[int]) -> bool:
    return len(box) == len(shape) and all(
        0 <= low <= high <= extent for (low, high), extent in zip(box, shape, strict=True)
    )


class Collector:
    """Gathers the pieces of one load, file by file."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.pieces: dict[str, list[Piece]] = {}
        self.nbytes = 0
        self._keep: list[torch.Tensor] = []

    def _add(self, file: str, piece: Piece) -> None:
        self.pieces.setdefault(file, []).append(piece)
        self.nbytes += piece.nbytes

    def _place(self, name: str, index: MetadataIndex) -> tuple[str, int, int]:
        try:
            return self._source.places[index]
        except KeyError:
            raise DamagedError(
                f"{name}: .metadata does not say where its item {index} lies", [name]
            ) from None

    def want_leaf(self, name: str, receive: Callable[[str, Any], None]) -> None:
        """Read the item ``name``, a pickled leaf or a whole tensor stored as one, and hand its value over."""
        meta = self._source.tensors.get(name)
        if meta is not None and len(meta.chunks) != 1:
            raise DamagedError(f"{name}: a tensor of this kind can't be put together from chunks", [name])
        file, offset, length = self._place(
            name, MetadataIndex(name, meta.chunks[0].offsets if meta else None)
        )
        trust = self._source.trust

        def finish(buffer: bytearray) -> None:
            receive(name, load_item(io.BytesIO(buffer), trust))

        self._add(file, Piece(offset, length, Fill(length, finish), 0, name))

    def want_tensor(self, name: str, target: torch.Tensor) -> None:
        """Fill ``target``, whose shape is the whole tensor's.

        Raises: CoverageError, DamagedError.
        """
        chunks = self._source.tensors[name].chunks
        boxes = [
            tuple((low, low + extent) for low, extent in zip(chunk.offsets, chunk.sizes, strict=True))
            for chunk in chunks
        ]
        if not all(_is_inside(box, target.shape) for box in boxes):
            raise DamagedError(f"{name}: a chunk lies outside of the tensor", [name])
        if sum(torch.Size(chunk.sizes).numel() for chunk in chunks) > target.numel():
            raise DamagedError(f"{name}: its chunks overlap", [name])
        if len(chunks) != 1 or chunks[0].sizes != target.shape:
            try:
                check_coverage(target.shape, boxes)
            except CoverageError as error:
                raise CoverageError(f"{name}: {error}") from None
        for chunk, box in zip(chunks, boxes, strict=True):
            if all(low < high for low, high in box):
                self._want_chunk(name, target, chunk, box)

    def _want_chunk(self, name: str, target: torch.Tensor, chunk: ChunkStorageMetadata, box: Box) -> None:
        file, offset, length = self._place(name, MetadataIndex(name, chunk.offsets))
        here = tuple(slice(low, high) for low, high in box)
        shape = tuple(chunk.sizes)
        dtype = self._source.tensors[name].properties.dtype
        if file not in self._source.raw_files or name in self._source.exotic or dtype not in PLAIN_DTYPES:
            # a whole tensor is not indexed: sparse ones can't be
            place = target if shape == tuple(target.shape) else target[here]
            fill = Fill(length, self._item_finisher(name, place, shape))
            self._add(file, Piece(offset, length, fill, 0, name))
            return
        head, tail = tensor_frame(dtype, shape)
        nbytes = dtype.itemsize
        for extent in shape:
            nbytes *= extent
        if length != len(head) + nbytes + len(tail):
            raise DamagedError(
                f"{name}: its item has {length} bytes, a chunk of {shape} {dtype} has others", [name]
            )
        payload = offset + len(head)
        run = contiguous_run(box, target.shape)
        raw = type(target) in PLAIN_TENSORS and not target.is_conj() and not target.is_neg()
        if run is not None and raw and target.is_cpu and target.is_contiguous() and target.dtype == dtype:
            self._keep.append(target)
            at = run[0] * dtype.itemsize
            self._add(file, Piece(payload, nbytes, host_memory(target.detach()), at, name))
            return
        for rows, low, count in _row_groups(shape, dtype.itemsize):
            finish = self._rows_finisher(target[here], rows, dtype)
            self._add(file, Piece(payload + low, count, Fill(count, finish), 0, name))

    def _item_finisher(
        self, name: str, target: torch.Tensor, shape: tuple[int, ...]
    ) -> Callable[[bytearray], None]:
        trust = self._source.trust
        dtype = self._source.tensors[name].properties.dtype

        def finish(buffer: bytearray) -> None:
            value = load_item(io.BytesIO(buffer), trust)
            if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
                raise DamagedError(
                    f"{name}: its item is not the tensor of {shape} that .metadata names", [name]
                )
            target.copy_(value)  # not its detach(): that of a sparse tensor is a copy

        return finish

    @staticmethod
    def _rows_finisher(
        target: torch.Tensor, rows: slice | None, dtype: torch.dtype
    ) -> Callable[[bytearray], None]:
        place = target.detach() if rows is None else target.detach()[rows]

        def finish(buffer: bytearray) -> None:
            place.copy_(torch.frombuffer(buffer, dtype=dtype).view(place.shape))

        return finish


def _row_groups(
    shape: tuple[int, ...], itemsize: int, limit: int = 32 << 20
) -> Iterable[tuple[slice | None, int, int]]:
    """Cut a chunk along its first dimension: (rows, first byte, number of bytes), each within ``limit`` where
    rows are."""
    numel = 1
    for extent in shape:
        numel *= extent
    if not shape:
        return [(None, 0, itemsize)]
    row_bytes = numel // shape[0] * itemsize
    step = max(limit // max(row_bytes, 1), 1)
    return [
        (
            slice(row, min(row + step, shape[0])),
            row * row_bytes,
            (min(row + step, shape[0]) - row) * row_bytes,
        )
        for row in range(0, shape[0], step)
    ]
