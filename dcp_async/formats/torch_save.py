"""A file as ``torch.save`` writes it, laid out to the byte before a tensor's bytes are there.

Enters: an object with a StandIn for each tensor whose bytes come later. Leaves: where each storage lies, and
the bytes around them. Pure. Invariant: the file is what ``torch.load(weights_only=True)`` and zip tools read,
every record's CRC-32 recorded.
Source: torch/serialization.py, ``_save``; caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from .zip_item import STORAGE_CLASS, central_entry, local_header, zip_directory

_PREFIX = b"archive/"
_ALIGN = 64
"""What torch aligns records to, for those who map the file into memory."""


@dataclass(frozen=True, slots=True)
class StandIn:
    """A tensor whose bytes come later: it fills a storage of its own, which those of one ``key`` share."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Up to its last element: its storage may have gaps, or elements that it shows several times."""
        if 0 in self.shape:
            return 0
        last = sum((extent - 1) * step for extent, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize


class _Storage:
    def __init__(self, like: StandIn) -> None:
        self.like = like


class _Pickler(pickle.Pickler):
    """Refers to storages as torch does; keeps those of tensors that are there."""

    def __init__(self, file: io.BytesIO, stand_in: Callable[[torch.Tensor], StandIn | None]) -> None:
        # torch's own: weights_only warns of any other, and knows no opcodes of later ones
        super().__init__(file, protocol=2)
        self._stand_in = stand_in
        self.records: dict[str, int] = {}
        self.held: dict[str, torch.UntypedStorage] = {}
        self._names: dict[object, str] = {}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = self._stand_in(value)
        if type(value) is not StandIn:
            return NotImplemented
        utils: Any = torch._utils  # untyped
        hooks: OrderedDict[str, Any] = OrderedDict()
        args = (_Storage(value), 0, value.shape, value.strides, False, hooks)
        # v2 tells the dtype by the class of the storage, and torch has made none for later dtypes
        if value.dtype in STORAGE_CLASS:
            return utils._rebuild_tensor_v2, args
        return utils._rebuild_tensor_v3, (*args, value.dtype)

    def persistent_id(self, value: Any) -> Any:
        if type(value) is _Storage:
            like = value.like
            typed = STORAGE_CLASS.get(like.dtype)
            kind = getattr(torch, typed) if typed else torch.UntypedStorage
            numel = like.nbytes // like.dtype.itemsize if typed else like.nbytes
            return "storage", kind, self._record(("stand-in", like.key), like.nbytes), "cpu", numel
        if isinstance(value, torch.storage.TypedStorage):
            value = cast(Any, value)  # untyped where it counts
            memory, kind = value._untyped_storage, getattr(torch, value._pickle_storage_type())
            numel = memory.nbytes() // value.dtype.itemsize
        elif isinstance(value, torch.UntypedStorage):
            memory, kind, numel = value, torch.UntypedStorage, value.nbytes()
        else:
            return None
        # by address: each tensor is pickled with a new TypedStorage, those that share one too
        name = self._record(("held", memory._cdata), memory.nbytes())
        # kept, or another storage could get that address before the pickle is complete
        self.held[name] = memory
        return "storage", kind, name, "cpu", numel

    def _record(self, key: object, nbytes: int) -> str:
        name = self._names.setdefault(key, str(len(self._names)))
        self.records[name] = nbytes
        return name

    def name_of(self, key: str) -> str:
        return self._names["stand-in", key]


class Archive:
    """One file: put the bytes of each storage at its ``payload``, its header by ``head``, then ``tail``."""

    def __init__(
        self, value: Any, *, stand_in: Callable[[torch.Tensor], StandIn | None] = lambda tensor: None
    ) -> None:
        """
        Args:
            value: what the file holds.
            stand_in: what is written in place of a tensor in it; None for the tensor itself.
        Raises: what pickling ``value`` raises.
        """
        pickled = io.BytesIO()
        self._pickler = _Pickler(pickled, stand_in)
        self._pickler.dump(value)
        self._offsets: dict[str, int] = {}
        self._payloads: dict[str, int] = {}
        self._crcs: dict[str, int] = {}
        self.small: list[tuple[str, bytes]] = [
            ("data.pkl", pickled.getvalue()),
            (".format_version", b"1"),
            (".storage_alignment", b"64"),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ]
        """Records whose bytes are known, by name."""
        self._sizes = {record: len(content) for record, content in self.small}
        self._sizes |= {f"data/{key}": nbytes for key, nbytes in self._pickler.records.items()}
        end = 0
        for record, nbytes in self._sizes.items():
            self._offsets[record] = end
            self._payloads[record] = end + len(self._header(record))
            end = self._payloads[record] + nbytes
        self._end = end
        for record, content in self.small:
            self._crcs[record] = zlib.crc32(content)

    def _header(self, record: str) -> bytes:
        name, nbytes = _PREFIX + record.encode(), self._sizes[record]
        bare = self._offsets[record] + len(local_header(name, nbytes)) + 4
        filler = -bare % _ALIGN
        # a field of its own, as torch has it
        field = struct.pack("<2sH", b"FB", filler) + b"Z" * filler
        # before the payload is read its CRC is unknown: the header has the same length with any
        return local_header(name, nbytes, crc=self._crcs.get(record, 0), filler=field)

    @property
    def held(self) -> dict[str, torch.UntypedStorage]:
        """Record -> storage of each tensor that was there."""
        return {f"data/{key}": storage for key, storage in self._pickler.held.items()}

    def record_of(self, key: str) -> str:
        """The record that the stand-ins of ``key`` share."""
        return f"data/{self._pickler.name_of(key)}"

    def payload(self, record: str) -> int:
        """Where its bytes begin."""
        return self._payloads[record]

    def head(self, record: str, crc: int) -> tuple[int, bytes]:
        """(offset, bytes) of what stands before a record, whose bytes have this CRC-32."""
        self._crcs[record] = crc
        return self._offsets[record], self._header(record)

    def tail(self) -> tuple[int, bytes]:
        """(offset, bytes) of what ends the file, once ``head`` was asked for each record."""
        entries = [
            central_entry(_PREFIX + record.encode(), nbytes, self._offsets[record], crc=self._crcs[record])
            for record, nbytes in self._sizes.items()
        ]
        return self._end, zip_directory(entries, self._end)
