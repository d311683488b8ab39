"""The object of a ``torch.save`` file, made before the bytes of its tensors are read.

Enters: its pickle, and memory for each storage that it names: on the meta device where the bytes are not
there yet. Leaves: the object, with tensors on that memory, and the keys of the storages without which it
could not be made. Invariant: nothing is called with memory that is not there, but for what makes a plain
tensor.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .legacy_item import storage_type
from .policy import Rules, Trust
from .torch_rebuilders import UntrustedGlobal
from .unpickler import Inert, LeafUnpickler, rules_of

_PLAIN_NAMES = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
_PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_LOOKS_PER_BYTE = 64
"""How many values may be looked at for each byte of a pickle: one that passes a long list to many calls would
otherwise take as long as it likes."""

Memory = Callable[[str, int], torch.UntypedStorage]
"""Gives the storage of a key and a length, the same one each time. Raises ValueError for one that is none."""


@dataclass(frozen=True, slots=True)
class Archived:
    """What a file holds, as far as it could be made."""

    value: Any
    """Not to be used if anything is wanted."""
    wanted: frozenset[str]
    """Storages whose bytes are needed to make it: of tensors that are more than bytes, or of objects."""


def load_archived(pickled: bytes, trust: Trust, memory: Memory) -> Archived:
    """The object of ``data.pkl``. Raises: UntrustedGlobal; ValueError if it is damaged."""
    absent = _Absent(_LOOKS_PER_BYTE * len(pickled))

    def persistent_load(pid: object) -> Any:
        key, kind, nbytes = _storage_named(pid)
        storage = memory(key, nbytes)
        if storage.device.type == "meta":
            absent.keys[storage._cdata] = key
        typed: Any = torch.storage.TypedStorage
        return typed(wrap_storage=storage, dtype=kind, _internal=True)

    base: Any = LeafUnpickler
    if trust.unsafe:
        base, plain = pickle._Unpickler, _Plain(lambda module, name: getattr(sys.modules[module], name))
    else:
        rules = rules_of(trust)
        base, plain = type("ArchiveUnpickler", (base,), {"rules": _ButInert(rules)}), _Plain(rules.find)
    try:
        # torch.load's encoding, for text that Python 2 pickled
        reader = _deferring(base, absent, plain)(io.BytesIO(pickled), encoding="utf-8")
        reader.persistent_load = persistent_load
        value = reader.load()
    except (UntrustedGlobal, MemoryError, NameError, ValueError):
        raise
    except Exception as error:  # torch and pickle raise nearly anything on damaged input
        raise ValueError(f"not a readable pickle: {error}") from error
    return Archived(value, frozenset(absent.wanted))


def _storage_named(pid: object) -> tuple[str, torch.dtype, int]:
    """(key, dtype, number of bytes) of a storage that a pickle refers to. Raises ValueError."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
        raise ValueError("it refers to something that is no storage")
    _, kind, key, _, numel, *views = pid
    if any(view is not None for view in views):  # only of the format before 1.6, and not for long
        raise ValueError("it refers to a part of a storage")
    if kind is torch.UntypedStorage:
        dtype = torch.uint8
    elif isinstance(kind, torch.serialization.StorageType):
        dtype = kind.dtype
    else:
        raise ValueError("it refers to a storage of no type")
    if type(key) is not str or type(numel) is not int or numel < 0:
        raise ValueError("it refers to a storage of no length")
    return key, dtype, numel * dtype.itemsize


