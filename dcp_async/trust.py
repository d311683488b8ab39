"""What may be unpickled: an allow-list for `.metadata`, another for leaves, and `Trust` that widens the
second.

Enters: pickled bytes of unknown origin. Leaves: objects made of allowed classes only, or UntrustedGlobal,
which names the global; nothing else is imported or called. Private names of torch's serialization are
imported here and nowhere else.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import importlib
import io
import pathlib
import pickle
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, cast

import torch
from torch._weights_only_unpickler import _get_allowed_globals
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata


class UntrustedGlobal(pickle.UnpicklingError):
    """A pickle names a global that is not on the list; ``name`` is its full name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the pickle names {name}, which is not trusted")
        self.name = name


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Which pickled leaves a load accepts beyond tensors, numbers, text, containers, numpy and the standard
    library's values."""

    safe_globals: tuple[type | Callable[..., object], ...] = ()
    """Classes (and functions that rebuild them) of yours that leaves may name."""
    unsafe: bool = False
    """Unpickle leaves without any check, as stock DCP does. Whoever wrote the checkpoint can then run code
    here."""

    def __post_init__(self) -> None:
        for item in self.safe_globals:
            if not callable(item):
                raise ValueError(f"Trust(safe_globals=...) takes classes or functions, not {item!r}")


_TORCH_ENCODING = dcp_metadata._MEM_FORMAT_ENCODING


def _path(*parts: str) -> str:
    """Stands in for every pathlib class in `.metadata`: 3.13's pickles name a module that older Pythons
    lack."""
    return "/".join(parts)


@lru_cache(maxsize=1)
def _metadata_globals() -> dict[tuple[str, str], Any]:
    here = "torch.distributed.checkpoint.metadata"
    legacy = "torch.distributed._shard.sharded_tensor.metadata"
    names: dict[tuple[str, str], Any] = {
        (here, cls.__name__): cls
        for cls in (
            Metadata,
            dcp_metadata.MetadataIndex,
            dcp_metadata.StorageMeta,
            dcp_metadata.TensorStorageMetadata,
            dcp_metadata.ChunkStorageMetadata,
            dcp_metadata.BytesStorageMetadata,
            dcp_metadata.TensorProperties,
            _TORCH_ENCODING,
        )
    }
    names[legacy, "TensorProperties"] = dcp_metadata.TensorProperties
    names[legacy, "MEM_FORMAT_ENCODING"] = _TORCH_ENCODING
    names["torch.distributed.checkpoint.filesystem", "_StorageInfo"] = _StorageInfo
    names["torch.serialization", "_get_layout"] = torch.serialization._get_layout
    names["torch", "Size"] = torch.Size
    names["torch", "device"] = torch.device
    names["collections", "OrderedDict"] = OrderedDict
    for value in vars(torch).values():
        if isinstance(value, torch.dtype):
            names["torch", str(value).removeprefix("torch.")] = value
    for module in ("pathlib", "pathlib._local"):
        for cls in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath"):
            names[module, cls] = _path
    return names


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return _metadata_globals()[module, name]
        except KeyError:
            raise UntrustedGlobal(f"{module}.{name}") from None


def decode_metadata(raw: bytes) -> Metadata:
    """DCP's Metadata from the bytes of `.metadata`.

    Raises: UntrustedGlobal; ValueError if they are no pickle of a Metadata.
    """
    try:
        metadata = _MetadataUnpickler(io.BytesIO(raw)).load()
    except UntrustedGlobal:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"not a readable pickle: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError(f"it holds a {type(metadata).__name__}, not DCP's Metadata")
    return metadata


_VALUE_TYPES: tuple[type, ...] = (
    *(complex, set, frozenset, bytearray, range, slice, bytes, str, int, float, bool, list, tuple, dict),
    *(OrderedDict, Counter, defaultdict, deque, types.SimpleNamespace),
    *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
    *(decimal.Decimal, fractions.Fraction, uuid.UUID, uuid.SafeUUID),
    *(pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.Path, pathlib.PosixPath),
)


