"""One stored item as ``torch.load`` reads it: inflated, its zip checked, and judged by its first bytes.

Enters: where an item lies and what `.metadata` says of it; then its bytes. Leaves: a tensor or an object.
Pure but for torch's decoding. Invariant: nothing is decoded that was not inflated within bounds, whose
records are not what was judged, or whose recorded checksums do not hold.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..trust import Trust, check_globals, is_zip, load_item
from .zip_item import CENTRAL, END, END64, LIMIT32, LOCAL, LOCATOR64

try:  # private, and only asked for by items that an extension wrote
    from torch.distributed.checkpoint import _extension
except ImportError:
    _extension = None  # type: ignore[assignment]

_HEAD_BYTES = 1024
"""Holds the pickle of any plain tensor, which is about 200 bytes long and starts at byte 64."""
_PACKED_HEAD_BYTES = 192 << 10
"""As many for a compressor that gives out nothing before its first block is whole; zstd's hold 128 KiB."""
_INFLATE_BYTES = 1 << 20
_FRAME_BYTES = 1 << 20
"""What an item may hold beside a tensor's elements: stock needs about 1.5 KB."""
_LEAF_BYTES = 256 << 20
_LEAF_RATIO = 1000
_LEAF_GROWTH = 4 << 30
"""`.metadata` does not tell how long a leaf is; one within these bounds fits into memory."""


class UnsupportedError(Exception):
    """The item may be whole, but was written in a way that can't be read here; the message says what to
    do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredItem:
    """An item and how to decode it."""

    name: str
    file: str
    offset: int
    length: int
    descriptors: Sequence[str]
    """Torch's stream extensions that wrote it, the last one applied first."""
    max_bytes: int
    """How long it may be when it is inflated."""
    has_digests: bool
    """Whether block checksums cover its file, so that its CRC-32s (0 in ours) say nothing more."""
    trust: Trust

    @property
    def head_bytes(self) -> int:
        """How many of its first bytes ``judge`` wants."""
        return min(_PACKED_HEAD_BYTES if self.descriptors else _HEAD_BYTES, self.length)

    def judge(self, head: bytearray) -> bool:
        """Whether its first bytes suffice to say that ``trust`` admits it. Raises UntrustedGlobal."""
        raw = bytes(head)
        try:
            if self.descriptors:
                raw = self._inflated(raw, _PACKED_HEAD_BYTES, cut=True)
            pickle_at = pickle_start(raw)
            if is_zip(raw) and pickle_at is None:
                return False
            # a small item is here whole, with the directory that torch goes by
            if len(head) == self.length and not self.descriptors and pickle_at is not None:
                check_records(memoryview(raw), crcs=False)
            check_globals(raw, pickle_at, self.trust)
        except ValueError:  # not whole, or damaged: decoding all of it will tell
            return False
        return True

    def decode(self, stored: bytearray) -> Any:
        """The tensor or object that its bytes hold.

        Raises: UntrustedGlobal; ValueError if it is damaged.
        """
        return self._load(self._whole(stored))

    def admitted(self, stored: bytearray) -> bytes | bytearray:
        """Its bytes as ``torch.load`` takes them, once ``trust`` has admitted what they hold.

        Raises: as ``decode``.
        """
        raw = self._whole(stored)
        if not self.trust.unsafe:
            self._load(raw)
        return raw

    def _whole(self, stored: bytearray) -> bytes | bytearray:
        return self._inflated(stored, self.max_bytes, cut=False) if self.descriptors else stored

    def _load(self, raw: bytes | bytearray) -> Any:
        if is_zip(raw):
            check_records(memoryview(raw), crcs=not self.has_digests)
        return load_item(io.BytesIO(raw), self.trust)

    def check_readable(self) -> None:
        """Raises UnsupportedError if an extension that wrote it is not there."""
        for descriptor in self.descriptors:
            registry = _extension.ExtensionRegistry() if _extension is not None else None
            name = descriptor.partition("/")[0]
            if registry is None or name not in registry.extensions:
                raise UnsupportedError(
                    f"{self.name} was written by the extension {descriptor!r}, which torch does not have; "
                    "load it with stock torch and that extension, and save it again without"
                )
            try:
                registry.from_descriptor_list([descriptor])
            except ValueError as error:
                what = "install zstandard" if name == "stream.zstd" else "install what it needs"
                raise UnsupportedError(
                    f"{self.name} was written by the extension {descriptor!r}, which can't be used here: "
                    f"{error}; {what}"
                ) from error

    def _inflated(self, raw: bytes | bytearray, limit: int, *, cut: bool) -> bytes:
        """What the extensions make of ``raw``; with ``cut`` its first bytes do, up to ``limit``."""
        stream: IO[bytes] = io.BytesIO(raw)
        for extension in _extension.ExtensionRegistry().from_descriptor_list(self.descriptors):
            if isinstance(extension, _extension.StreamTransformExtension):
                stream = extension.transform_from(stream)
        inflated = bytearray()
        try:
            while len(inflated) <= limit and (
                # one byte more than it may have tells that there is more, and no further one is made
                part := stream.read(min(_INFLATE_BYTES, limit + 1 - len(inflated)))
            ):
                inflated += part
        except MemoryError:
            raise
        except Exception as error:  # each compressor has its own
            if not cut:
                raise ValueError(f"it can't be inflated: {error}") from error
        if len(inflated) > limit and not cut:
            raise ValueError(f"it inflates to more than the {limit} bytes that it may have")
        return bytes(inflated)