class _Absent:
    """Which storages are not there, and who has asked for them."""

    def __init__(self, looks: int) -> None:
        self.keys: dict[int, str] = {}
        """Storages on the meta device, by where torch has them."""
        self.wanted: set[str] = set()
        self._looks = looks

    def in_any(self, *values: Any) -> bool:
        """Whether ``values``, or what lies in them, need bytes that are not there; these are wanted then."""
        stack = list(values)
        seen: set[int] = set()
        is_absent = False
        while stack:
            value = stack.pop()
            self._looks -= 1
            if self._looks < 0:
                raise ValueError("its parts refer to each other more often than those of any state")
            # made of nothing before; the search goes on, so that one pass finds all that is wanted
            if type(value) is Inert:
                is_absent = True
            elif isinstance(value, (torch.Tensor, torch.storage.TypedStorage, torch.UntypedStorage)):
                if (key := self.keys.get(_place(value))) is not None:
                    self.wanted.add(key)
                    is_absent = True
            elif isinstance(value, (dict, list, tuple, set, frozenset, deque)) and id(value) not in seen:
                seen.add(id(value))
                stack.extend(value)
                if isinstance(value, dict):
                    stack.extend(value.values())
        return is_absent


def _place(value: Any) -> int:
    """Where torch has the storage of ``value``; 0 if it has none."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta or value.layout is not torch.strided:
            return 0
        return int(value.untyped_storage()._cdata)
    return int(getattr(value, "_untyped_storage", value)._cdata)


class _Plain:
    """The functions that make plain tensors."""

    def __init__(self, find: Callable[[str, str], Any]) -> None:
        self._functions = {id(find("torch._utils", name)) for name in _PLAIN_NAMES}
        self._from_type = find("torch._tensor", "_rebuild_from_type_v2")

    def parts(self, function: Any, args: Any) -> Any:
        """What may be no memory that is not there, of a call that is one of theirs; None if it is not."""
        # whoever makes the call refuses it; here it must only not fail
        if type(args) is not tuple:
            return args
        if id(function) in self._functions:
            return [arg for arg in args if type(arg) is Inert]
        # of a class, or with attributes of its own
        if function == self._from_type and len(args) == 4 and args[1] in _PLAIN_CLASSES:
            inner = self.parts(args[0], args[2])
            return None if inner is None else [inner, args[3]]
        return None


class _ButInert:
    """Rules that have nothing against filling what stands for another thing."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.find, self.check_call, self.check_build = rules.find, rules.check_call, rules.check_build

    def check_filled(self, target: Any, kinds: tuple[type, ...]) -> None:
        if type(target) is not Inert:
            self._rules.check_filled(target, kinds)


def _deferring(base: Any, absent: _Absent, plain: _Plain) -> Any:
    """``base`` that makes Inert things of what it lacks the bytes for."""

    def lacks(function: Any, args: Any, *options: Any) -> bool:
        parts = plain.parts(function, args)
        return absent.in_any(function, *((args, *options) if parts is None else (parts, *options)))

    class Deferring(base):  # type: ignore[misc]  # known when it runs
        def find_class(self, module: str, name: str, /) -> Any:
            # as torch.load does, which looks storages up itself
            known = storage_type(name)
            return known or super().find_class("torch._tensor" if module == "torch.tensor" else module, name)

        def _instantiate(self, klass: Any, args: Any) -> None:
            if lacks(klass, tuple(args)):
                self.append(Inert())
            else:
                super()._instantiate(klass, args)

        def load_reduce(self) -> None:
            self._called(2, base.load_reduce)

        def load_newobj(self) -> None:
            self._called(2, base.load_newobj)

        def load_newobj_ex(self) -> None:
            self._called(3, base.load_newobj_ex)

        def _called(self, operands: int, call: Any) -> None:
            if lacks(*self.stack[-operands:]):
                self.stack[-operands:] = [Inert()]
            else:
                call(self)

        def load_build(self) -> None:
            # a state of the user's class may be looked at by its own code
            if type(self.stack[-2]) is Inert or absent.in_any(self.stack[-1]):
                self.stack.pop()
            else:
                base.load_build(self)

        dispatch = base.dispatch | {
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_newobj,
            pickle.NEWOBJ_EX[0]: load_newobj_ex,
            pickle.BUILD[0]: load_build,
        }

    return Deferring