@lru_cache(maxsize=1)
def _leaf_globals() -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {}
    for full, value in _get_allowed_globals().items():
        module, _, name = full.rpartition(".")
        names[module, name] = value
    # torch's list marks typed storages with stand-ins that only its own unpickler knows; torch.load resolves
    # those itself
    names = {
        key: value for key, value in names.items() if not isinstance(value, torch.serialization.StorageType)
    }
    for cls in _VALUE_TYPES:
        names[cls.__module__, cls.__qualname__] = cls
    for cls in (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.PureWindowsPath):
        names["pathlib._local", cls.__name__] = cls
        names["pathlib", cls.__name__] = cls
    # protocol 2 names the builtins by their Python 2 module
    names |= {("__builtin__", name): value for (module, name), value in names.items() if module == "builtins"}
    names |= {("__builtin__", "xrange"): range, ("__builtin__", "unicode"): str, ("__builtin__", "long"): int}
    names["copyreg", "_reconstructor"] = _reconstruct
    names["copy_reg", "_reconstructor"] = _reconstruct
    return names


def _reconstruct(cls: type, base: type, state: object) -> object:
    """copyreg's rebuilder for protocol 2; its arguments passed the same list as everything else."""
    if base is object:
        return object.__new__(cls)
    return base.__new__(cls, state)


@lru_cache(maxsize=1)
def _numpy_globals() -> dict[tuple[str, str], Any]:
    try:
        import numpy as np
        from numpy import dtypes
    except ImportError:
        return {}
    # private, and the only place that names it: numpy's own pickles call these to rebuild arrays and scalars
    core: Any = importlib.import_module("numpy._core")
    names: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for module in ("numpy._core", "numpy.core"):
        names[f"{module}.multiarray", "_reconstruct"] = core.multiarray._reconstruct
        names[f"{module}.multiarray", "scalar"] = core.multiarray.scalar
        names[f"{module}.numeric", "_frombuffer"] = core.numeric._frombuffer
    for name, cls in vars(np).items():
        if isinstance(cls, type) and issubclass(cls, np.generic):
            names["numpy", name] = cls
    for name, cls in vars(dtypes).items():
        if isinstance(cls, type):
            names["numpy.dtypes", name] = cls
    return names


# Enums are values; these modules do nothing when they are imported.
_ENUM_MODULES = frozenset({"calendar", "http", "inspect", "re", "signal", "socket", "ssl", "uuid"})


def _stdlib_enum(module: str, name: str) -> type[enum.Enum] | None:
    if module not in _ENUM_MODULES:
        return None
    found = getattr(importlib.import_module(module), name, None)
    return found if isinstance(found, type) and issubclass(found, enum.Enum) else None


def _qualified(items: Iterable[type | Callable[..., object]]) -> dict[tuple[str, str], Any]:
    return {(item.__module__, item.__qualname__): item for item in items}


def _pickle_module(trust: Trust) -> types.SimpleNamespace:
    """What ``torch.load(pickle_module=...)`` takes: torch then handles storages, this decides on every other
    global."""
    allowed = _leaf_globals() | _numpy_globals() | _qualified(trust.safe_globals)

    class LeafUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str, /) -> Any:
            try:
                return allowed[module, name]
            except KeyError:
                if (found := _stdlib_enum(module, name)) is not None:
                    return found
                raise UntrustedGlobal(f"{module}.{name}") from None

    def load(file: IO[bytes], **options: Any) -> Any:
        return LeafUnpickler(file, **options).load()

    return types.SimpleNamespace(__name__="dcp_async.trust", Unpickler=LeafUnpickler, load=load)


def load_item(item: IO[bytes], trust: Trust) -> Any:
    """The object or tensor of one DCP item, on the CPU.

    Args: ``item`` a seekable stream of exactly one item.
    Raises: UntrustedGlobal; ValueError if it is damaged.
    """
    module = pickle if trust.unsafe else _pickle_module(trust)
    try:
        return torch.load(
            item, map_location="cpu", weights_only=False, pickle_module=cast(Any, module), mmap=False
        )
    except UntrustedGlobal:
        raise
    except Exception as error:  # torch and pickle raise nearly anything on damaged input
        raise ValueError(f"not a readable item: {error}") from error
