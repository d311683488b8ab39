"""What a format of data files is: the protocol that planning and staging write by.

Enters: dtypes and shapes of tensors, lengths of leaves' items. Leaves: a FileLayout, complete to the byte
before a byte moves; items grown to their rooms; what the checkpoint's index says. Invariant: all of it is a
pure function of what enters, so the same structure gives the same offsets on every save.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .metadata_writer import Group, MetadataTemplate


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """Where everything of one file image lies, in bytes from its start.

    Item ``i`` is tensor ``i`` for ``i < num_tensors``, then come the leaves, each in its room.
    Plain lists of numbers, not objects per item: a garbage collection over tens of thousands of objects stops
    the trainer.
    """

    item_offsets: list[int]
    """Start of each item, ascending."""
    item_bytes: list[int]
    """Length of each item as ``.metadata`` names it (without the gap before it)."""
    payload_offsets: list[int]
    """Start of each tensor's raw bytes, ascending."""
    payload_bytes: list[int]
    """Length of each tensor's raw bytes."""
    frames: list[tuple[bytes, bytes]]
    """Head and tail of each tensor item; items of one dtype and shape share them."""
    image_bytes: int
    """Length of the image, a multiple of what direct I/O is aligned to."""
    file_bytes: int
    """Length of the file, with what stands behind the image."""

    @property
    def num_tensors(self) -> int:
        return len(self.payload_offsets)

    def rooms(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of each leaf's room."""
        first = self.num_tensors
        return zip(self.item_offsets[first:], self.item_bytes[first:], strict=True)

    def tensors_between(self, start: int, stop: int) -> range:
        """The tensors whose payload overlaps the image's bytes [start, stop)."""
        first = max(bisect_right(self.payload_offsets, start) - 1, 0)
        last = bisect_right(self.payload_offsets, stop - 1)
        # what begins before `start` may end before it too: a tail or a gap lies there
        while first < last and self.payload_offsets[first] + self.payload_bytes[first] <= start:
            first += 1
        return range(first, last)

    def fill_constants(self, buffer: memoryview, start: int) -> None:
        """Write gaps, heads and tails that fall into the image's bytes [start, start + len(buffer)).

        Payload and rooms are left alone; everything else is written, so no byte of an earlier save stays
        behind.
        """
        stop = start + len(buffer)

        def put(offset: int, blob: bytes) -> None:
            # clipped: a part may begin or end within a head
            low, high = max(offset, start), min(offset + len(blob), stop)
            if low < high:
                buffer[low - start : high - start] = blob[low - offset : high - offset]

        # from the last one that begins before: its tail may reach in here
        item = max(bisect_right(self.item_offsets, start) - 1, 0)
        end = self.item_offsets[item - 1] + self.item_bytes[item - 1] if item else 0
        for index in range(item, len(self.item_offsets)):
            offset = self.item_offsets[index]
            put(end, bytes(offset - end))
            if offset >= stop:
                return
            if index < self.num_tensors:
                head, tail = self.frames[index]
                put(offset, head)
                put(self.payload_offsets[index] + self.payload_bytes[index], tail)
            end = offset + self.item_bytes[index]
        # to the end of the image: slots are leased again, and hold what an earlier save wrote
        put(end, bytes(self.image_bytes - end))


class Format(Protocol):
    """How tensors and leaves lie in a rank's data file, and how the checkpoint says where.

    Not behind it: footers with checksums, which save and load handle for every file, and how items are read.
    """

    def room(self, item_bytes: int) -> int:
        """How long the part of the file is that a leaf's item of ``item_bytes`` gets: what grows a little
        must not move every offset behind it."""

    def padded(self, item: bytes, room: int) -> bytes:
        """``item`` grown to exactly ``room`` bytes, readable as before. Raises ValueError if it is longer."""

    def layout(
        self, tensors: Sequence[tuple[torch.dtype, tuple[int, ...]]], rooms: Sequence[int]
    ) -> FileLayout:
        """Where ``tensors`` (dtype and chunk shape, row-major) lie and, behind them, leaves in ``rooms``."""

    def index(
        self,
        groups: Sequence[Group],
        paths: Mapping[str, Sequence[str | int]],
        *,
        planner_data: object = None,
    ) -> MetadataTemplate:
        """What all readers are told of the names in ``groups``, each of which has one of ``paths``; a planner
        may have ``planner_data`` of its own in place of those."""
