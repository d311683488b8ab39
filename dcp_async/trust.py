"""What may be unpickled: an allow-list for `.metadata`, another for leaves, and `Trust` that widens the
second.

Enters: pickled bytes of unknown origin. Leaves: objects made of allowed classes only, or UntrustedGlobal,
which names the global; nothing else is imported or called. Private names of torch's serialization are
imported here and nowhere else.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import fractions
import functools
import importlib
import io
import math
import pathlib
import pickle
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, ClassVar

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


@contextlib.contextmanager
def _unchanged_globals() -> Iterator[None]:
    """Undo and refuse what a pickle's BUILD does to the classes it was handed; the C unpickler can't be told
    not to.

    `.metadata` of many tensors must decode fast, so the Python unpickler, which can, is no choice here.
    """
    watched = [
        item
        for item in set(_metadata_globals().values())
        if isinstance(getattr(item, "__dict__", None), Mapping)
    ]
    before = [dict(vars(item)) for item in watched]
    changed: list[str] = []
    try:
        yield
    finally:
        for item, old in zip(watched, before, strict=True):
            now = dict(vars(item))
            for name in now.keys() | old.keys():
                if name in old and now.get(name) is not old[name]:
                    setattr(item, name, old[name])
                    changed.append(f"{item.__qualname__}.{name}")
                elif name not in old:
                    delattr(item, name)
                    changed.append(f"{item.__qualname__}.{name}")
    if changed:
        raise UntrustedGlobal(f"{changed[0]} (to change it)")


def decode_metadata(raw: bytes) -> Metadata:
    """DCP's Metadata from the bytes of `.metadata`.

    Raises: UntrustedGlobal; ValueError if they are no pickle of a Metadata.
    """
    try:
        with _unchanged_globals():
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

    def dtype(kind: Any, *flags: Any) -> Any:
        return _checked_dtype(np.dtype(kind))

    def reconstruct(cls: Any, shape: Any, kind: Any) -> Any:
        if cls is not np.ndarray or shape != (0,):
            raise UntrustedGlobal("numpy.ndarray (rebuilt in an unusual way)")
        return core.multiarray._reconstruct(cls, shape, kind)

    def scalar(kind: Any, raw: Any) -> Any:
        if _checked_dtype(kind).hasobject:
            raise UntrustedGlobal("numpy scalar (of objects)")
        if isinstance(raw, str):  # protocol 2 of Python 2
            raw = raw.encode("latin-1")
        if not isinstance(raw, bytes) or len(raw) != kind.itemsize:
            raise UntrustedGlobal("numpy scalar (of a wrong size)")
        return core.multiarray.scalar(kind, raw)

    names: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): dtype}
    for module in ("numpy._core", "numpy.core"):
        names[f"{module}.multiarray", "_reconstruct"] = reconstruct
        names[f"{module}.multiarray", "scalar"] = scalar
    for name, cls in vars(np).items():
        if isinstance(cls, type) and issubclass(cls, np.generic) and not issubclass(cls, np.object_):
            names["numpy", name] = cls
    for name, cls in vars(dtypes).items():
        if isinstance(cls, type) and name != "ObjectDType":
            names["numpy.dtypes", name] = functools.partial(_made_dtype, cls)
    return names


def _made_dtype(cls: Any, *args: Any) -> Any:
    return _checked_dtype(cls(*args))


_OBJECT_FLAGS = 63
_POINTER_FLAGS = 0x01 | 0x02 | 0x04 | 0x20 | 0x40
"""Of a dtype: what says that items hold references. An object dtype without them would take bytes for
pointers."""


def _checked_dtype(dtype: Any) -> Any:
    """Numbers, texts, times, objects as numpy makes them, and records of these that stay within their
    item."""
    fields = dtype.fields or {}
    if dtype.kind not in "biufcSUVmMO" or dtype.subdtype or (dtype.kind == "O" and not dtype.hasobject):
        raise UntrustedGlobal(f"numpy.dtype({dtype.kind!r})")
    for part, offset, *_ in fields.values():
        if _checked_dtype(part).hasobject or offset < 0 or offset + part.itemsize > dtype.itemsize:
            raise UntrustedGlobal("numpy.dtype (with fields that reach past its item)")
    return dtype


def _check_numpy_state(target: Any, state: Any) -> None:
    """What BUILD may put into an array or a dtype. Anything else could make numpy read foreign memory."""
    import numpy as np

    if isinstance(target, np.dtype):
        ok = isinstance(state, tuple) and len(state) in (8, 9) and state[2] is None
        flags, size = (state[7], state[5]) if ok else (0, 0)
        if target.kind == "O":
            ok = ok and flags == _OBJECT_FLAGS and state[3:5] == (None, None)
        else:
            ok = (
                ok and isinstance(flags, int) and not flags & _POINTER_FLAGS and size in (-1, target.itemsize)
            )
        if ok and isinstance(state[4], dict):
            for part, offset, *_ in state[4].values():
                inside = isinstance(part, np.dtype) and isinstance(offset, int) and offset >= 0
                ok = ok and inside and not _checked_dtype(part).hasobject
                ok = ok and offset + part.itemsize <= target.itemsize
        if not ok:
            raise UntrustedGlobal("numpy.dtype (with unusual state)")
    elif isinstance(target, np.ndarray):
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], np.dtype):
            raise UntrustedGlobal("numpy.ndarray (with unusual state)")
        _, shape, dtype, _, raw = state
        _checked_dtype(dtype)
        extents = shape if isinstance(shape, tuple) else (-1,)
        ok = all(isinstance(extent, int) and extent >= 0 for extent in extents)
        wanted, unit = (list, 1) if dtype.hasobject else (bytes, dtype.itemsize)
        if not ok or not isinstance(raw, wanted) or len(raw) != math.prod(extents) * unit:
            raise UntrustedGlobal("numpy.ndarray (with a wrong size)")


# The Python one, because its opcodes can be overridden; typeshed knows it only in part.
_PythonUnpickler: Any = pickle._Unpickler

# Enums are values; these modules do nothing when they are imported.
_ENUM_MODULES = frozenset({"calendar", "http", "inspect", "re", "signal", "socket", "ssl", "uuid"})


def _stdlib_enum(module: str, name: str) -> type[enum.Enum] | None:
    if module not in _ENUM_MODULES:
        return None
    found = getattr(importlib.import_module(module), name, None)
    return found if isinstance(found, type) and issubclass(found, enum.Enum) else None


def _qualified(items: Iterable[type | Callable[..., object]]) -> dict[tuple[str, str], Any]:
    return {(item.__module__, item.__qualname__): item for item in items}


class _LeafUnpickler(_PythonUnpickler):  # type: ignore[misc]  # typeshed knows its base only in part
    """Finds allowed globals only, and never changes a class, a function or a module."""

    allowed: ClassVar[Mapping[tuple[str, str], Any]]
    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            if (found := _stdlib_enum(module, name)) is not None:
                return found
            raise UntrustedGlobal(f"{module}.{name}") from None

    def load_build(self) -> None:
        target, state = self.stack[-2], self.stack[-1]
        kind = type(target)
        if isinstance(target, (type, types.ModuleType)) or callable(target):
            name = getattr(target, "__qualname__", kind.__qualname__)
            raise UntrustedGlobal(f"{name} (to change it)")
        if kind.__module__.partition(".")[0] == "numpy":
            _check_numpy_state(target, state)
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _pickle_module(trust: Trust) -> types.SimpleNamespace:
    """What ``torch.load(pickle_module=...)`` takes: torch handles storages, this decides on every other
    global."""
    known = _leaf_globals() | _numpy_globals() | _qualified(trust.safe_globals)
    unpickler = type("LeafUnpickler", (_LeafUnpickler,), {"allowed": known})

    def load(file: IO[bytes], **options: Any) -> Any:
        return unpickler(file, **options).load()

    return types.SimpleNamespace(__name__="dcp_async.trust", Unpickler=unpickler, load=load)


def _check_archive(item: IO[bytes]) -> None:
    """Raises UntrustedGlobal for what torch.load would hand to TorchScript or to its legacy readers."""
    start = item.tell()
    if item.read(4) != b"PK\x03\x04":
        raise UntrustedGlobal("torch's legacy format (not a zip)")
    item.seek(start)
    records = set(torch._C.PyTorchFileReader(item).get_all_records())
    item.seek(start)
    if "constants.pkl" in records or any(record.startswith("code/") for record in records):
        raise UntrustedGlobal("a TorchScript archive")


def load_pickle(raw: bytes, trust: Trust) -> Any:
    """The object of a plain pickle. Raises: UntrustedGlobal; ValueError if it is damaged."""
    module: Any = pickle if trust.unsafe else _pickle_module(trust)
    try:
        return module.load(io.BytesIO(raw))
    except (UntrustedGlobal, MemoryError, NameError):  # no damage of the pickle's
        raise
    except Exception as error:  # pickle raises nearly anything on damaged input
        raise ValueError(f"not a readable pickle: {error}") from error


def load_item(item: IO[bytes], trust: Trust) -> Any:
    """The object or tensor of one DCP item, on the CPU.

    Args: ``item`` a seekable stream of exactly one item.
    Raises: UntrustedGlobal; ValueError if it is damaged.
    """
    try:
        if not trust.unsafe:
            _check_archive(item)
        module = pickle if trust.unsafe else _pickle_module(trust)
        options: dict[str, Any] = {"weights_only": False, "pickle_module": module, "mmap": False}
        return torch.load(item, map_location="cpu", **options)
    except (UntrustedGlobal, MemoryError, NameError):  # no damage of the item's
        raise
    except Exception as error:  # torch and pickle raise nearly anything on damaged input
        raise ValueError(f"not a readable item: {error}") from error
