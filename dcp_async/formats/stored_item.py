"""One stored item as ``torch.load`` reads it: inflated, its zip checked, and judged by its first bytes.

Enters: where an item lies and what `.metadata` says of it; then its bytes. Leaves: a tensor or an object.
Pure but for torch's decoding. Invariant: nothing is decoded that was not inflated within bounds, whose
records are not what was judged, or whose recorded checksums do not hold.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..trust import Trust, check_globals, is_zip, load_item
from .zip_item import LOCAL
from .zip_records import Record, records_in

try:  # private, and only asked for by items that an extension wrote
    from torch.distributed.checkpoint import _extension
except ImportError:
    _extension = None  # type: ignore[assignment]

_HEAD_BYTES = 1024
"""Holds the pickle of any plain tensor, which is about 200 bytes long and starts at byte 64."""
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""A pickle of the number that begins each file of torch.save's before 1.6."""
RECORD_HEAD_BYTES = LOCAL.size + 0xFFFF
"""A record's header with the longest name there is."""
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
    records = records_in(item)
    check_names(records, bytes(item[:RECORD_HEAD_BYTES]))
    if crcs:
        _check_crcs(item, records)


def check_item(item: memoryview) -> bool:
    """Whether checksums of all its bytes were recorded in an item that was not inflated; they hold.

    Raises: ValueError if they do not, or if it is no item of torch's.
    """
    head = bytes(item[:_HEAD_BYTES])
    if not is_zip(head):
        if not head.startswith(_LEGACY_MAGIC):  # what torch.save wrote before 1.6, without any checksum
            raise ValueError("it is not what torch.save writes")
        return False
    records = records_in(item)
    check_names(records, bytes(item[:RECORD_HEAD_BYTES]))
    _check_crcs(item, records)
    return all(record.is_recorded for record in records)


def _check_crcs(item: memoryview, records: Sequence[Record]) -> None:
    for record in records:
        if record.crc:
            record.check(zlib.crc32(item[record.start : record.stop]))


def check_names(records: Sequence[Record], head: bytes) -> None:
    """Whether every reader understands ``records`` alike, of a zip whose first bytes are ``head``. Raises
    ValueError."""
    # torch finds names regardless of case
    if len({record.name.casefold() for record in records}) < len(records):
        raise ValueError("its zip has a record twice")
    end = 0
    for record in sorted(records, key=attrgetter("header")):
        # two names for the same bytes: what was judged as one could be read as the other
        if record.header < end:
            raise ValueError(f"its record {record.name} overlaps another")
        end = record.stop
    first = next((record.name for record in records if record.header == 0), "")
    pickles = [record.name for record in records if record.name.casefold().endswith("/data.pkl")]
    # torch finds the pickle by the directory, `judge` by the first bytes: it must be the same one
    if pickle_start(head) is not None and pickles != [first]:
        raise ValueError("its zip has another pickle than its first record")
