"""What items may unpickle: an allow-list, and `Trust` that widens it.

Enters: pickled bytes of unknown origin. Leaves: objects made of allowed classes only, or UntrustedGlobal,
which names the global; nothing else is imported or called. Private names of torch's serialization are
imported here and in formats/metadata.py, and nowhere else.
"""

from __future__ import annotations

import _compat_pickle
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, ClassVar

import torch
from torch._weights_only_unpickler import _get_allowed_globals


class UntrustedGlobal(pickle.UnpicklingError):
    """A pickle names a global that is not on the list, or does with one what it may not."""

    def __init__(self, name: str, *, allowable: bool = False) -> None:
        """
        Args:
            name: the global's full name, or what is refused, in words.
            allowable: whether ``Trust(safe_globals=...)`` could admit it.
        """
        super().__init__(f"the pickle names {name}, which is not trusted")
        self.name = name
        self.allowable = allowable


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
        object.__setattr__(self, "safe_globals", tuple(self.safe_globals))  # a list can't be a cache's key


def _ignore(*args: object) -> None:
    """A method that does nothing: of an object, and of its class, which an unpickler may take for one."""


class Inert:
    """Stands for what a pickle would make: takes every call that an unpickler makes, and does nothing."""

    def __new__(cls, *args: object, **options: object) -> Inert:
        return object.__new__(cls)

    def __call__(self, *args: object, **options: object) -> Inert:
        return self

    __init__ = __setstate__ = __setitem__ = append = extend = add = update = _ignore


