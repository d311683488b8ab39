"""`.metadata` decoded, whoever wrote it.

Enters: bytes of unknown origin. Leaves: a Metadata whose every field that a load reads has its proper type
and a sensible value. Invariants: nothing that a `.metadata` names is imported or called; the unpickler, which
is C's because that of many tensors must decode fast, and can't be told what not to do, gets nothing that it
could change: stand-ins that are sealed, and types that are immutable. What it makes of them becomes torch's
own objects once it was checked. What a newer stock adds to what a load needs is passed over, docs/adr/0014.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Set
from dataclasses import fields
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..trust import Inert, UntrustedGlobal
from .metadata_grammar import check_metadata_pickle, check_places

_MAX_DIMS = 64
_MAX_NAME = 64
_DTYPE = re.compile(rf"[a-z][a-z0-9_]{{0,{_MAX_NAME - 1}}}")
_KNOWN_FIELDS: dict[type, frozenset[str]] = {
    cls: frozenset(field.name for field in fields(cls))
    for cls in (
        TensorStorageMetadata,
        ChunkStorageMetadata,
        BytesStorageMetadata,
        MetadataIndex,
        _StorageInfo,
    )
}
_MAX_ELEMENTS = 1 << 48
"""More than an address space holds, of a byte each."""
_get_layout: Any = torch.serialization._get_layout  # untyped
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
_PROPERTIES = (torch.dtype, torch.layout, bool, torch.memory_format, bool)
"""Types of the fields of TensorProperties, in their order."""


class _Sealed(type):
    """A class that a pickle's BUILD can't change."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise UntrustedGlobal(f"{cls.__name__} (to change it)")


_Whole: Any = _Sealed("Metadata", (), {})
_Index: Any = _Sealed("MetadataIndex", (), {})
_Info: Any = _Sealed("_StorageInfo", (), {})
_Tensor: Any = _Sealed("TensorStorageMetadata", (), {})
_Chunk: Any = _Sealed("ChunkStorageMetadata", (), {})
_Leaf: Any = _Sealed("BytesStorageMetadata", (), {})
_StorageMeta: Any = _Sealed("StorageMeta", (), {})


class _Properties(metaclass=_Sealed):
    """Stands in for TensorProperties, whose state is no dict."""

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Format(metaclass=_Sealed):
    def __new__(cls, value: Any) -> Any:
        """No load asks for it, so one that this torch lacks does not stand in the way."""
        known = type(value) is int and 0 <= value < len(_FORMATS)
        return _FORMATS[value] if known else torch.preserve_format


class Unknown:
    """A dtype or layout that this torch does not have. Whoever needs that tensor is refused; a load of the
    others is not. Has no state that a pickle could set."""

    __slots__ = ("_name",)
    _name: str
    itemsize = 16
    """As of the largest dtype that there is: where it counts, it is an upper bound."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise UntrustedGlobal(f"{self} (to change it)")

    def __setstate__(self, state: object) -> NoReturn:
        raise UntrustedGlobal(f"{self} (to change it)")

    def __repr__(self) -> str:
        return f"{self._name}, which torch {torch.__version__} does not have"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unknown) and self._name == other._name

    def __hash__(self) -> int:
        return hash(self._name)


class _Layout(metaclass=_Sealed):
    def __new__(cls, name: Any) -> Any:
        if type(name) is not str:
            raise ValueError(f"a layout in it is a {type(name).__name__}")
        try:
            return _get_layout(name)
        except KeyError:
            return Unknown(name[:_MAX_NAME])


class _Path(metaclass=_Sealed):
    """Stands in for every pathlib class: 3.13's pickles name a module that older Pythons lack."""

    def __new__(cls, *parts: str) -> Any:
        return "/".join(parts)