def inflated_bound(meta: TensorStorageMetadata | None, sizes: Sequence[int], length: int) -> int:
    """How long an item of ``length`` stored bytes may become: as dtype and shape say, where there are any."""
    leaf = min(max(_LEAF_BYTES, _LEAF_RATIO * length), length + _LEAF_GROWTH)
    if meta is None or meta.properties.layout is not torch.strided:
        return leaf
    return torch.Size(sizes).numel() * meta.properties.dtype.itemsize + _FRAME_BYTES


def pickle_start(head: bytes) -> int | None:
    """Where the pickle of a zip begins, given its first bytes; None if the pickle is not its first record."""
    if len(head) < LOCAL.size or not head.startswith(b"PK\3\4"):
        return None
    *_, name_bytes, extra_bytes = LOCAL.unpack_from(head)
    name = head[LOCAL.size :][:name_bytes]
    return LOCAL.size + name_bytes + extra_bytes if name.endswith(b"/data.pkl") else None


def check_records(item: memoryview, *, crcs: bool) -> None:
    """Whether the directory of a whole zip lists its records as every reader understands them: stored, each
    once and apart from the others, and the pickle first if the first record claims to be it.

    With ``crcs`` they must match the CRC-32s that their writer recorded: those that are not 0.
    Raises: ValueError, naming the record; or if the zip's directory makes no sense.
    """
    try:
        records = list(_records(item))
    except (struct.error, OverflowError) as error:
        raise ValueError(f"its zip has a damaged directory: {error}") from error
    # torch finds names regardless of case
    if len({name.casefold() for name, *_ in records}) < len(records):
        raise ValueError("its zip has a record twice")
    end = 0
    for name, header, _, start, nbytes in sorted(records, key=itemgetter(1)):
        # two names for the same bytes: what was judged as one could be read as the other
        if header < end:
            raise ValueError(f"its record {name} overlaps another")
        end = start + nbytes
    first = next((name for name, header, *_ in records if header == 0), "")
    pickles = [name for name, *_ in records if name.casefold().endswith("/data.pkl")]
    # torch finds the pickle by the directory, `judge` by the first bytes: it must be the same one
    if pickle_start(bytes(item[:_FIRST_BYTES])) is not None and pickles != [first]:
        raise ValueError("its zip has another pickle than its first record")
    for name, _, crc, start, nbytes in records:
        if crcs and crc and zlib.crc32(item[start : start + nbytes]) != crc:
            raise ValueError(f"its record {name} does not match its CRC-32")


_FIRST_BYTES = LOCAL.size + 0xFFFF
"""A record's header with the longest name there is."""


def _records(item: memoryview) -> Iterator[tuple[str, int, int, int, int]]:
    """(name, its header, CRC-32, first byte, length) of each record."""
    position, count = _find_directory(item)
    for _ in range(count):
        fields = CENTRAL.unpack_from(item, position)
        magic, method, crc = fields[0], fields[4], fields[7]
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        name = bytes(item[position + CENTRAL.size :][:name_bytes]).decode(errors="replace")
        wide = _wide_values(bytes(item[position + CENTRAL.size + name_bytes :][:extra_bytes]))
        size, packed, header = (
            next(wide, -1) if value == LIMIT32 else value for value in (fields[9], fields[8], fields[16])
        )
        position += CENTRAL.size + name_bytes + extra_bytes + comment_bytes
        if magic != b"PK\1\2" or size < 0 or not 0 <= header < len(item):
            raise ValueError(f"its zip has a damaged directory, at record {name}")
        if method or size != packed:  # torch never deflates; what does may inflate to any length
            raise ValueError(f"its record {name} is compressed")
        local = LOCAL.unpack_from(item, header)
        start = header + LOCAL.size + local[9] + local[10]
        if local[0] != b"PK\3\4" or start + size > len(item):
            raise ValueError(f"its record {name} lies outside of it")
        yield name, header, crc, start, size


def _find_directory(item: memoryview) -> tuple[int, int]:
    """(offset of the central directory, number of entries); the end record may have a comment behind it."""
    before = max(len(item) - END.size - 0xFFFF, 0)
    # from behind: the bytes of a payload may look like an end record
    end_at = bytes(item[before:]).rfind(b"PK\5\6")
    if end_at < 0:
        raise ValueError("its zip has no end record, as if it was cut off")
    end_at += before
    *_, count, _, offset, _ = END.unpack_from(item, end_at)
    locator = end_at - LOCATOR64.size
    if locator >= 0 and bytes(item[locator : locator + 4]) == b"PK\6\7":  # stock's zips of any size have one
        end64 = LOCATOR64.unpack_from(item, locator)[2]
        *_, count, _, offset = END64.unpack_from(item, end64)
    return offset, count


def _wide_values(extra: bytes) -> Iterator[int]:
    """What a central entry's zip64 field holds: of full size, packed size and offset those that 32 bits do
    not."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            yield from struct.unpack_from(f"<{length // 8}Q", extra, 4)
        extra = extra[4 + length :]
