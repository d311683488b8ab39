"""What a zip must hold to be a file of ``torch.save``: which record is its pickle, which are its storages.

Enters: a zip's first bytes and its records. Leaves: ArchiveRecords, or an error that says what the file is
instead. Pure.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..trust import UntrustedGlobal, is_legacy, is_zip
from .stored_item import check_names
from .zip_records import Record


class ContentError(ValueError):
    """A file that is whole, but can't be taken for a checkpoint; the message says what to do."""


def check_archive_head(head: bytes) -> None:
    """Whether a file that begins with ``head`` is a zip. Raises ValueError; ContentError for torch's older
    format."""
    if is_legacy(head):
        raise ContentError(
            "it has the format of torch before 1.6, whose tensors can't be found without reading all of it; "
            "rewrite it with torch.save(torch.load(path), path)"
        )
    if not is_zip(head):
        raise ValueError("it is no zip")


@dataclass(frozen=True, slots=True)
class ArchiveRecords:
    """The records of a ``torch.save`` file that mean something."""

    pickle: Record
    byteorder: Record | None
    _storages: Mapping[str, Record]

    @classmethod
    def of(cls, records: Sequence[Record], head: bytes) -> ArchiveRecords:
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

    def check_byteorder(self, said: bytes) -> None:
        """``said``: the bytes of ``byteorder``. Raises ContentError for those of another machine's kind."""
        if said != sys.byteorder.encode():
            raise ContentError("it was written on a machine of the other byte order; torch.load reads it")
