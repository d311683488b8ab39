"""DCP's format: the `.distcp` file image, where each item lies in it, and the footer of block checksums.

Enters: dtypes and shapes of tensors, rooms of leaves. Leaves: a FileLayout. Invariant: the layout is a pure
function of its input.

    image   gap head PAYLOAD tail | gap head PAYLOAD tail | ... | room | room | ... zeros to 4 KiB
    footer  one xxh3_64 per 64 KiB block of the image | zeros | trailer, to 4 KiB          (docs/adr/0005)
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash

from .base import FileLayout, Format, PublicFiles, PublicTensor
from .metadata_writer import Group, MetadataTemplate, metadata_template
from .zip_item import pad_item, padded_bytes, tensor_frame

BLOCK_BYTES = 64 * 1024
"""What one checksum covers. xxhash keeps the GIL for buffers below 100 KB, so that a loop over a part costs
the trainer a few milliseconds in all; at 256 KiB it releases the GIL for each block and waits up to 5 ms to
get it back."""
SECTOR_BYTES = 4096
"""What direct I/O, rooms and the ends of image and file are aligned to."""
# As torch aligns the records of its own zips.
_SMALL_ALIGN = 64
# A gap, of a page at most, is nothing beside a payload of this length.
_LARGE_BYTES = 1 << 20

_TRAILER = struct.Struct("<8sIIQQQ")
_MAGIC = b"DCPASYNC"
FOOTER_VERSION = 1


class FooterError(ValueError):
    """A footer that is missing, damaged or of a newer version."""


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class DistcpFormat:
    """DCP's own format, written by hand: each tensor and each leaf is an item that ``torch.load`` reads."""

    shares_files = False

    def __repr__(self) -> str:
        return "<DistcpFormat>"

    def room(self, item_bytes: int) -> int:
        return padded_bytes(item_bytes, SECTOR_BYTES)

    def padded(self, item: bytes, room: int) -> bytes:
        return pad_item(item, room)

    def index(
        self,
        groups: Sequence[Group],
        paths: Mapping[str, Sequence[str | int]],
        *,
        planner_data: object = None,
    ) -> MetadataTemplate:
        return metadata_template(groups, paths, planner_data=planner_data)

    def layout(
        self,
        tensors: Sequence[tuple[torch.dtype, tuple[int, ...]]],
        rooms: Sequence[int],
    ) -> FileLayout:
        """Payloads start on 64 bytes, from 1 MiB on 4 KiB, by a gap before the item."""
        item_offsets: list[int] = []
        item_lengths: list[int] = []
        payload_offsets: list[int] = []
        payload_lengths: list[int] = []
        frames: list[tuple[bytes, bytes]] = []
        end = 0
        for dtype, shape in tensors:
            frame = tensor_frame(dtype, shape)
            nbytes = dtype.itemsize
            for extent in shape:
                nbytes *= extent
            align = SECTOR_BYTES if nbytes >= _LARGE_BYTES else _SMALL_ALIGN
            # the payload is aligned, not the item: the head before it has a length of its own
            payload = _round_up(end + len(frame[0]), align)
            item_offsets.append(payload - len(frame[0]))
            item_lengths.append(len(frame[0]) + nbytes + len(frame[1]))
            payload_offsets.append(payload)
            payload_lengths.append(nbytes)
            frames.append(frame)
            end = payload + nbytes + len(frame[1])
        for room in rooms:
            if room % SECTOR_BYTES:
                raise ValueError(f"a room of {room} bytes is no multiple of {SECTOR_BYTES}")
            offset = _round_up(end, SECTOR_BYTES)
            item_offsets.append(offset)
            item_lengths.append(room)
            end = offset + room
        image_bytes = _round_up(end, SECTOR_BYTES)
        return FileLayout(
            item_offsets=item_offsets,
            item_bytes=item_lengths,
            payload_offsets=payload_offsets,
            payload_bytes=payload_lengths,
            frames=frames,
            image_bytes=image_bytes,
        )

    def public_files(self, tensors: Sequence[PublicTensor]) -> PublicFiles | None:
        return None


