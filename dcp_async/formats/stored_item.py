"""One stored item that ``torch.load`` decodes: inflated, checked, and judged by its first bytes.

Enters: where an item lies and what `.metadata` says of it; then its bytes. Leaves: a tensor or an object.
Pure but for torch's decoding. Invariant: nothing is decoded that was not inflated within bounds, whose
records are not what was judged, or whose recorded checksums do not hold.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..trust import Trust, check_globals, is_zip, load_item
from .zip_item import check_records, pickle_start

_HEAD_BYTES = 1024
"""Holds the pickle of any plain tensor, which is about 200 bytes long and starts at byte 64."""
_PACKED_HEAD_BYTES = 192 << 10
"""The same where a compressor gives out nothing before its first block is whole; zstd's hold 128 KiB."""
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
    """Of torch's stream extensions that wrote it, the last one applied first."""
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
            at = pickle_start(raw)
            if is_zip(raw) and at is None:
                return False
            if len(head) == self.length and not self.descriptors and at is not None:
                check_records(memoryview(raw), crcs=False)
            check_globals(raw, at, self.trust)
        except ValueError:  # not whole, or damaged: decoding all of it will tell
            return False
        return True

    def decode(self, stored: bytearray) -> Any:
        """The tensor or object that its bytes hold.

        Raises: UntrustedGlobal; ValueError if it is damaged.
        """
        raw: bytes | bytearray = stored
        if self.descriptors:
            raw = self._inflated(stored, self.max_bytes, cut=False)
        if is_zip(raw):
            check_records(memoryview(raw), crcs=not self.has_digests)
        return load_item(io.BytesIO(raw), self.trust)

    def check_readable(self) -> None:
        """Raises UnsupportedError if an extension that wrote it is not there."""
        for descriptor in self.descriptors:
            registry = ExtensionRegistry()
            name = descriptor.partition("/")[0]
            if name not in registry.extensions:
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
        for extension in ExtensionRegistry().from_descriptor_list(self.descriptors):
            if isinstance(extension, StreamTransformExtension):
                stream = extension.transform_from(stream)
        found = bytearray()
        try:
            while len(found) <= limit and (part := stream.read(min(_INFLATE_BYTES, limit + 1 - len(found)))):
                found += part
        except MemoryError:
            raise
        except Exception as error:  # each compressor has its own
            if not cut:
                raise ValueError(f"it can't be inflated: {error}") from error
        if len(found) > limit and not cut:
            raise ValueError(f"it inflates to more than the {limit} bytes that it may have")
        return bytes(found)


def inflated_bound(meta: TensorStorageMetadata | None, sizes: Sequence[int], length: int) -> int:
    """How long an item of ``length`` stored bytes may become: as dtype and shape say, where there are any."""
    leaf = min(max(_LEAF_BYTES, _LEAF_RATIO * length), length + _LEAF_GROWTH)
    if meta is None or meta.properties.layout is not torch.strided:
        return leaf
    return torch.Size(sizes).numel() * meta.properties.dtype.itemsize + _FRAME_BYTES
