"""Items and keys unpickled under a policy: what it does not admit is neither imported nor called.

Enters: pickled bytes of unknown origin. Leaves: objects made of allowed classes only, or UntrustedGlobal.
Invariant: an unpickler gets only what the grammar of pickle_grammar.py admits, and every call, change and
filling that it makes was asked of the policy first.
"""

from __future__ import annotations

import io
import pickle
import types
import uuid
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import IO, Any, ClassVar

import torch

from .key_hashes import check_hashes, count_hashes, risky
from .legacy_item import load_legacy, outlines, storage_type
from .pickle_grammar import check_pickle
from .pickle_walk import Outline
from .policy import LISTS, MAPPINGS, Rules, Trust
from .torch_rebuilders import UntrustedGlobal


def _ignore(*args: object) -> None:
    """A method that does nothing: of an object, and of its class, which an unpickler may take for one."""


class Inert:
    """Stands for what a pickle would make: takes every call that an unpickler makes, and does nothing."""

    def __new__(cls, *args: object, **options: object) -> Inert:
        return object.__new__(cls)

    def __call__(self, *args: object, **options: object) -> Inert:
        return self

    __init__ = __setstate__ = __setitem__ = append = extend = add = update = _ignore


# The Python one, because its opcodes can be overridden; typeshed knows it only in part.
_PythonUnpickler: Any = pickle._Unpickler

_FEW_KEYS = 256
"""Containers of so few keys are not watched."""


class LeafUnpickler(_PythonUnpickler):  # type: ignore[misc]  # typeshed knows its base only in part
    """Finds allowed globals only, and calls and changes what its rules say."""

    rules: ClassVar[Rules]
    _hashes: dict[int, Counter[int]]
    """How many keys have each hash, per container of many keys."""
    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: IO[bytes], **options: Any) -> None:
        self._whole = file
        super().__init__(file, **options)

    def load(self) -> Any:
        raw = self._whole.read()
        # before an opcode runs: overrides can refuse a call, but not how much it is asked to make
        check_pickle(raw)
        self._hashes = {}
        # of the base's, the part that reads; this one is made before anything can be read
        super().__init__(io.BytesIO(raw), encoding=self.encoding, errors=self.errors)
        self._uuids: list[uuid.UUID] = []
        value = super().load()
        if any(not hasattr(made, "int") for made in self._uuids):
            raise ValueError("a UUID that was never given its number")
        return value

    def _check_keys(self, target: Any, keys: list[Any]) -> None:
        # a few keys are compared in no time, whatever their hashes
        if len(target) + len(keys) <= _FEW_KEYS or not (unseeded := risky(keys)):
            return
        count_hashes(unseeded, self._hashes.setdefault(id(target), Counter()))

    def find_class(self, module: str, name: str, /) -> Any:
        return self.rules.find(module, name)

    def _instantiate(self, klass: Any, args: Any) -> None:
        # INST and OBJ of the old protocols come here, and do not call REDUCE
        self.rules.check_call(klass, tuple(args))
        super()._instantiate(klass, args)

    def _note(self) -> None:
        """Keep a UUID in mind: no other value of a leaf is made empty, and filled by BUILD, or not."""
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
        self.rules.check_filled(self.stack[-3], MAPPINGS)
        if isinstance(self.stack[-3], dict):
            self._check_keys(self.stack[-3], self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        target = self.metastack[-1][-1]
        self.rules.check_filled(target, MAPPINGS)
        if isinstance(target, dict):
            self._check_keys(target, self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        # made at once of what is on the stack: there is no container yet to count for
        check_hashes(self.stack[::2])
        super().load_dict()

    def load_append(self) -> None:
        self.rules.check_filled(self.stack[-2], LISTS)
        super().load_append()

    def load_appends(self) -> None:
        self.rules.check_filled(self.metastack[-1][-1], LISTS)
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


def rules_of(trust: Trust) -> Rules:
    """What ``trust`` admits, with what the user has told torch by now."""
    return _made_rules(trust, tuple(torch.serialization.get_safe_globals()))


@lru_cache(maxsize=8)
def _made_rules(trust: Trust, added: tuple[Any, ...]) -> Rules:
    return Rules(trust, added)


@lru_cache(maxsize=8)
def _pickle_module(rules: Rules) -> types.SimpleNamespace:
    """What ``torch.load(pickle_module=...)`` takes: torch handles storages, this decides on every other
    global."""
    unpickler = type("LeafUnpickler", (LeafUnpickler,), {"rules": rules})

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
        named = outlines(head) if pickle_at is None else [check_pickle(head, pickle_at)]
        _check_outlines(named, rules_of(trust))
    except UntrustedGlobal:
        raise
    except Exception as error:  # a module that is imported for a name may raise anything
        raise ValueError(f"not a readable pickle: {error}") from error


def _check_outlines(outlines: Iterable[Outline], rules: Rules) -> None:
    """Raises UntrustedGlobal for the first global that ``rules`` do not admit."""
    for outline in outlines:
        for module, name in outline.names:
            rules.resolve(module, name)


def untrusted_names(names: Iterable[tuple[str, str]], trust: Trust) -> list[str]:
    """Those of the globals (module, name) that ``trust`` does not admit, by their full names."""
    rules = rules_of(trust)
    refused = []
    for module, name in names:
        try:
            rules.resolve(module, name)
        except UntrustedGlobal as error:
            refused.append(error.name)
    return refused


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
    # torch.load would pass it to torch.jit.load, whatever unpickler it was given
    records = set(torch._C.PyTorchFileReader(item).get_all_records())
    item.seek(start)
    if "constants.pkl" in records or any(record.startswith("code/") for record in records):
        raise UntrustedGlobal("a TorchScript archive")


def load_pickle(raw: bytes, trust: Trust) -> Any:
    """The object of a plain pickle. Raises: UntrustedGlobal; ValueError if it is damaged."""
    module: Any = pickle if trust.unsafe else _pickle_module(rules_of(trust))
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
            head = item.read(4)  # as torch.load does, to tell its two formats apart
            item.seek(start)
            if not is_zip(head):
                unpickler = _pickle_module(rules_of(trust)).Unpickler
                return load_legacy(item.read(), type("LegacyUnpickler", (_LegacyNames, unpickler), {}))
            _refuse_torchscript(item)
        module = pickle if trust.unsafe else _pickle_module(rules_of(trust))
        options: dict[str, Any] = {"weights_only": False, "pickle_module": module, "mmap": False}
        return torch.load(item, map_location="cpu", **options)
    except (UntrustedGlobal, MemoryError, NameError):  # no damage of the item's
        raise
    except Exception as error:  # torch and pickle raise nearly anything on damaged input
        raise ValueError(f"not a readable item: {error}") from error