_VALUE_TYPES: tuple[type, ...] = (
    *(complex, set, frozenset, bytearray, range, slice, bytes, str, int, float, bool, list, tuple, dict),
    *(OrderedDict, Counter, defaultdict, deque, types.SimpleNamespace, io.BytesIO),
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
    names |= {("__builtin__", "Ellipsis"): ..., ("builtins", "Ellipsis"): ...}
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
        # a copy: BUILD sets its byte order, and numpy shares the usual ones
        return _checked_dtype(np.dtype(kind, copy=True))

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


def _qualified(items: Iterable[Any]) -> dict[tuple[str, str], Any]:
    """Under the name of today and the one that protocol 2 gives to what Python 2 had."""
    names = {(item.__module__, item.__qualname__): item for item in items}
    return names | {_compat_pickle.REVERSE_NAME_MAPPING.get(name, name): item for name, item in names.items()}


# What a nested tensor of layout torch.jagged is rebuilt by; imported on demand, since torch._dynamo takes
# long.
_NESTED = frozenset(
    {
        ("torch.nested._internal.nested_tensor", "NestedTensor"),
        ("torch.nested._internal.nested_tensor", "_rebuild_njt"),
        ("torch._dynamo.decorators", "_DimRange"),
    }
)


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
            if (module, name) in _NESTED:
                return getattr(importlib.import_module(module), name)
            raise UntrustedGlobal(f"{module}.{name}", allowable=True) from None

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


@lru_cache(maxsize=8)
def _users_safe_globals() -> dict[tuple[str, str], Any]:
    """What the user told ``torch.serialization.add_safe_globals``. Torch's own entries there are left out:
    some do more than hold values."""
    names: dict[tuple[str, str], Any] = {}
    for item in torch.serialization.get_safe_globals():
        value, full = item if isinstance(item, tuple) else (item, f"{item.__module__}.{item.__qualname__}")
        module, _, name = full.rpartition(".")
        if module.partition(".")[0] != "torch":
            names[module, name] = value
    return names


def _pickle_module(trust: Trust) -> types.SimpleNamespace:
    """What ``torch.load(pickle_module=...)`` takes: torch handles storages, this decides on every other
    global."""
    known = _leaf_globals() | _numpy_globals() | _users_safe_globals() | _qualified(trust.safe_globals)
    unpickler = type("LeafUnpickler", (_LeafUnpickler,), {"allowed": known})

    def load(file: IO[bytes], **options: Any) -> Any:
        return unpickler(file, **options).load()

    return types.SimpleNamespace(__name__="dcp_async.trust", Unpickler=unpickler, load=load)


class _GlobalsCheck(pickle.Unpickler):
    """Looks up every global as ``torch.load`` would, makes nothing of what it finds, and runs in C."""

    def __init__(self, pickled: IO[bytes], resolve: Callable[[str, str], object]) -> None:
        super().__init__(pickled, encoding="latin-1")
        self._resolve = resolve

    def find_class(self, module: str, name: str, /) -> Any:
        self._resolve(module, name)
        return Inert

    def persistent_load(self, pid: Any, /) -> Any:
        return Inert()


def _resolve_legacy(module: str, name: str) -> None:
    """As torch's weights_only unpickler does, which knows the list of torch alone."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    full = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
    if full not in _get_allowed_globals():
        raise UntrustedGlobal(f"{full} in torch's legacy format")


_LEGACY_PICKLES = 4
"""A legacy item begins with a magic number, a version, facts on the writer's machine, and the object."""


def check_globals(head: bytes, pickle_at: int | None, trust: Trust) -> None:
    """Whether ``load_item`` would accept the globals of an item, from its first bytes and without its data.

    Args: ``pickle_at`` where the pickle of a zip begins; None for an item in torch's legacy format.
    Raises: UntrustedGlobal; ValueError if ``head`` does not hold the whole pickle, or a damaged one.
    """
    if trust.unsafe:
        return
    pickled = io.BytesIO(head)
    try:
        if pickle_at is None:
            for _ in range(_LEGACY_PICKLES):
                _GlobalsCheck(pickled, _resolve_legacy).load()
        else:
            pickled.seek(pickle_at)
            _GlobalsCheck(pickled, _resolver(trust)).load()
    except UntrustedGlobal:
        raise
    except Exception as error:  # pickle raises nearly anything on damaged input
        raise ValueError(f"not a readable pickle: {error}") from error


@lru_cache(maxsize=8)
def _resolver(trust: Trust) -> Callable[[str, str], object]:
    """Finds a global as ``torch.load`` does under ``trust``, or raises UntrustedGlobal."""
    find: Callable[[str, str], object] = _pickle_module(trust).Unpickler(io.BytesIO()).find_class
    storages = {
        full.rpartition(".")[2]
        for full, value in _get_allowed_globals().items()
        if isinstance(value, torch.serialization.StorageType)
    }

    def resolve(module: str, name: str) -> object:
        if name in storages:  # torch.load resolves these itself, whatever their module is called
            return None
        return find("torch._tensor" if module == "torch.tensor" else module, name)

    return resolve


_LEGACY_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)[2:]


def is_zip(head: bytes | bytearray) -> bool:
    """Whether an item that begins so is a zip, as ``torch.save`` has written it since torch 1.6."""
    return head.startswith(b"PK\3\4")


def _load_legacy(item: IO[bytes]) -> Any:
    """An item in torch's legacy format, by torch's own weights_only unpickler: its other readers run what a
    pickle says, or unpack archives to disk."""
    raw = item.read()
    if not raw[2:].startswith(_LEGACY_MAGIC):
        raise ValueError("it is neither a zip nor in torch's legacy format")
    check_globals(raw, None, Trust())
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True, mmap=False)


def _refuse_torchscript(item: IO[bytes]) -> None:
    """Raises UntrustedGlobal for what torch.load would hand to TorchScript."""
    start = item.tell()
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
            start = item.tell()
            head = item.read(4)
            item.seek(start)
            if not is_zip(head):
                return _load_legacy(item)
            _refuse_torchscript(item)
        module = pickle if trust.unsafe else _pickle_module(trust)
        options: dict[str, Any] = {"weights_only": False, "pickle_module": module, "mmap": False}
        return torch.load(item, map_location="cpu", **options)
    except (UntrustedGlobal, MemoryError, NameError):  # no damage of the item's
        raise
    except Exception as error:  # torch and pickle raise nearly anything on damaged input
        raise ValueError(f"not a readable item: {error}") from error
