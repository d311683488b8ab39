"""Where pickle and storages of a ``torch.save`` file lie, a zip or in the format that torch had before 1.6.

Enters: the file's length, then the bytes that are asked for. Leaves: ArchiveRecords, or an error that says
what the file is instead. Pure. Invariant: nothing is unpickled but numbers and texts around the object.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from ..trust import COUNT_BYTES, UntrustedGlobal, check_count, is_legacy, is_zip, legacy_outline
from .stored_item import RECORD_HEAD_BYTES, check_names
from .zip_records import Record, find_records

_PICKLE_BYTES = 256 << 20
"""No object's pickle is longer, whose storages lie behind it."""
_GROWTH = 4


class ContentError(ValueError):
    """A file that is whole, but can't be taken for a checkpoint; the message says what to do."""


@dataclass(frozen=True, slots=True)
class ArchiveRecords:
    """The records of a ``torch.save`` file that mean something."""

    pickle: Record
    byteorder: Record | None
    _storages: Mapping[str, Record]

    @classmethod
    def of_zip(cls, records: Sequence[Record], head: bytes) -> ArchiveRecords:
        """Those among ``records``, of a zip that begins with ``head``. Raises ValueError if they are no such
        file's; UntrustedGlobal for a program."""
        check_names(records, head)
        by_name = {record.name: record for record in records}
        pickles = [name for name in by_name if name.endswith("/data.pkl")]
        # which of two is read depends on the reader
        if len(pickles) != 1:
            raise ValueError("its zip has no data.pkl, or several")
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in by_name or any(name.startswith(f"{prefix}code/") for name in by_name):
            # its code would be compiled and run, and no look at a pickle tells what it does
            raise UntrustedGlobal("a TorchScript archive")
        data = f"{prefix}data/"
        storages = {name.removeprefix(data): by_name[name] for name in by_name if name.startswith(data)}
        return cls(by_name[pickles[0]], by_name.get(f"{prefix}byteorder"), storages)

    def storage(self, key: str, nbytes: int) -> Record:
        """The record of the storage that the pickle calls ``key`` and says to be ``nbytes`` long. Raises
        ValueError."""
        # torch would give out what memory held before, for a record that is shorter
        record = self._storages.get(key)
        if record is None or record.stop - record.start != nbytes:
            raise ValueError(f"its record of the storage {key!r} has another length than its pickle says")
        return record

    def recorded(self) -> list[Record]:
        """All whose writer recorded a checksum of their bytes."""
        known = [self.pickle, *self._storages.values()]
        return [record for record in known if record.is_recorded and record.start < record.stop]

    def check_byteorder(self, said: bytes) -> None:
        """``said``: the bytes of ``byteorder``. Raises ContentError for those of another machine's kind."""
        if said != sys.byteorder.encode():
            raise ContentError("it was written on a machine of the other byte order; torch.load reads it")


def find_archive(length: int) -> Generator[tuple[int, int], bytes, ArchiveRecords]:
    """The records of a file of ``length`` bytes, which the caller reads as they are asked for, as for
    ``find_records``. Raises: ValueError; UntrustedGlobal."""
    head = yield 0, min(length, RECORD_HEAD_BYTES)
    if is_zip(head):
        return ArchiveRecords.of_zip((yield from find_records(length)), head)
    if not is_legacy(head):
        raise ValueError("it is neither a zip nor in torch's older format")
    return (yield from _legacy_records(length, head))


def _legacy_records(length: int, head: bytes) -> Generator[tuple[int, int], bytes, ArchiveRecords]:
    # nothing says how long the pickles are that stand before the storages
    most = min(length, _PICKLE_BYTES)
    while True:
        try:
            outline = legacy_outline(head)
            break
        except ValueError:
            if len(head) >= most:
                raise
        head = yield 0, min(len(head) * _GROWTH, most)
    position = outline.data
    storages: dict[str, Record] = {}
    for storage in outline.storages:
        start = position + COUNT_BYTES
        check_count((yield position, COUNT_BYTES), storage)
        storages[storage.key] = Record(storage.key, position, 0, start, start + storage.nbytes)
        position = start + storage.nbytes
    if position > length:
        raise ValueError("it is shorter than its storages")
    pickled = Record("pickle", outline.pickled.start, 0, outline.pickled.start, outline.pickled.stop)
    return ArchiveRecords(pickled, None, storages)


def records_of_archive(whole: memoryview) -> ArchiveRecords:
    """The records of a file that is in memory. Raises: as ``find_archive``; ContentError for bytes in another
    order than this machine's."""
    wants = find_archive(len(whole))
    try:
        offset, nbytes = next(wants)
        while True:
            offset, nbytes = wants.send(bytes(whole[offset : offset + nbytes]))
    except StopIteration as end:
        records: ArchiveRecords = end.value
    if (order := records.byteorder) is not None:
        records.check_byteorder(bytes(whole[order.start : min(order.stop, order.start + 16)]))
    return records
