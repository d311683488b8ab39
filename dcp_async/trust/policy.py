"""What items may unpickle: an allow-list, and `Trust` that widens it.

Enters: pickled bytes of unknown origin. Leaves: objects made of allowed classes only, or UntrustedGlobal,
which names the global; nothing else is imported or called. docs/architecture.md says which
modules import private names of torch.
"""

from __future__ import annotations

import _compat_pickle
import enum
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
from typing import IO, Any, ClassVar

import torch
from torch._weights_only_unpickler import _get_allowed_globals

from .key_hashes import check_hashes, count_hashes, risky
from .legacy_item import load_legacy, outlines, storage_type
from .numpy_rebuilders import check_numpy_state, numpy_globals
from .pickle_grammar import check_pickle
from .pickle_walk import Outline
from .torch_rebuilders import (
    NAMED,
    VALUES,
    TensorRebuilders,
    encode,
)
from .torch_rebuilders import UntrustedGlobal as UntrustedGlobal


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Which pickled leaves a load accepts beyond tensors, numbers, text, containers, numpy and the standard
    library's values, and which links it follows."""

    safe_globals: tuple[type | Callable[..., object], ...] = ()
    """Classes (and functions that rebuild them) of yours that leaves may name."""
    unsafe: bool = False
    """Unpickle leaves without any check, as stock DCP does. Whoever wrote the checkpoint can then run code
    here."""
    follow_links: bool = False
    """Follow a checkpoint, or a file of one, that is a link out of the root, because it was moved to another
    disk, say. The link must have been made by the root's owner, and lead to what is that owner's."""

    def __post_init__(self) -> None:
        for item in self.safe_globals:
            if not callable(item) or not hasattr(item, "__qualname__") or not hasattr(item, "__module__"):
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


@lru_cache(maxsize=1)
def _named() -> dict[tuple[str, str], Any]:
    """What any leaf may name: torch's list, and values of the standard library."""
    names: dict[tuple[str, str], Any] = {}
    for full, value in _get_allowed_globals().items():
        # torch's list marks typed storages with stand-ins that only its own unpickler knows; torch.load
        # resolves those itself
        if not isinstance(value, (torch.serialization.StorageType, types.FunctionType)):
            module, _, name = full.rpartition(".")
            names[module, name] = value
    for cls in (*VALUES, *NAMED):
        names.setdefault((cls.__module__, cls.__qualname__), cls)
    names["torch.serialization", "_get_layout"] = torch.serialization._get_layout
    names["_codecs", "encode"] = encode
    for cls in (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.PureWindowsPath):
        names["pathlib._local", cls.__name__] = cls
        names["pathlib", cls.__name__] = cls
    # protocol 2 names the builtins by their Python 2 module
    names |= {("__builtin__", name): value for (module, name), value in names.items() if module == "builtins"}
    names |= {("__builtin__", "Ellipsis"): ..., ("builtins", "Ellipsis"): ...}
    names |= {("__builtin__", "xrange"): range, ("__builtin__", "unicode"): str, ("__builtin__", "long"): int}
    return names


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
        ("torch._dynamo.decorators", "_DimRange"),
    }
)


class _Rules:
    """What leaves may name, and what of it they may call or change.

    Naming is harmless, so a class that is a value itself (``torch.Tensor``, ``numpy.ndarray``, ``float``) may
    be named and no more. Only what is known to be harmless with these arguments is called, and the user's.
    """

    def __init__(self, trust: Trust, users: dict[tuple[str, str], Any]) -> None:
        self._users = _qualified(trust.safe_globals) | users
        self._trusted = {id(item) for item in self._users.values()}
        numpy_names, numpy_calls = numpy_globals()
        rebuilders = TensorRebuilders(self.is_trusted)
        reconstruct = {(module, "_reconstructor"): self._reconstruct for module in ("copyreg", "copy_reg")}
        self.names: dict[tuple[str, str], Any] = (
            _named() | numpy_names | rebuilders.names | reconstruct | self._users
        )
        checked = (*rebuilders.names.values(), *reconstruct.values(), encode, torch.serialization._get_layout)
        self._free = {id(function) for function in (*checked, *numpy_calls)} | self._trusted

    def is_trusted(self, item: object) -> bool:
        """Whether ``item`` is of the user's list."""
        return id(item) in self._trusted

    def check_call(self, function: Any, args: Any, options: Any = None) -> None:
        """Raises UntrustedGlobal."""
        if type(args) is not tuple:
            raise ValueError("arguments that are no tuple")
        if id(function) in self._free and not (options and not self.is_trusted(function)):
            return
        name = function.__qualname__ if isinstance(function, type) else type(function).__qualname__
        if isinstance(function, (types.FunctionType, types.BuiltinFunctionType)):
            name = function.__qualname__
        if not options and isinstance(function, type):
            if issubclass(function, enum.Enum):  # a second argument would make a new class
                if len(args) == 1:
                    return
            elif (function.__module__, function.__qualname__) in _NESTED:
                if not issubclass(function, torch.Tensor):
                    return
            elif (test := VALUES.get(function)) is not None and test(*args):
                return
        raise UntrustedGlobal(f"{name} (to call it so)")

    def check_build(self, target: Any, state: Any) -> None:
        """What a pickle makes anew may be changed, never what there is one of. Raises UntrustedGlobal."""
        kind = type(target)
        name = target.__qualname__ if isinstance(target, type) else kind.__qualname__
        if kind.__module__.partition(".")[0] == "numpy" and not self.is_trusted(kind):
            check_numpy_state(target, state)
        elif (kind.__module__, kind.__qualname__) in _NESTED and not issubclass(kind, torch.Tensor):
            pass
        elif issubclass(kind, enum.Enum) or not (kind in _CHANGEABLE or self.is_trusted(kind)):
            raise UntrustedGlobal(f"{name} (to change it)")
        elif (
            type(state) is tuple
            and len(state) == 2
            and isinstance(state[1], dict)
            and "__class__" in state[1]
        ):
            raise UntrustedGlobal(f"{name} (to change its class)")

    def check_filled(self, target: Any, kinds: tuple[type, ...]) -> None:
        """Raises UntrustedGlobal."""
        if type(target) not in kinds and not self.is_trusted(type(target)):
            raise UntrustedGlobal(f"{type(target).__qualname__} (to fill it)")

    def _reconstruct(self, cls: Any, base: Any, state: Any) -> object:
        """copyreg's rebuilder for protocol 2."""
        if not self.is_trusted(cls) and not (base is object and cls in VALUES):
            raise UntrustedGlobal(f"{cls.__qualname__} (to call it so)")
        if base is object:
            return object.__new__(cls)
        if base not in (*NAMED, set, frozenset, bytes, complex):
            raise UntrustedGlobal(f"{base.__qualname__} (to call it so)")
        return base.__new__(cls, state)


