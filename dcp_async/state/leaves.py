"""Leaves as items of their own, and only such as a load takes back.

Enters: picklable values, and the Trust that a load of this engine has. Leaves: bytes, or CaptureError that
names the leaf and says what would allow it. Invariant: what was pickled here is admitted by the very check
that a load makes. That check unpickles, so it is made once for each form of a leaf, by the classes and
functions that its pickle names in their order; what a load refuses by values is looked for in each pickle
that is new (leaf_values.py).
"""

from __future__ import annotations

import _compat_pickle
import hashlib
import io
import pickle
import pickletools
import sys
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, TypeVar

import torch

from .._foreign import ENDINGS, user_code, words
from ..formats import object_item, plain_key
from ..trust import Trust, UntrustedGlobal, load_item, load_pickle, untrusted_names
from .containers import PLAIN_TENSORS, CaptureError
from .depth import MAX_DEPTH
from .leaf_storages import DeviceLeaves, Fetch
from .leaf_values import is_all_numbers, must_be_unpickled
from .tensor_memory import has_memory
from .wrapped import is_wrapper

T = TypeVar("T")

_SCALARS = (int, float, str, bool, bytes, type(None))
_THEMSELVES: tuple[type, ...] = (type, types.FunctionType, types.BuiltinFunctionType)
"""What a pickle names; of other objects it names the class."""
_POWERFUL = frozenset({"builtins", "importlib", "nt", "os", "posix", "subprocess", "sys"})
"""Modules whose functions do anything for whoever may call them."""
_NUMBERS = "biufc"
"""Kinds of numpy's dtypes that are nothing else."""
_GLANCE = 32
_LONG = 256
"""A leaf of more objects is known by the set of what it names alone."""
_MAX_KNOWN = 10_000


class LeafRules:
    """What a load under ``trust`` admits; remembers what was found out, and may be shared by threads."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._forms: set[tuple[Any, ...]] = {()}  # of a leaf that names nothing
        self._admitted: set[bytes] = set()
        """Digests of pickles."""
        self._keys: set[bytes] = set()

    def check_leaf(self, name: str, value: object, item: bytes, made: _Pickled) -> None:
        """Raises CaptureError for a leaf that a load would refuse; ``made`` is what its ``item`` holds."""
        # vars(): a tensor's attributes are pickled with it, and may be of any class
        if self._trust.unsafe or (type(value) in PLAIN_TENSORS and not vars(value)) or is_all_numbers(value):
            return
        # no hash(): of two pickles that meet in it the second would pass unchecked
        digest = hashlib.blake2b(made.pickled, digest_size=16).digest()
        if digest in self._admitted:
            return
        try:
            by_value = must_be_unpickled(made.pickled)
        except ValueError as error:
            raise _value_error(name, value, error) from error
        named = made.named
        # of a long leaf only what it names: a list that grows would have a new form in each save
        form = tuple(named if len(named) <= _LONG else dict.fromkeys(named))
        if by_value or form not in self._forms:
            self._load(name, value, item, made.pickled)
        _remember(self._forms, form)
        _remember(self._admitted, digest)

    def _load(self, name: str, value: object, item: bytes, pickled: bytes) -> None:
        try:
            load_item(io.BytesIO(item), self._trust)
        except UntrustedGlobal as error:
            raise self._refusal(f"{name}: a {type(value).__qualname__}", pickled, error) from error
        except (ValueError, NameError) as error:
            raise _value_error(name, value, error) from error

    def check_key(self, below: str, key: object, raw: bytes) -> None:
        """Raises CaptureError for a mapping's key, of that pickle, that a load would refuse. One that extends
        text or a number comes back as that, so it is never refused."""
        if self._trust.unsafe or raw in self._keys or plain_key(key) is not None:
            return
        try:
            load_pickle(raw, self._trust)
        except UntrustedGlobal as error:
            raise self._refusal(f"{below}: its key, a {type(key).__qualname__},", raw, error) from error
        except ValueError as error:
            raise CaptureError(
                f"{below}: its key, a {type(key).__qualname__}, can be pickled, but not unpickled again "
                f"({error}); use a str or an int"
            ) from error
        _remember(self._keys, raw)

    def _refusal(self, what: str, pickled: bytes, error: UntrustedGlobal) -> CaptureError:
        names = untrusted_names(_globals_of(pickled), self._trust) if error.allowable else []
        # with one of these on the list, a checkpoint could run anything
        powerful = [name for name in names if name.partition(".")[0] in _POWERFUL]
        if powerful or not names:
            return CaptureError(
                f"{what} could not be loaded again: it names {(powerful or [error.name])[0]}, which no list "
                "should admit. Save plain data in its place, or trust whoever can write to the checkpoint "
                "with Trust(unsafe=True)"
            )
        listed = ", ".join(name.removeprefix("__main__.") for name in names)
        return CaptureError(
            f"{what} could not be loaded again: it names {', '.join(names)}, which this engine's trust does "
            f"not admit. Pass trust=Trust(safe_globals=({listed},)) to the engine that saves and to the one "
            "that loads, or save plain data in its place, such as vars() of it or its state_dict()"
        )


def _value_error(name: str, value: object, error: Exception) -> CaptureError:
    return CaptureError(
        f"{name}: a {type(value).__qualname__} can be pickled, but not unpickled again ({error}); "
        "leave it out of the state or give it a state_dict()"
    )


def _remember(known: set[T], new: T) -> None:
    # a leaf that differs in each save would be remembered once for each of them
    if len(known) >= _MAX_KNOWN:
        known.clear()
    known.add(new)


def _globals_of(pickled: bytes) -> list[tuple[str, str]]:
    """(module, name) of what a pickle of protocol 2 names, by today's names, each once."""
    names: dict[tuple[str, str], None] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            names[_compat_pickle.IMPORT_MAPPING.get(module, module), name] = None
    return list(names)


