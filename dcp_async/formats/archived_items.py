"""The object of a ``torch.save`` file as items of a checkpoint: where the bytes of each tensor lie, and what
else has to be made up so that every value is an item.

Enters: the object, made before its bytes were read, and the places of its storages. Leaves: names, places,
the tree; a MadeFile for what the file holds in no form that an item has. Pure. Invariant: a row-major
tensor's item is its bytes in the file; any other item is a zip around ranges of the file.
"""

from __future__ import annotations

import ctypes
import pickle
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from .._geometry import is_dense
from .archive_records import ContentError
from .stock_compat import ItemKey
from .torch_save import Archive, StandIn
from .tree import Tree, child_name, list_node, mapping_kind, mapping_node
from .zip_item import PLAIN_DTYPES, object_item
from .zip_records import Record

_PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_SCALARS = frozenset({bool, int, float, str, bytes, type(None)})

Piece: TypeAlias = "bytes | tuple[int, int]"
"""Bytes, or [start, stop) of the file."""


class MadeFile:
    """Items one behind the other, made of bytes and of ranges of another file."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._pieces: list[Piece] = []
        self.nbytes = 0

    def add(self, pieces: Sequence[Piece]) -> tuple[int, int]:
        """Where an item of ``pieces`` lies: (offset, length)."""
        start = self.nbytes
        for piece in pieces:
            self._starts.append(self.nbytes)
            self._pieces.append(piece)
            self.nbytes += len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]
        return start, self.nbytes - start

    def between(self, start: int, stop: int) -> Iterator[tuple[int, Piece]]:
        """What bytes [start, stop) are made of, each with its offset from ``start``."""
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            piece, skipped = self._pieces[index], start - self._starts[index]
            # an item asks for any part of itself: its head is judged before the rest is read
            whole = len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]
            nbytes = min(whole - skipped, stop - start)
            if nbytes > 0:
                first = skipped if isinstance(piece, bytes) else piece[0] + skipped
                yield (
                    start,
                    piece[first : first + nbytes] if isinstance(piece, bytes) else (first, first + nbytes),
                )
            start += nbytes
            index += 1


class ArchivedItems:
    """What an object holds, item by item; made at once."""

    def __init__(self, value: object, storages: Mapping[int, tuple[str, Record]], file: str) -> None:
        """
        Args:
            storages: key and record of each storage of ``value``, by where torch has it.
            file: the name of the file that the records lie in.
        Raises: ContentError; ValueError for what refers to itself.
        """
        self._storages = storages
        self._file = file
        self._terminal: dict[int, bool] = {}
        self._known: dict[object, tuple[str, int, int]] = {}
        """Items of tensors that are not row-major, so that ties stay ties."""
        self.made = MadeFile()
        self.made_name = f"{file}/items"
        """No file in a directory is called so."""
        self.metas: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self.locations: dict[ItemKey, tuple[str, int, int]] = {}
        """Item -> (file, offset, length)."""
        self.paths: dict[str, tuple[str | int, ...]] = {}
        self.strides: dict[str, tuple[int, ...]] = {}
        self.exotic: set[str] = set()
        self.wanted: set[str] = set()
        """Storages whose bytes are needed to make items."""
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise ContentError(
                f"it holds a {kind}, not a dict of names; torch.load(path, mmap=True) reads it"
            )
        try:
            self.tree = self._mapping(None, (), value)
        except RecursionError:
            raise ValueError("its containers lie in one another without end, or nearly") from None

    def _visit(self, name: str, path: tuple[str | int, ...], value: Any) -> Tree:
        if isinstance(value, dict):
            return self._mapping(name, path, value)
        if isinstance(value, list) and not self._is_terminal(value):
            return list_node(
                [self._visit(f"{name}.{index}", (*path, index), entry) for index, entry in enumerate(value)]
            )
        if name in self.metas:
            raise ContentError(f"two of its entries are named {name!r}; torch.load(mmap=True) reads it")
        self.paths[name] = path
        if isinstance(value, torch.Tensor) and self._tensor(name, value):
            return None
        self.metas[name] = BytesStorageMetadata()
        self.locations[name, None] = self._item(name, value)
        return None

    def _mapping(self, name: str | None, path: tuple[str | int, ...], mapping: dict[Any, Any]) -> Tree:
        # names are made as a save makes them, so that a state finds its own
        entries = []
        for key, value in mapping.items():
            if name is None and not isinstance(key, str):
                raise ContentError(
                    f"its keys must be str, {key!r} is a {type(key).__name__}; torch.load(path, mmap=True) "
                    "reads it"
                )
            below = child_name(name, key)
            entries.append((key, self._visit(below, (*path, str(key)), value)))
        return mapping_node(mapping_kind(mapping), entries)

    def _is_terminal(self, values: list[Any]) -> bool:
        """Whether a list is one leaf, as DCP has it: no tensor and no mapping is in it."""
        if (known := self._terminal.get(id(values))) is None:
            known = self._terminal[id(values)] = not any(
                isinstance(entry, (torch.Tensor, dict))
                or (isinstance(entry, list) and not self._is_terminal(entry))
                for entry in values
            )
        return known

    def _tensor(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether it has become an item of a tensor's."""
        try:
            size, layout = torch.Size(tensor.size()), tensor.layout
        except RuntimeError:  # a nested one has no size
            return False
        offsets = torch.Size((0,) * len(size))
        stand_in = self._stand_in(tensor)
        if stand_in is None:
            location = self._item(name, tensor)
            self.exotic.add(name)
        # its bytes are in the file as an item's are, and are read by ranges
        elif tensor.is_contiguous():
            location = (self._file, self._start(tensor), tensor.nbytes)
        else:
            known = (stand_in.key, size, stand_in.strides)
            if known not in self._known:
                self._known[known] = self._item(name, tensor)
            location = self._known[known]
            # an empty tensor with gaps could not be filled as one piece of memory
            if is_dense(size, stand_in.strides):
                self.strides[name] = stand_in.strides
            else:
                self.exotic.add(name)
        self.metas[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=tensor.dtype, layout=layout),
            size=size,
            chunks=[ChunkStorageMetadata(offsets=offsets, sizes=size)],
        )
        self.locations[name, offsets] = location
        return True

    def _stored(self, tensor: torch.Tensor) -> tuple[str, Record] | None:
        """Key and record of the storage of a tensor that is plain bytes of the file."""
        if tensor.layout is not torch.strided or tensor.is_nested or type(tensor) not in _PLAIN_CLASSES:
            return None
        return self._storages.get(tensor.untyped_storage()._cdata)

    def _start(self, tensor: torch.Tensor) -> int:
        stored = self._stored(tensor)
        assert stored is not None
        return stored[1].start + int(tensor.storage_offset()) * tensor.dtype.itemsize

    def _stand_in(self, tensor: torch.Tensor) -> StandIn | None:
        """What is written in place of a tensor whose bytes the file has; None for one that has its own."""
        if (stored := self._stored(tensor)) is None:
            return None
        key, record = stored
        if tensor.dtype not in PLAIN_DTYPES or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
            # torch.save tells how such a tensor is made, and needs its bytes for it
            if tensor.is_meta:
                self.wanted.add(key)
            return None
        start, shape, strides = self._start(tensor), tuple(tensor.shape), tensor.stride()
        # what is called alike is stored once: ties inside of one object stay ties
        made = StandIn(f"{start} {tensor.dtype} {shape} {strides}", tensor.dtype, shape, strides)
        if start + made.nbytes > record.stop:
            raise ValueError(f"a tensor of {made.nbytes} bytes lies outside of its record {record.name}")
        return made

    def _item(self, name: str, value: object) -> tuple[str, int, int]:
        """Where the item of a value lies that is to be made up. Raises ContentError."""
        # most leaves by far, and a zip of torch.save's takes ten times as long
        if type(value) in _SCALARS or (
            type(value) in (list, tuple) and _SCALARS.issuperset(map(type, value))  # type: ignore[call-overload]
        ):
            pieces: list[Piece] = [object_item(pickle.dumps(value, protocol=2))]
        else:
            try:
                pieces = self._zip(value)
            except Exception as error:  # pickling runs code of the value's own, which may raise anything
                raise ContentError(
                    f"{name}: a {type(value).__name__} that can't be pickled: {error}"
                ) from error
        return (self.made_name, *self.made.add(pieces))

    def _zip(self, value: object) -> list[Piece]:
        # the tensors of an object stay where they lie: the object's zip refers to ranges of the file
        ranges: dict[str, tuple[int, int]] = {}

        def stand_in(tensor: torch.Tensor) -> StandIn | None:
            made = self._stand_in(tensor)
            if made is not None:
                start = self._start(tensor)
                ranges[made.key] = start, start + made.nbytes
            return made

        archive = Archive(value, stand_in=stand_in)
        parts: list[tuple[int, Piece]] = []

        def put(record: str, content: bytes) -> None:
            parts.append(archive.head(record, zlib.crc32(content)))
            parts.append((archive.payload(record), content))

        for record, content in archive.small:
            put(record, content)
        for record, storage in archive.held.items():
            put(record, ctypes.string_at(storage.data_ptr(), storage.nbytes()))
        for key, span in ranges.items():
            record = archive.record_of(key)
            # none is recorded: its bytes are not there to be summed
            parts.append(archive.head(record, 0))
            parts.append((archive.payload(record), span))
        parts.append(archive.tail())
        return [piece for _, piece in sorted(parts, key=lambda part: part[0])]
