"""What a format of data files is: the protocol that planning and staging write by.

Enters: dtypes and shapes of tensors, lengths of leaves' items. Leaves: a FileLayout, complete to the byte
before a byte moves; items grown to their rooms; what the checkpoint's index says. Invariant: all of it is a
pure function of what enters, so the same structure gives the same offsets on every save.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .metadata_writer import Group, MetadataTemplate

LOOSE = -1
"""The number of a rank's file of loose bytes, which are put where they belong once all ranks have written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicTensor:
    """A whole tensor, whichever ranks hold pieces of it."""

    names: Sequence[str]
    """All that it is saved under, its own first."""
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicFiles:
    """Files of a checkpoint that others read and all ranks write: there is nothing of ours in them."""

    names: list[str]
    lengths: list[int]
    heads: list[bytes]
    """What each begins with."""
    places: dict[int, tuple[int, int]]
    """Number of a tensor -> (file, where its bytes begin). Those of one file lie without a gap to its end;
    tensors that have no place go to the ranks' own files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Stretches of an image that belong to other files than the rank's own, ascending. Plain lists."""

    starts: list[int]
    stops: list[int]
    files: list[int]
    """Numbers of public files, or LOOSE."""
    offsets: list[int]
    """Where in that file; in a public one at a block's start, which is one in the image, too."""

    def add(self, start: int, stop: int, file: int, offset: int) -> None:
        """Append one; nothing if it is empty."""
        if start < stop:
            self.starts.append(start)
            self.stops.append(stop)
            self.files.append(file)
            self.offsets.append(offset)

    def add_loose(self, start: int, stop: int, gap_bytes: int) -> None:
        """Append one of loose bytes, which lie in their file where they lie in the image: so what is less
        than ``gap_bytes`` behind the one before becomes part of that."""
        # whole sectors are written, and no two calls may write one
        if self.files and self.files[-1] == LOOSE and start - self.stops[-1] < gap_bytes:
            self.stops[-1] = max(stop, self.stops[-1])
        else:
            self.add(start, stop, LOOSE, start)

    def between(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(start, stop, file, offset) of what lies in the image's bytes [start, stop)."""
        # asked for each part of each save, so not by a look at every run
        index = bisect_right(self.stops, start)
        while index < len(self.starts) and self.starts[index] < stop:
            low, high = max(self.starts[index], start), min(self.stops[index], stop)
            yield low, high, self.files[index], self.offsets[index] + low - self.starts[index]
            index += 1

    @property
    def loose_end(self) -> int:
        """Where the last loose byte ends; 0 if there is none."""
        stops = zip(self.stops, self.files, strict=True)
        return max((stop for stop, file in stops if file == LOOSE), default=0)


def no_runs() -> Runs:
    """All of an image belongs to the rank's own file."""
    return Runs(starts=[], stops=[], files=[], offsets=[])


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """Where everything of one rank's image lies, in bytes from its start, and in which file.

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
    own_start: int = 0
    """Where the rank's own file begins; what lies before goes where ``runs`` say, or nowhere."""
    runs: Runs = field(default_factory=no_runs)
    public: tuple[tuple[str, int], ...] = ()
    """(public name, length) of the files that all ranks write together."""
    constants: tuple[tuple[int, bytes], ...] = ()
    """(offset, bytes) that belong to no item, ascending."""
    order: list[int] | None = None
    """Tensor ``i`` is the one that was given as number ``order[i]``; None if they lie as they were given."""

    @property
    def own_bytes(self) -> int:
        """How much of the image lies in the rank's own file; it has none if this is 0."""
        return self.image_bytes - self.own_start

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
        """Write what of the image's bytes [start, start + len(buffer)) is known from the layout alone.

        Payload and rooms are left alone; everything else is written, so no byte of an earlier save stays
        behind.
        """
        stop = start + len(buffer)

        def put(offset: int, blob: bytes) -> None:
            # clipped: a part may begin or end within a head
            low, high = max(offset, start), min(offset + len(blob), stop)
            if low < high:
                buffer[low - start : high - start] = blob[low - offset : high - offset]

        self._fill_between(put, start, stop)
        # last: to items they are gaps
        for offset, blob in self.constants:
            put(offset, blob)

    def _fill_between(self, put: Callable[[int, bytes], None], start: int, stop: int) -> None:
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
    """How tensors and leaves lie in a rank's data files, and how the checkpoint says where.

    Not behind it: checksums, which save and load handle for every file, and how items are read.
    """

    shares_files: bool
    """Whether ranks that save together write files in common, for which not every storage is made."""

    def room(self, item_bytes: int) -> int:
        """How long the part of the file is that a leaf's item of ``item_bytes`` gets: what grows a little
        must not move every offset behind it."""

    def padded(self, item: bytes, room: int) -> bytes:
        """``item`` grown to exactly ``room`` bytes, readable as before. Raises ValueError if it is longer."""

    def layout(
        self,
        tensors: Sequence[tuple[torch.dtype, tuple[int, ...]]],
        rooms: Sequence[int],
    ) -> FileLayout:
        """Where ``tensors`` (dtype and chunk shape, row-major) lie in a rank's own file and, behind them,
        leaves in ``rooms``."""

    def public_files(self, tensors: Sequence[PublicTensor]) -> PublicFiles | None:
        """The files that others read, given all whole tensors of a state; None if there are none. How the
        tensors are cut among ranks, and in which order they come, changes nothing of them."""

    def index(
        self,
        groups: Sequence[Group],
        paths: Mapping[str, Sequence[str | int]],
        *,
        planner_data: object = None,
    ) -> MetadataTemplate:
        """What all readers are told of the names in ``groups``, each of which has one of ``paths``; a planner
        may have ``planner_data`` of its own in place of those."""
