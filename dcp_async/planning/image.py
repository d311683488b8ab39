"""Where one rank's tensors and leaves lie in its image, and which file each byte of that belongs to.

Enters: what the rank writes, and its PublicShare. Leaves: a FileLayout. Pure. Invariant: a block of a public
file that the rank holds all of begins at a block's start in its image, too, so that it is checksummed and
written from there; all other bytes of public files are loose.

    image    | gap | whole blocks of public files | loose bytes | ... || the rank's own file: items, leaves |
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from .._geometry import box_at, contiguous_run
from ..formats import BLOCK_BYTES, LOOSE, SECTOR_BYTES, FileLayout, Format, Runs
from ..state import Structure
from .public_plan import PublicShare, WrittenRuns

_ALIGN = 64
"""Loose bytes lie as far behind a multiple of it as in their file, so that elements are aligned."""


@dataclass(slots=True)
class _Image:
    """The public part of an image, as far as it is laid out."""

    end: int = 0
    runs: Runs = field(default_factory=lambda: Runs(starts=[], stops=[], files=[], offsets=[]))
    payloads: list[tuple[int, int, int]] = field(default_factory=list)
    """(offset, length, number of the tensor)."""
    heads: list[tuple[int, bytes]] = field(default_factory=list)

    def add(self, stretch: Sequence[_Piece], file_bytes: int, heads: Sequence[bytes]) -> None:
        """Append pieces that follow each other in a file of ``file_bytes``."""
        file, start, stop = stretch[0].file, stretch[0].start, stretch[-1].stop
        # the blocks that all bytes are here of; at the end of the file a shorter one is whole
        low = -(-start // BLOCK_BYTES) * BLOCK_BYTES
        high = stop if stop == file_bytes else stop // BLOCK_BYTES * BLOCK_BYTES
        align = BLOCK_BYTES if low < high else _ALIGN
        # a gap of up to a block: it costs memory of the pool, and saves a copy of the whole stretch
        base = self.end + (start - self.end) % align
        to_image = base - start
        for piece in stretch:
            if piece.number is None:
                self.heads.append((piece.start + to_image, heads[file]))
            else:
                self.payloads.append((piece.start + to_image, piece.stop - piece.start, piece.number))
        if low < high:
            self.runs.add_loose(base, low + to_image, SECTOR_BYTES)
            self.runs.add(low + to_image, high + to_image, file, low)
            self.runs.add_loose(high + to_image, stop + to_image, SECTOR_BYTES)
        else:
            self.runs.add_loose(base, stop + to_image, SECTOR_BYTES)
        self.end = stop + to_image

    def add_scattered(self, nbytes: int, number: int) -> None:
        """Append a piece that is no stretch of its file."""
        base = -(-self.end // _ALIGN) * _ALIGN
        self.payloads.append((base, nbytes, number))
        self.runs.add_loose(base, base + nbytes, SECTOR_BYTES)
        self.end = base + nbytes


@dataclass(frozen=True, slots=True, order=True)
class _Piece:
    """A stretch of a public file."""

    file: int
    start: int
    stop: int
    number: int | None
    """The tensor's; None for the file's head."""


def lay_out(
    format: Format,
    structure: Structure,
    tensors: Sequence[int],
    rooms: Sequence[int],
    share: PublicShare | None,
) -> FileLayout:
    """The image of ``tensors``, by their index in the structure, and of leaves in ``rooms``."""
    forms = [(structure.dtypes[index], tuple(structure.shapes[index])) for index in tensors]
    if share is None:
        return format.layout(forms, rooms)
    files, starts = array("i", share["files"]), array("Q", share["offsets"])
    # a head is a piece as tensors are: on one rank it and what follows make up one stretch, the whole file
    pieces = [_Piece(file, 0, len(head), None) for file, head in enumerate(share["heads"])]
    scattered: list[tuple[int, int]] = []
    beside: list[int] = []
    for number, index in enumerate(tensors):
        if files[index] < 0:
            beside.append(number)
            continue
        dtype, shape = forms[number]
        shard = structure.shards.get(index)
        size, offsets = (shard.size, shard.offsets) if shard else (shape, (0,) * len(shape))
        run = contiguous_run(box_at(offsets, shape), size)
        if run is None:  # its rows lie apart in the file; staging wants them in one place
            scattered.append((number, structure.shapes[index].numel() * dtype.itemsize))
        else:
            start = starts[index] + run[0] * dtype.itemsize
            pieces.append(_Piece(files[index], start, start + run[1] * dtype.itemsize, number))
    image = _Image()
    for stretch in _stretches(sorted(pieces, key=_position)):
        image.add(stretch, share["lengths"][stretch[0].file], share["heads"])
    for number, nbytes in scattered:
        image.add_scattered(nbytes, number)
    return _joined(image, format.layout([forms[number] for number in beside], rooms), beside, share)


def _position(piece: _Piece) -> tuple[int, int, int]:
    return piece.file, piece.start, piece.stop


def _stretches(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces, ascending, that follow each other without a gap."""
    number = 0
    ids: list[int] = []
    for before, piece in zip((None, *pieces), pieces, strict=False):
        number += before is None or (before.file, before.stop) != (piece.file, piece.start)
        ids.append(number)
    for _, members in groupby(zip(ids, pieces, strict=True), key=lambda member: member[0]):
        yield [piece for _, piece in members]


def _joined(image: _Image, own: FileLayout, beside: Sequence[int], share: PublicShare) -> FileLayout:
    """``image``, and behind it the rank's own file."""
    # its blocks are blocks of the image, too
    start = -(-image.end // BLOCK_BYTES) * BLOCK_BYTES
    offsets, lengths = [offset for offset, *_ in image.payloads], [nbytes for _, nbytes, _ in image.payloads]
    return replace(
        own,
        item_offsets=offsets + [start + offset for offset in own.item_offsets],
        item_bytes=lengths + own.item_bytes,
        payload_offsets=offsets + [start + offset for offset in own.payload_offsets],
        payload_bytes=lengths + own.payload_bytes,
        frames=[(b"", b"")] * len(offsets) + own.frames,
        image_bytes=start + own.image_bytes,
        own_start=start,
        runs=image.runs,
        public=tuple(zip(share["names"], share["lengths"], strict=True)),
        constants=tuple(image.heads),
        order=[number for *_, number in image.payloads] + list(beside),
    )


def told(layout: FileLayout) -> WrittenRuns:
    """What the coordinator needs to know of ``layout``'s public part."""
    # a few runs per tensor at most, as numbers: this travels from every rank
    whole = array("Q")
    runs = layout.runs
    for start, stop, file, offset in zip(runs.starts, runs.stops, runs.files, runs.offsets, strict=True):
        if file != LOOSE:
            whole.extend((file, offset, offset + stop - start))
    return WrittenRuns(whole=whole.tobytes(), heads=[offset for offset, _ in layout.constants])
