"""Where the records of a zip of ``torch.save``'s lie, by its directory, whether the zip is in memory or not.

Enters: the zip's length, then the bytes that are asked for. Leaves: Records. Invariant: nothing is believed
of a directory that points outside of the zip, or that says a record was compressed.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from .zip_item import CENTRAL, END, END64, LIMIT32, LOCAL, LOCATOR64

Wants: TypeAlias = "Generator[tuple[int, int], bytes, list[Record]]"
"""Yields (offset, length) of bytes that it wants, and is sent them; too few of them end with struct.error."""


@dataclass(frozen=True, slots=True)
class Record:
    """One of a zip's records: raw bytes [start, stop) of it."""

    name: str
    header: int
    """Where its local header begins."""
    crc: int
    """The CRC-32 of its bytes; 0 if the writer recorded none."""
    start: int
    stop: int

    @property
    def is_recorded(self) -> bool:
        """Whether its writer recorded a checksum of its bytes, if it has any."""
        return self.crc != 0 or self.start == self.stop

    def check(self, crc: int) -> None:
        """Raises ValueError if its bytes have another CRC-32 than was recorded."""
        if self.crc and crc != self.crc:
            raise ValueError(f"its record {self.name} does not match its CRC-32")


def records_in(item: memoryview) -> list[Record]:
    """The records of a whole zip. Raises ValueError if its directory makes no sense."""
    wants = find_records(len(item))
    try:
        wanted = next(wants)
        while True:
            offset, nbytes = wanted
            wanted = wants.send(bytes(item[offset : offset + nbytes]))
    except StopIteration as end:
        records: list[Record] = end.value
        return records


def find_records(length: int) -> Wants:
    """The records of a zip of ``length`` bytes, which the caller reads as they are asked for. Raises
    ValueError."""
    try:
        return (yield from _records(length))
    except (struct.error, OverflowError) as error:
        raise ValueError(f"its zip has a damaged directory: {error}") from error


def _records(length: int) -> Wants:
    directory_at, end_at, count = yield from _find_directory(length)
    directory = yield directory_at, end_at - directory_at
    records: list[Record] = []
    position = 0
    # a count that lies ends where the directory's bytes do, as a struct.error
    for _ in range(count):
        fields = CENTRAL.unpack_from(directory, position)
        magic, method, crc = fields[0], fields[4], fields[7]
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        name = directory[position + CENTRAL.size :][:name_bytes].decode(errors="replace")
        wide = _wide_values(directory[position + CENTRAL.size + name_bytes :][:extra_bytes])
        size, packed, header = (
            next(wide, -1) if value == LIMIT32 else value for value in (fields[9], fields[8], fields[16])
        )
        position += CENTRAL.size + name_bytes + extra_bytes + comment_bytes
        if magic != b"PK\1\2" or size < 0 or not 0 <= header < length:
            raise ValueError(f"its zip has a damaged directory, at record {name}")
        if method or size != packed:  # torch never deflates; what does may inflate to any length
            raise ValueError(f"its record {name} is compressed")
        local = LOCAL.unpack_from((yield header, LOCAL.size))
        start = header + LOCAL.size + local[9] + local[10]
        if local[0] != b"PK\3\4" or start + size > length:
            raise ValueError(f"its record {name} lies outside of it")
        records.append(Record(name, header, crc, start, start + size))
    return records


def _find_directory(length: int) -> Generator[tuple[int, int], bytes, tuple[int, int, int]]:
    """(where the central directory begins, where it ends at the latest, how many entries it has); the end
    record may have a comment behind it."""
    # a comment behind the end record has at most so many bytes
    before = max(length - END.size - 0xFFFF - LOCATOR64.size, 0)
    tail = yield before, length - before
    # from behind: the bytes of a payload may look like an end record
    end_at = tail.rfind(b"PK\5\6")
    if end_at < 0:
        raise ValueError("its zip has no end record, as if it was cut off")
    *_, count, _, offset, _ = END.unpack_from(tail, end_at)
    locator = end_at - LOCATOR64.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":  # stock's zips of any size have one
        end64 = LOCATOR64.unpack_from(tail, locator)[2]
        *_, count, _, offset = END64.unpack_from((yield end64, END64.size))
    return offset, max(before + end_at, offset), count


def _wide_values(extra: bytes) -> Iterator[int]:
    """What a central entry's zip64 field holds: of full size, packed size and offset those that 32 bits do
    not."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            yield from struct.unpack_from(f"<{length // 8}Q", extra, 4)
        extra = extra[4 + length :]