DISTCP: Format = DistcpFormat()
"""The format of what a save writes."""


def block_digests(buffer: memoryview) -> array[int]:
    """The checksum of each block of ``buffer``, which starts at a block's start."""
    digest = xxhash.xxh3_64_intdigest
    return array(
        "Q", [digest(buffer[start : start + BLOCK_BYTES]) for start in range(0, len(buffer), BLOCK_BYTES)]
    )


def num_blocks(image_bytes: int) -> int:
    """How many blocks, the last one perhaps short, an image has."""
    return -(-image_bytes // BLOCK_BYTES)


def footer_bytes(image_bytes: int) -> int:
    """Length of the footer behind an image."""
    return _round_up(8 * num_blocks(image_bytes) + _TRAILER.size, SECTOR_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """The block checksums of one file."""

    image_bytes: int
    """Length of the image they cover."""
    digests: array[int]
    """One xxh3_64 per block."""

    @property
    def digest(self) -> str:
        """Checksum of the table, 16 hex digits; the manifest holds it."""
        return xxhash.xxh3_64_hexdigest(_little(self.digests))

    def encode(self) -> bytes:
        """The footer's bytes, a multiple of SECTOR_BYTES."""
        table = _little(self.digests)
        trailer = _TRAILER.pack(
            _MAGIC,
            FOOTER_VERSION,
            BLOCK_BYTES,
            len(self.digests),
            self.image_bytes,
            xxhash.xxh3_64_intdigest(table),
        )
        # the trailer last, where a reader finds it by the length of the file alone
        return table + bytes(footer_bytes(self.image_bytes) - len(table) - len(trailer)) + trailer

    @classmethod
    def decode(cls, raw: bytes, file_bytes: int) -> Footer:
        """Read the footer from ``raw``, the last bytes of a file of ``file_bytes``: at least
        ``footer_span(file_bytes)``.

        Raises: FooterError.
        """
        count, image, table_digest = read_trailer(raw, file_bytes)
        # from behind: `raw` may begin within the image, since only the trailer tells how long the footer is
        table = raw[len(raw) - footer_bytes(image) :][: 8 * count]
        if len(table) != 8 * count or xxhash.xxh3_64_intdigest(table) != table_digest:
            raise FooterError("the footer's table does not match its own checksum")
        digests = array("Q")
        digests.frombytes(table)
        if sys.byteorder == "big":
            digests.byteswap()
        return cls(image_bytes=image, digests=digests)


def read_trailer(raw: bytes, file_bytes: int) -> tuple[int, int, int]:
    """(number of blocks, length of the image, digest of the table) by the last bytes of a file of
    ``file_bytes``. Raises FooterError."""
    if len(raw) < _TRAILER.size:
        raise FooterError("the file is too short for a footer")
    magic, version, block, count, image, table_digest = _TRAILER.unpack(raw[-_TRAILER.size :])
    # in this order: a newer version may mean other things by the rest, and is no damage
    if magic != _MAGIC:
        raise FooterError("there is no footer at the end of the file")
    if version > FOOTER_VERSION:
        raise FooterError(f"the footer has version {version}; this release reads up to {FOOTER_VERSION}")
    # by the length of the file: one that was cut or grew is told before any block is read
    if block != BLOCK_BYTES or count != num_blocks(image) or image + footer_bytes(image) != file_bytes:
        raise FooterError("the footer does not describe a file of this size")
    return count, image, table_digest


def footer_span(file_bytes: int) -> int:
    """An upper bound of the footer's length in a file of ``file_bytes``, so that one read fetches it."""
    # by the file's length, as that of the image is known from the footer alone
    return min(file_bytes, footer_bytes(file_bytes) + SECTOR_BYTES)


def _little(digests: array[int]) -> bytes:
    if sys.byteorder == "big":
        digests = array("Q", digests)
        digests.byteswap()
    return digests.tobytes()