@cache
def _values() -> frozenset[type]:
    """Classes of values that every load admits, whatever they hold."""
    classes: set[type] = {*_SCALARS, complex, torch.Size, torch.dtype, torch.device}
    # not imported for this: who holds a value of numpy's has done so
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        classes.update(kind for kind in numpy.sctypeDict.values() if issubclass(kind, numpy.number))
        classes.update((numpy.bool_, numpy.str_))
    return frozenset(classes)


def _is_admitted(value: Any) -> bool:
    """Whether it can be seen at a glance that every load admits ``value``, as of most leaves."""
    if type(value) in _values():
        return True
    left = [value]  # parts that are met again count again: what is small may be large to whoever goes over it
    for met in left:
        kind = type(met)
        if kind is tuple or kind is list:
            if len(left) + len(met) > _GLANCE:
                return False
            left += met
        elif not (kind in _values() or (_is_array(kind) and met.dtype.kind in _NUMBERS)):
            return False
    return True


def _is_array(kind: type) -> bool:
    return kind.__module__ == "numpy" and kind.__name__ == "ndarray"


@dataclass(slots=True)
class _Pickled:
    """What the last pickle names, and its bytes, which lie in an item among those of tensors."""

    named: list[Any] = field(default_factory=list)
    pickled: bytes = b""


class _Recorder(pickle.Pickler):
    """Notes every class and function that the pickle will name, and the pickle."""

    made: _Pickled
    devices: DeviceLeaves

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self._file = file

    def reducer_override(self, value: Any, /) -> Any:
        self.made.named.append(value if isinstance(value, _THEMSELVES) else _kind(value))
        return self.devices.reduced(value) if isinstance(value, torch.Tensor) else NotImplemented

    def dump(self, value: Any, /) -> None:
        super().dump(value)
        self.made.pickled = self._file.getvalue()


def _kind(value: object) -> Any:
    """What decides on how an object is pickled: its class, and of numpy's dtypes what they say."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        _check_tensor(value)
    return repr(value) if kind.__module__ == "numpy.dtypes" else kind


def _check_tensor(tensor: torch.Tensor) -> None:
    """What lies outside of its memory would be missing in the pickle."""
    plain = type(tensor) in PLAIN_TENSORS and tensor.layout is torch.strided
    if plain and not tensor.is_nested and not tensor.is_meta and not has_memory([tensor]):
        raise ValueError("its storage was freed or made smaller than the tensor")


class LeafPickler:
    """Pickles the leaves of one state."""

    def __init__(self, rules: LeafRules | None, fetch: Fetch | None = None) -> None:
        """
        Args:
            rules: what refuses; None for no check.
            fetch: brings to the host what lies on devices; None where none is in use.
        """
        self._rules = rules
        self._made = _Pickled()
        self._devices = DeviceLeaves(fetch)

    @cached_property
    def _module(self) -> types.SimpleNamespace:
        recorder = type("Recorder", (_Recorder,), {"made": self._made, "devices": self._devices})
        return types.SimpleNamespace(__name__="dcp_async.leaves", Pickler=recorder)

    def items(self, names: Iterable[str], values: Sequence[Any]) -> list[bytes]:
        """The bytes of the items of leaves. Raises as ``item``, and what a device does."""
        self._devices.fetch(values)
        return list(map(self.item, names, values))

    def item(self, name: str, value: Any) -> bytes:
        """The bytes of a leaf's item, not padded. Raises CaptureError that names it."""
        self._made.named.clear()
        try:
            if type(value) in _SCALARS:
                # by hand: torch.save sets up a zip writer each time, and a state may hold many numbers
                return object_item(pickle.dumps(value, protocol=2))
            stream = io.BytesIO()
            # without the recorder, which costs a call for each object in a leaf
            if _is_admitted(value):
                torch.save(value, stream)
                return stream.getvalue()
            detached = _detached(value) if isinstance(value, torch.Tensor) else value
            with user_code("__reduce__", value, name):
                torch.save(detached, stream, pickle_module=self._module)
            item = stream.getvalue()
        except RecursionError as error:
            raise CaptureError(
                f"{name}: a {type(value).__qualname__} in which objects lie in one another too deep to be "
                f"pickled; flatten it, or use containers, which may be {MAX_DEPTH} deep"
            ) from error
        except ENDINGS:
            raise
        except BaseException as error:  # pickling runs the leaf's own code, which may raise anything
            raise CaptureError(
                f"{name}: a {type(value).__qualname__} can't be pickled ({words(error)}); "
                "leave it out of the state or give it a state_dict()"
            ) from error
        # after pickling, by what was pickled: a __reduce__ may name anything, whatever the class
        if self._rules is not None:
            self._rules.check_leaf(name, detached, item, self._made)
        return item


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    if is_wrapper(tensor):  # whose detach() may lose what it does not hold in tensors
        return tensor
    detached = tensor.detach()
    # a subclass without __torch_function__ would come out as a plain tensor
    return detached if type(detached) is type(tensor) else tensor
