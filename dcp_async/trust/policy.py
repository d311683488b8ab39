"""Which globals a pickle may name, and what it may do with them: an allow-list, and `Trust` that widens it.

Enters: globals by module and name, and calls and changes that a pickle asks for. Leaves: nothing, or
UntrustedGlobal that names what is refused. Nothing is imported that is not on the list.
"""

from __future__ import annotations

import _compat_pickle
import enum
import importlib
import io
import pathlib
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch._weights_only_unpickler import _get_allowed_globals

from .numpy_rebuilders import check_numpy_state, numpy_globals
from .torch_rebuilders import NAMED, VALUES, TensorRebuilders, UntrustedGlobal, encode


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


@lru_cache(maxsize=1)
def _storage_names() -> frozenset[str]:
    return frozenset(
        full.rpartition(".")[2]
        for full, value in _get_allowed_globals().items()
        if isinstance(value, torch.serialization.StorageType)
    )


# Enums are values; these modules do nothing when they are imported.
_ENUM_MODULES = frozenset({"calendar", "http", "inspect", "re", "signal", "socket", "ssl", "uuid"})


def _stdlib_enum(module: str, name: str) -> type[enum.Enum] | None:
    if module not in _ENUM_MODULES:
        return None
    value = getattr(importlib.import_module(module), name, None)
    return value if isinstance(value, type) and issubclass(value, enum.Enum) else None


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


class Rules:
    """What leaves may name, and what of it they may call or change.

    Naming is harmless, so a class that is a value itself (``torch.Tensor``, ``numpy.ndarray``, ``float``) may
    be named and no more. Only what is known to be harmless with these arguments is called, and the user's.
    """

    def __init__(self, trust: Trust, added: Iterable[Any] = ()) -> None:
        """``added``: what the user told ``torch.serialization.add_safe_globals``, as torch lists it."""
        self._users = _qualified(trust.safe_globals) | _users_safe_globals(added)
        # by identity: no __eq__ of the user's decides on it
        self._trusted = {id(item) for item in self._users.values()}
        numpy_names, numpy_calls = numpy_globals()
        rebuilders = TensorRebuilders(self.is_trusted)
        reconstruct = {(module, "_reconstructor"): self._reconstruct for module in ("copyreg", "copy_reg")}
        self._names: dict[tuple[str, str], Any] = (
            _named() | numpy_names | rebuilders.names | reconstruct | self._users
        )
        checked = (*rebuilders.names.values(), *reconstruct.values(), encode, torch.serialization._get_layout)
        self._free = {id(function) for function in (*checked, *numpy_calls)} | self._trusted

    def find(self, module: str, name: str) -> Any:
        """The global of that name. Raises UntrustedGlobal."""
        try:
            return self._names[module, name]
        except KeyError:
            if (value := _stdlib_enum(module, name)) is not None:
                return value
            if (module, name) in _NESTED:
                return getattr(importlib.import_module(module), name)
            raise UntrustedGlobal(f"{module}.{name}", allowable=True) from None

    def resolve(self, module: str, name: str) -> None:
        """Find a global as ``torch.load`` does, which looks typed storages up itself whatever their module.

        Raises: UntrustedGlobal.
        """
        if name not in _storage_names():
            self.find("torch._tensor" if module == "torch.tensor" else module, name)

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
            # BUILD gives these to setattr() one by one
            and "__class__" in state[1]
        ):
            raise UntrustedGlobal(f"{name} (to change its class)")

    def check_filled(self, target: Any, kinds: tuple[type, ...]) -> None:
        """Raises UntrustedGlobal."""
        if type(target) not in kinds and not self.is_trusted(type(target)):
            raise UntrustedGlobal(f"{type(target).__qualname__} (to fill it)")

    def _reconstruct(self, cls: Any, base: Any, state: Any) -> object:
        """What copyreg rebuilds by: of ``object.__reduce__``, and of protocols before 2."""
        if not self.is_trusted(cls) and not (base is object and cls in VALUES):
            raise UntrustedGlobal(f"{cls.__qualname__} (to call it so)")
        if base is object:
            return object.__new__(cls)
        if base not in (*NAMED, set, frozenset, bytes, complex):
            raise UntrustedGlobal(f"{base.__qualname__} (to call it so)")
        made = base.__new__(cls, state)
        # a list, a dict and a set take what they hold only here, as copyreg has it
        if base.__init__ != object.__init__:
            base.__init__(made, state)
        return made


MAPPINGS = (dict, OrderedDict, Counter, defaultdict)
LISTS = (list, deque)
_CHANGEABLE = (
    *MAPPINGS[1:],
    *LISTS[1:],
    types.SimpleNamespace,
    io.BytesIO,
    uuid.UUID,
    set,
    frozenset,
    bytearray,
)