@lru_cache(maxsize=1)
def _stock_globals() -> dict[tuple[str, str], Any]:
    """What stock's pickles name, under the names of this torch and of older ones."""
    names: dict[tuple[str, str], Any] = {}
    stand_ins = {
        Metadata: _Whole,
        MetadataIndex: _Index,
        StorageMeta: _StorageMeta,
        TensorStorageMetadata: _Tensor,
        ChunkStorageMetadata: _Chunk,
        BytesStorageMetadata: _Leaf,
        TensorProperties: _Properties,
        dcp_metadata._MEM_FORMAT_ENCODING: _Format,
    }
    # the second was its home until torch 2.0
    for package in ("torch.distributed.checkpoint", "torch.distributed._shard.checkpoint"):
        names |= {(f"{package}.metadata", cls.__name__): stand_in for cls, stand_in in stand_ins.items()}
        names[f"{package}.filesystem", "_StorageInfo"] = _Info
    sharded = "torch.distributed._shard.sharded_tensor.metadata"  # the home of two of them until torch 2.3
    names[sharded, "TensorProperties"] = _Properties
    names[sharded, "MEM_FORMAT_ENCODING"] = _Format
    names["torch.serialization", "_get_layout"] = _Layout
    names["torch", "Size"] = torch.Size
    names["torch", "device"] = torch.device
    names["collections", "OrderedDict"] = OrderedDict
    for value in vars(torch).values():
        if isinstance(value, torch.dtype):
            names["torch", str(value).removeprefix("torch.")] = value
    for module in ("pathlib", "pathlib._local"):
        for path in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath"):
            names[module, path] = _Path
    return names


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))
        self.foreign: list[str] = []
        """What it named beyond stock's classes; something inert took its place."""

    def find_class(self, module: str, name: str, /) -> Any:
        known = _stock_globals().get((module, name))
        # what torch has under such a name, and is no dtype, is as foreign as anything else
        if known is None and module == "torch" and _DTYPE.fullmatch(name) and not hasattr(torch, name):
            return Unknown(f"torch.{name}")
        if known is None:
            # no refusal yet: a planner's own objects may lie where no load looks
            self.foreign.append(f"{module}.{name}")
            return Inert
        return known


