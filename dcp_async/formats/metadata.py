"""`.metadata`: DCP's pickle of stock classes, encoded once per plan and reused with another uid in its file
names.

Enters: DCP's Metadata and where each item lies. Leaves: bytes that stock reads. Invariant: nothing but the
uid changes from save to save until the layout does.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

_V = TypeVar("_V")

UID_DIGITS = 16
_PLACEHOLDER = "\x01uid-goes-here\x02\x03"
assert len(_PLACEHOLDER) == UID_DIGITS


def data_file_name(rank: int, number: int, uid: str) -> str:
    """The name of a rank's ``number``-th data file."""
    return f"__{rank}_{number}-{uid}.distcp"


@dataclass(frozen=True, slots=True)
class MetadataTemplate:
    """The pickle of a Metadata, cut at each place where the uid goes."""

    pieces: tuple[bytes, ...]

    def render(self, uid: str) -> bytes:
        """The bytes of `.metadata` for one save."""
        assert len(uid) == UID_DIGITS
        return uid.encode().join(self.pieces)


Item = tuple[str, torch.Size | None, int | None, int, int, int]
"""(name, offsets, number among the tensor's chunks, rank, offset in its file, length); no offsets and number
for what is no tensor."""


def metadata_template(metadata: Metadata, items: Iterable[Item], *, file_number: int = 0) -> MetadataTemplate:
    """Encode ``metadata`` with the places of ``items``, those of one name in a row.

    ``storage_data`` is written opcode by opcode: its two objects and two dicts per item, which for many ranks
    took most of the time and the memory, are never made. Each file's name, and with it the uid, is stored
    once.
    """
    encoder = _Encoder()
    state = dict(vars(metadata), storage_meta=None, version=CURRENT_DCP_VERSION)
    state.pop("storage_data")
    out = io.BytesIO()
    out.write(pickle.PROTO + bytes([_PROTOCOL]))
    out.write(encoder(Metadata) + pickle.EMPTY_TUPLE + pickle.NEWOBJ)
    out.write(encoder(state) + encoder("storage_data") + pickle.EMPTY_DICT)
    # once in full, so that they are a few bytes each from here on
    for constant in (MetadataIndex, _StorageInfo, "fqn", "offset", "index", "relative_path", "length"):
        out.write(encoder(constant) + pickle.POP)
    new = pickle.EMPTY_TUPLE + pickle.NEWOBJ + pickle.EMPTY_DICT + pickle.MARK
    built = pickle.SETITEMS + pickle.BUILD
    index_start = encoder(MetadataIndex) + new + encoder("fqn")
    info_start = built + encoder(_StorageInfo) + new + encoder("relative_path")
    at, number_at, length_at = encoder("offset"), encoder("index"), encoder("length")
    values: _References[torch.Size | int | None] = _References(encoder)
    files: _References[str] = _References(encoder)
    names = _FileNames(file_number)
    for name, group in groupby(items, itemgetter(0)):
        named, again = encoder(name), encoder(name)
        out.write(pickle.MARK)
        for _, offsets, number, rank, offset, length in group:
            # fmt: off
            out.write(b"".join((
                index_start, named, at, values[offsets], number_at, values[number],
                info_start, files[names[rank]], at, values[offset], length_at, values[length], built,
            )))
            # fmt: on
            named = again
        out.write(pickle.SETITEMS)
    out.write(pickle.SETITEM + pickle.BUILD + pickle.STOP)
    return MetadataTemplate(tuple(out.getvalue().split(_PLACEHOLDER.encode())))


_PROTOCOL = 3
"""The newest without frames, which could not be taken apart."""
_LONG_BYTES = 1 << 16


class _Encoder:
    """The opcodes that push a value, in full for the first time, and as a reference from then on, if pickle
    remembers values of its type. To be written in the order in which they were made."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        self._pickler = pickle.Pickler(self._file, _PROTOCOL)

    def __call__(self, value: object) -> bytes:
        self._file.seek(0)
        self._file.truncate()
        self._pickler.dump(value)
        raw = self._file.getvalue()[2:-1]  # without PROTO and STOP
        if len(raw) > _LONG_BYTES:
            # a pickler begins each dump with a buffer as long as its longest yet
            memo = self._pickler.memo
            self._pickler = pickle.Pickler(self._file, _PROTOCOL)
            self._pickler.memo = memo
        return raw


class _References(dict[_V, bytes]):
    """Value -> its opcodes, of equal values those of the first."""

    def __init__(self, encoder: _Encoder) -> None:
        super().__init__()
        self._encoder = encoder

    def __missing__(self, value: _V) -> bytes:
        first = self._encoder(value)
        self[value] = self._encoder(value)
        return first


class _FileNames(dict[int, str]):
    """Rank -> its file's name, one object per file."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def __missing__(self, rank: int) -> str:
        name = self[rank] = data_file_name(rank, self._number, _PLACEHOLDER)
        return name
