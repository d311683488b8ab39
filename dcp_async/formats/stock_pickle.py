"""`.metadata` decoded, whoever wrote it.

Enters: bytes of unknown origin. Leaves: a Metadata whose every field that a load reads has its proper type
and a sensible value. Invariants: nothing that a `.metadata` names is imported or called; the unpickler, which
is C's because that of many tensors must decode fast, and can't be told what not to do, gets nothing that it
could change: stand-ins that are sealed, and types that are immutable. What it makes of them becomes torch's
own objects once it was checked.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping
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

from ..opcodes import end_of_pickle
from ..trust import Inert, UntrustedGlobal

_MAX_DIMS = 64
_MAX_ELEMENTS = 1 << 48
"""Of a byte each, more than an address space holds."""
_get_layout: Any = torch.serialization._get_layout  # untyped
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)


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
    """Of TensorProperties; its state is no dict."""

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Format(metaclass=_Sealed):
    def __new__(cls, value: Any) -> Any:
        return _FORMATS[value]


class _Layout(metaclass=_Sealed):
    def __new__(cls, name: Any) -> Any:
        return _get_layout(name)


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
        found = _stock_globals().get((module, name))
        if found is None:
            self.foreign.append(f"{module}.{name}")
            return Inert
        return found


def decode_metadata(raw: bytes) -> Metadata:
    """DCP's Metadata from the bytes of `.metadata`.

    A planner may keep objects of its own beside what a load needs, most likely in ``planner_data``; where it
    did, that attribute is None.

    Raises: UntrustedGlobal for foreign names in what a load needs; ValueError for no pickle of a Metadata, or
    of one that makes no sense.
    """
    unpickler = _MetadataUnpickler(raw)
    try:
        end_of_pickle(raw)
        whole = unpickler.load()
        if type(whole) is not _Whole:
            raise ValueError(f"it holds a {type(whole).__name__}, not DCP's Metadata")
        return _Checker(most_chunks=len(raw)).metadata(whole, has_foreign=bool(unpickler.foreign))
    except (UntrustedGlobal, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        if unpickler.foreign:
            raise UntrustedGlobal(unpickler.foreign[0]) from error
        raise ValueError(
            str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        ) from error


class _Checker:
    """Turns stand-ins into what they stand for, if their fields are as stock makes them."""

    def __init__(self, *, most_chunks: int) -> None:
        self._chunks_left = most_chunks
        """A chunk takes some bytes of a pickle; more of them are one list under many names."""
        self._sizes: set[torch.Size] = set()
        self._properties: dict[Any, TensorProperties] = {}

    def metadata(self, whole: Any, *, has_foreign: bool) -> Metadata:
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
                entry.__class__ = BytesStorageMetadata
            elif type(entry) not in (BytesStorageMetadata, TensorStorageMetadata):
                raise ValueError(f"{name} is described by a {type(entry).__name__}")
            elif type(entry) is TensorStorageMetadata:  # under another name once more
                self._count(entry.chunks)
        if isinstance(stored := fields.get("storage_data"), dict):
            fields["storage_data"] = {self._index(index): self._info(info) for index, info in stored.items()}
        elif stored is not None:
            raise ValueError("it does not say where its items lie")
        if "storage_meta" in fields:
            fields["storage_meta"] = self._storage_meta(fields["storage_meta"])
        if has_foreign:
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
                chunk.__class__ = ChunkStorageMetadata
            elif type(chunk) is not ChunkStorageMetadata:
                raise ValueError(f"a chunk of {name} is a {type(chunk).__name__}")
            offsets, sizes = chunk.offsets, chunk.sizes
            self._check_size(name, offsets)
            self._check_size(name, sizes)
            if len(offsets) != len(size) or len(sizes) != len(size):
                raise ValueError(f"a chunk of {name} has other dimensions than the tensor")
        if type(properties) is _Properties:
            state = properties.state
            made = self._properties.get(state)
            if made is None:
                made = self._properties[state] = self._made_properties(name, state)
            fields["properties"] = made
        elif type(properties) is not TensorProperties:
            raise ValueError(f"the properties of {name} are a {type(properties).__name__}")
        entry.__class__ = TensorStorageMetadata

    @staticmethod
    def _made_properties(name: str, state: Any) -> TensorProperties:
        types = (torch.dtype, torch.layout, bool, torch.memory_format, bool)
        if type(state) is not tuple or tuple(map(type, state)) != types:
            raise ValueError(f"the properties of {name} make no sense")
        dtype, layout, requires_grad, memory_format, pin_memory = state
        return TensorProperties(dtype, layout, requires_grad, memory_format, pin_memory)

    def _check_size(self, name: str, size: object) -> None:
        """A torch.Size holds ints; which ones, it does not mind."""
        if type(size) is not torch.Size:
            raise ValueError(f"a size of {name} is a {type(size).__name__}")
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
        index.__class__ = MetadataIndex
        made: MetadataIndex = index
        return made

    @staticmethod
    def _info(info: Any) -> _StorageInfo:
        if type(info) is _Info:
            fields = vars(info)
            path, offset, length = fields["relative_path"], fields["offset"], fields["length"]
            if type(path) is not str or type(offset) is not int or type(length) is not int:
                raise ValueError(f"a place in it is {path!r:.80}, {offset!r:.80}, {length!r:.80}")
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