def decode_metadata(raw: bytes) -> Metadata:
    """DCP's Metadata from the bytes of `.metadata`.

    A planner may keep objects of its own beside what a load needs, most likely in ``planner_data``; where it
    did, that attribute is None.

    Raises: UntrustedGlobal for foreign names in what a load needs; ValueError for no pickle of a Metadata, or
    of one that makes no sense.
    """
    unpickler = _MetadataUnpickler(raw)
    try:
        # first: C's unpickler can't be told what not to do, and not be stopped either
        check_metadata_pickle(raw)
        whole = unpickler.load()
        if type(whole) is not _Whole:
            raise ValueError(f"it holds a {type(whole).__name__}, not DCP's Metadata")
        # while indices are stand-ins, hashed by identity: stock's hash their fields, as the pickle chose them
        check_places(vars(whole).get("storage_data"))
        return _Checker(most_chunks=len(raw), has_foreign=bool(unpickler.foreign)).metadata(whole)
    except (UntrustedGlobal, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        # most likely the cause: something inert stands where it should have been
        if unpickler.foreign:
            raise UntrustedGlobal(unpickler.foreign[0]) from error
        raise ValueError(
            str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        ) from error


class _Checker:
    """Turns stand-ins into what they stand for, if the fields that a load needs are as stock makes them."""

    def __init__(self, *, most_chunks: int, has_foreign: bool) -> None:
        self._chunks_left = most_chunks
        """A chunk takes some bytes of a pickle; more of them are one list under many names."""
        self._has_foreign = has_foreign
        """Whether anything in it could not be made."""
        self._sizes: set[torch.Size] = set()
        self._made: dict[_Properties, TensorProperties] = {}
        """By the very object: ours has one for all tensors that are alike."""
        self._properties: dict[Any, TensorProperties] = {}
        """By value: stock has one for each tensor."""

    def _strip(self, stand_in: Any, cls: type) -> None:
        """Leave out the fields that only a newer torch's ``cls`` has: what could not be made may be there."""
        attributes = vars(stand_in)
        for name in attributes.keys() - _KNOWN_FIELDS[cls]:
            del attributes[name]

    def metadata(self, whole: Any) -> Metadata:
        fields = vars(whole)
        entries = fields.get("state_dict_metadata")
        if not isinstance(entries, dict):
            raise ValueError("it does not say what was saved")
        for name, entry in entries.items():
            if type(name) is not str:
                raise ValueError(f"a name in it is a {type(name).__name__}")
            if type(entry) is _Tensor:
                self._tensor(name, entry)
            elif type(entry) is _Leaf:
                if self._has_foreign:
                    self._strip(entry, BytesStorageMetadata)
                entry.__class__ = BytesStorageMetadata
            elif type(entry) not in (BytesStorageMetadata, TensorStorageMetadata):
                raise ValueError(f"{name} is described by a {type(entry).__name__}")
            elif type(entry) is TensorStorageMetadata:  # under another name once more
                self._count(entry.chunks)
        if isinstance(stored := fields.get("storage_data"), dict):
            # a dict anew: the keys have another class now, and so another hash
            places = {self._index(index): self._info(info) for index, info in stored.items()}
            if len(places) != len(stored):  # they differ in what is not known here
                twice = Counter(index.fqn for index in stored).most_common(1)[0][0]
                raise ValueError(f"it gives several places for one item of {twice}")
            fields["storage_data"] = places
        elif stored is not None:
            raise ValueError("it does not say where its items lie")
        if "storage_meta" in fields:
            fields["storage_meta"] = self._storage_meta(fields["storage_meta"])
        if self._has_foreign:
            for attribute, value in list(fields.items()):
                if attribute not in ("state_dict_metadata", "storage_data") and _holds_inert(value):
                    fields[attribute] = None
        whole.__class__ = Metadata
        made: Metadata = whole
        return made

    def _count(self, chunks: list[Any]) -> None:
        self._chunks_left -= len(chunks)
        if self._chunks_left < 0:
            raise ValueError("it describes more chunks than it has room for")

    def _tensor(self, name: str, entry: Any) -> None:
        fields = vars(entry)
        properties, size, chunks = fields["properties"], fields["size"], fields["chunks"]
        self._check_size(name, size)
        if type(chunks) is not list:
            raise ValueError(f"the chunks of {name} are a {type(chunks).__name__}")
        self._count(chunks)
        for chunk in chunks:
            if type(chunk) is _Chunk:
                if self._has_foreign:
                    self._strip(chunk, ChunkStorageMetadata)
                chunk.__class__ = ChunkStorageMetadata
            elif type(chunk) is not ChunkStorageMetadata:
                raise ValueError(f"a chunk of {name} is a {type(chunk).__name__}")
            offsets, sizes = chunk.offsets, chunk.sizes
            self._check_size(name, offsets)
            self._check_size(name, sizes)
            if len(offsets) != len(size) or len(sizes) != len(size):
                raise ValueError(f"a chunk of {name} has other dimensions than the tensor")
        if type(properties) is _Properties:
            made = self._made.get(properties)
            if made is None:
                made = self._made[properties] = self._made_properties(name, properties.state)
            fields["properties"] = made
        elif type(properties) is not TensorProperties:
            raise ValueError(f"the properties of {name} are a {type(properties).__name__}")
        if self._has_foreign:
            self._strip(entry, TensorStorageMetadata)
        # in place: what is shared stays shared, and no object per tensor is made anew
        entry.__class__ = TensorStorageMetadata

    def _made_properties(self, name: str, state: Any) -> TensorProperties:
        """The first fields of ``state`` are those that each stock writes; what a newer one has behind them,
        as torch 2.15 its strides, tells nothing that a load needs."""
        needed = state[: len(_PROPERTIES)] if type(state) is tuple else ()
        types = tuple(map(type, needed))
        if types != _PROPERTIES:
            # what this torch lacks is refused where that tensor is wanted, not here (docs/adr/0014)
            instead = tuple(
                known if kind is Unknown and known in (torch.dtype, torch.layout) else kind
                for kind, known in zip(types, _PROPERTIES, strict=False)
            )
            if instead != _PROPERTIES:
                raise ValueError(f"the properties of {name} make no sense")
        made = self._properties.get(needed)
        if made is None:
            dtype, layout, requires_grad, memory_format, pin_memory = needed
            made = TensorProperties(dtype, layout, requires_grad, memory_format, pin_memory)
            self._properties[needed] = made
        return made

    def _check_size(self, name: str, size: object) -> None:
        """A torch.Size holds ints; which ones, it does not mind."""
        if type(size) is not torch.Size:
            raise ValueError(f"a size of {name} is a {type(size).__name__}")
        # thousands of chunks have few sizes
        if size in self._sizes:
            return
        if len(size) > _MAX_DIMS or min(size, default=0) < 0 or math.prod(size) > _MAX_ELEMENTS:
            raise ValueError(f"a size of {name} is {tuple(size[:_MAX_DIMS])}")
        self._sizes.add(size)

    def _index(self, index: Any) -> MetadataIndex:
        if type(index) is not _Index:
            raise ValueError(f"a place in it is that of a {type(index).__name__}")
        fields = vars(index)
        name, offset, number = fields["fqn"], fields.get("offset"), fields.get("index")
        if type(name) is not str or (number is not None and type(number) is not int):
            raise ValueError(f"a place in it is that of {name!r:.80}, {number!r:.80}")
        if offset is not None:
            self._check_size(name, offset)
        if self._has_foreign:
            self._strip(index, MetadataIndex)
        index.__class__ = MetadataIndex
        made: MetadataIndex = index
        return made

    def _info(self, info: Any) -> _StorageInfo:
        if type(info) is _Info:
            fields = vars(info)
            path, offset, length = fields["relative_path"], fields["offset"], fields["length"]
            if type(path) is not str or type(offset) is not int or type(length) is not int:
                raise ValueError(f"a place in it is {path!r:.80}, {offset!r:.80}, {length!r:.80}")
            if self._has_foreign:
                self._strip(info, _StorageInfo)
            info.__class__ = _StorageInfo
        elif type(info) is not _StorageInfo:
            raise ValueError(f"a place in it is a {type(info).__name__}")
        made: _StorageInfo = info
        return made

    @staticmethod
    def _storage_meta(meta: Any) -> StorageMeta | None:
        """Nothing that a load needs, so nothing that would make it fail."""
        if type(meta) is not _StorageMeta:
            return None
        texts = {key: value for key, value in vars(meta).items() if isinstance(value, str)}
        modules = vars(meta).get("modules")
        modules = modules if type(modules) is list else []
        return StorageMeta(
            checkpoint_id=texts.get("checkpoint_id"),
            save_id=texts.get("save_id"),
            load_id=texts.get("load_id"),
            modules=[module for module in modules if isinstance(module, str)]
            if type(modules) is list
            else [],
        )


def _holds_inert(whole: object) -> bool:
    """Whether ``whole`` holds an object that could not be made; it may be nested deeply or in circles."""
    seen: set[int] = set()
    # a list and no recursion: the pickle may nest as deep as its grammar admits
    todo = [whole]
    while todo:
        item = todo.pop()
        if isinstance(item, Inert) or item is Inert:
            return True
        if id(item) in seen or isinstance(item, (str, int, float, type, torch.Size, torch.dtype)):
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo += item
        else:
            todo += getattr(item, "__dict__", {}).values()
    return False


def uids_named_in(metadata: bytes, uids: Set[str]) -> Set[str] | None:
    """Which of ``uids`` the names of files in `.metadata` bear; None if it can't be decoded."""
    # decoding is slow, and after a crash alone some are not named
    if all(uid.encode() in metadata for uid in uids):
        return uids
    try:
        decode_metadata(metadata)
    except (UntrustedGlobal, ValueError):
        return None
    return {uid for uid in uids if uid.encode() in metadata}