_FEW_KEYS = 256
"""Containers of so few keys are not watched."""
_MAPPINGS = (dict, OrderedDict, Counter, defaultdict)
_LISTS = (list, deque)
_CHANGEABLE = (
    *_MAPPINGS[1:],
    *_LISTS[1:],
    types.SimpleNamespace,
    io.BytesIO,
    uuid.UUID,
    set,
    frozenset,
    bytearray,
)


class _LeafUnpickler(_PythonUnpickler):  # type: ignore[misc]  # typeshed knows its base only in part
    """Finds allowed globals only, and calls and changes what its rules say."""

    rules: ClassVar[_Rules]
    _hashes: dict[int, Counter[int]]
    """Of what holds many keys, how many of them have each hash."""
    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: IO[bytes], **options: Any) -> None:
        self._whole = file
        super().__init__(file, **options)

    def load(self) -> Any:
        raw = self._whole.read()
        check_pickle(raw)
        self._hashes = {}
        # of the base's, the part that reads; this one is made before anything can be read
        super().__init__(io.BytesIO(raw), encoding=self.encoding, errors=self.errors)
        self._uuids: list[uuid.UUID] = []
        found = super().load()
        if any(not hasattr(made, "int") for made in self._uuids):
            raise ValueError("a UUID that was never given its number")
        return found

    def _check_keys(self, target: Any, keys: list[Any]) -> None:
        if len(target) + len(keys) <= _FEW_KEYS or not (found := risky(keys)):
            return
        count_hashes(found, self._hashes.setdefault(id(target), Counter()))

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return self.rules.names[module, name]
        except KeyError:
            if (found := _stdlib_enum(module, name)) is not None:
                return found
            if (module, name) in _NESTED:
                return getattr(importlib.import_module(module), name)
            raise UntrustedGlobal(f"{module}.{name}", allowable=True) from None

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.rules.check_call(klass, tuple(args))
        super()._instantiate(klass, args)

    def _note(self) -> None:
        """Of what leaves may hold, a UUID alone is made empty, and filled by BUILD: or not."""
        if type(self.stack[-1]) is uuid.UUID:
            self._uuids.append(self.stack[-1])

    def load_reduce(self) -> None:
        self.rules.check_call(self.stack[-2], self.stack[-1])
        super().load_reduce()
        self._note()

    def load_newobj(self) -> None:
        self.rules.check_call(self.stack[-2], self.stack[-1])
        super().load_newobj()
        self._note()

    def load_newobj_ex(self) -> None:
        self.rules.check_call(*self.stack[-3:])
        super().load_newobj_ex()
        self._note()

    def load_build(self) -> None:
        self.rules.check_build(self.stack[-2], self.stack[-1])
        super().load_build()

    def load_setitem(self) -> None:
        self.rules.check_filled(self.stack[-3], _MAPPINGS)
        if isinstance(self.stack[-3], dict):
            self._check_keys(self.stack[-3], self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        target = self.metastack[-1][-1]
        self.rules.check_filled(target, _MAPPINGS)
        if isinstance(target, dict):
            self._check_keys(target, self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        check_hashes(self.stack[::2])
        super().load_dict()

    def load_append(self) -> None:
        self.rules.check_filled(self.stack[-2], _LISTS)
        super().load_append()

    def load_appends(self) -> None:
        self.rules.check_filled(self.metastack[-1][-1], _LISTS)
        super().load_appends()

    def load_additems(self) -> None:
        target = self.metastack[-1][-1]
        self.rules.check_filled(target, (set,))
        if isinstance(target, set):
            self._check_keys(target, self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        check_hashes(self.stack)
        super().load_frozenset()

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.DICT[0]: load_dict,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_additems,
    }


def _users_safe_globals(items: Iterable[Any]) -> dict[tuple[str, str], Any]:
    """What the user told ``torch.serialization.add_safe_globals``. Torch's own entries there are left out:
    some do more than hold values."""
    names: dict[tuple[str, str], Any] = {}
    for item in items:
        value, full = item if isinstance(item, tuple) else (item, f"{item.__module__}.{item.__qualname__}")
        module, _, name = full.rpartition(".")
        if module.partition(".")[0] != "torch":
            names[module, name] = value
    return names


def _pickle_module(trust: Trust) -> types.SimpleNamespace:
    """What ``torch.load(pickle_module=...)`` takes: torch handles storages, this decides on every other
    global."""
    return _made_pickle_module(trust, tuple(torch.serialization.get_safe_globals()))


@lru_cache(maxsize=8)
def _made_pickle_module(trust: Trust, users: tuple[Any, ...]) -> types.SimpleNamespace:
    unpickler = type("LeafUnpickler", (_LeafUnpickler,), {"rules": _Rules(trust, _users_safe_globals(users))})

    def load(file: IO[bytes], **options: Any) -> Any:
        return unpickler(file, **options).load()

    return types.SimpleNamespace(__name__="dcp_async.trust", Unpickler=unpickler, load=load)


def check_globals(head: bytes, pickle_at: int | None, trust: Trust) -> None:
    """Whether ``load_item`` would accept the globals of an item, from its first bytes and without its data.

    Args: ``pickle_at`` where the pickle of a zip begins; None for an item in torch's legacy format.
    Raises: UntrustedGlobal; ValueError if ``head`` does not hold the whole pickle, or a damaged one.
    """
    if trust.unsafe:
        return
    try:
        found = outlines(head) if pickle_at is None else [check_pickle(head, pickle_at)]
        check_outlines(found, trust)
    except UntrustedGlobal:
        raise
    except Exception as error:  # a module that is imported for a name may raise anything
        raise ValueError(f"not a readable pickle: {error}") from error


def check_outlines(found: Iterable[Outline], trust: Trust) -> None:
    """Raises UntrustedGlobal for the first global that ``trust`` does not admit."""
    resolve = _resolver(trust)
    for outline in found:
        for module, name in outline.names:
            resolve(module, name)


@lru_cache(maxsize=1)
def _storage_names() -> frozenset[str]:
    return frozenset(
        full.rpartition(".")[2]
        for full, value in _get_allowed_globals().items()
        if isinstance(value, torch.serialization.StorageType)
    )


def _resolver(trust: Trust) -> Callable[[str, str], object]:
    """Finds a global as ``torch.load`` does under ``trust``, or raises UntrustedGlobal."""
    find: Callable[[str, str], object] = _pickle_module(trust).Unpickler(io.BytesIO()).find_class
    storages = _storage_names()

    def resolve(module: str, name: str) -> object:
        if name in storages:  # torch.load resolves these itself, whatever their module is called
            return None
        return find("torch._tensor" if module == "torch.tensor" else module, name)

    return resolve


def untrusted_names(names: Iterable[tuple[str, str]], trust: Trust) -> list[str]:
    """Those of the globals (module, name) that ``trust`` does not admit, by their full names."""
    resolve = _resolver(trust)
    found = []
    for module, name in names:
        try:
            resolve(module, name)
        except UntrustedGlobal as error:
            found.append(error.name)
    return found


class _LegacyNames:
    """Finds typed storages as ``torch.load`` does."""

    def find_class(self, module: str, name: str, /) -> Any:
        return storage_type(name) or super().find_class(module, name)  # type: ignore[misc]  # of the next class


def is_zip(head: bytes | bytearray) -> bool:
    """Whether an item that begins so is a zip, as ``torch.save`` has written it since torch 1.6."""
    return head.startswith(b"PK\3\4")


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
                unpickler = _pickle_module(trust).Unpickler
                return load_legacy(item.read(), type("LegacyUnpickler", (_LegacyNames, unpickler), {}))
            _refuse_torchscript(item)
        module = pickle if trust.unsafe else _pickle_module(trust)
        options: dict[str, Any] = {"weights_only": False, "pickle_module": module, "mmap": False}
        return torch.load(item, map_location="cpu", **options)
    except (UntrustedGlobal, MemoryError, NameError):  # no damage of the item's
        raise
    except Exception as error:  # torch and pickle raise nearly anything on damaged input
        raise ValueError(f"not a readable item: {error}") from error
