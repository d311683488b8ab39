"""Whether leaves of several ranks are equal, also where their pickles are not.

Enters: a leaf. Leaves: a digest that equal values share in every process, and the places at which two differ.
Invariant: what a pickle depends on and a value does not is left out: hash seeds, the identity of equal
objects, the order of a dict's keys and of a set, an array's order in memory and the gaps between its fields,
at which object of a circle one begins. What a value does depend on is kept: types, the bits of floats, an
OrderedDict's order, the elements of arrays and tensors.
Source: Lib/copyreg.py and the pickle protocol, by which objects tell what they consist of.
"""

from __future__ import annotations

import copyreg
import ctypes
import pathlib
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch
import xxhash

from ..state import PLAIN_TENSORS

_T = TypeVar("_T")
_PATHS = (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.WindowsPath, pathlib.PureWindowsPath)
# not 5, in which an array of numpy's reduces to a view of its memory
_PROTOCOL = 4
_NOWHERE = sys.maxsize
_X87_MANTISSA, _X87_BYTES = 63, 10
"""A ``longdouble`` on x86: what is behind these bytes is padding."""
# a level takes two or three of the 1000 frames that Python allows by default; RecursionError covers the rest
_DEPTH = 400
_IN_CIRCLES = 20_000
"""How many objects of circles are looked at, as often as each is reached; if more, each is once."""
_SHORT = 60
"""Characters of a value in a message."""
_PLACES = 20_000
"""How many places of a leaf are told apart; behind them only whole containers are."""


class UndecidableError(ValueError):
    """A value does not tell what it consists of."""


def digest(value: object) -> int:
    """A hash that equal values have in common. Raises UndecidableError."""
    try:
        return xxhash.xxh3_64_intdigest(_encoded(lambda encoder: encoder.encode(value)))
    except RecursionError as error:
        raise UndecidableError("it goes too deep") from error


Places = dict[str, tuple[bytes, str]]
"""Path inside a value -> (digest, a few words) of what lies there. Plain data: it travels."""
_NOTHING = (b"", "nothing")


def places(value: object) -> Places:
    """Path inside ``value`` -> (digest, a few words) of what lies there; deeper ones after what they are in.
    Raises UndecidableError."""

    def describe(encoder: _Encoder) -> Places:
        places: Places = {}
        _describe(value, "", places, encoder, 0)
        return places

    try:
        return _encoded(describe)
    except RecursionError as error:
        raise UndecidableError("it goes too deep") from error


def first_difference(left: Places, right: Places) -> tuple[str, str, str]:
    """(path, words there, words here) of the innermost of the first places that differ. Both are ``places``
    of some value, a container before what lies in it."""
    differing = None
    for path, (mine, _) in left.items():
        if right.get(path, (b"",))[0] != mine:
            if differing is not None and not path.startswith(differing):
                break
            differing = path
    inside = differing or ""
    if inside in left and inside in right:  # perhaps it only holds more there
        inside = next((path for path in right if path.startswith(inside) and path not in left), inside)
    return inside, left.get(inside, _NOTHING)[1], right.get(inside, _NOTHING)[1]


class _TangledError(Exception):
    """Circles lie in one another: there are too many ways through them."""


def _encoded(make: Callable[[_Encoder], _T]) -> _T:
    try:
        return make(_Encoder(_IN_CIRCLES))
    except _TangledError:  # then equal ones of another order may differ
        return make(_Encoder(None))


class _Encoder:
    """Digests, made once for an object that occurs several times. One in a circle has another from each way
    into the circle, so it is made again for each; ``in_circles`` times in all, None to make it once."""

    def __init__(self, in_circles: int | None) -> None:
        self._known: dict[int, tuple[object, bytes]] = {}
        self._above: dict[int, int] = {}
        """Containers that are being encoded -> how deep they lie."""
        self._reached = _NOWHERE
        """The highest of those that the one being encoded leads back to."""
        self._in_circles = in_circles

    def encode(self, value: object) -> bytes:
        cls = type(value)
        # by the exact type: a subclass may hold more than its value
        encode = _ATOMS.get(cls)
        if encode is not None:
            return _hash(cls.__name__.encode(), encode(value))
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        depth = len(self._above)
        if id(value) in self._above:
            self._reached = min(self._reached, self._above[id(value)])
            # how far up, not to which object: ids differ in every process
            return _hash(b"circle", str(depth - self._above[id(value)]).encode())
        if depth > _DEPTH:
            raise UndecidableError("it goes too deep")
        around, self._reached = self._reached, _NOWHERE
        self._above[id(value)] = depth
        try:
            encoded = self._container(value, cls)
        finally:
            del self._above[id(value)]
        # what leads further up has another digest when it is reached from elsewhere
        if self._reached > depth or self._in_circles is None:
            self._known[id(value)] = (value, encoded)  # kept, so that its id is not used again
        else:
            self._in_circles -= 1
            if self._in_circles < 0:
                raise _TangledError
        self._reached = min(around, self._reached if self._reached < depth else _NOWHERE)
        return encoded

    def _container(self, value: Any, cls: type) -> bytes:
        if cls is tuple or cls is list:
            return _hash(cls.__name__.encode(), *map(self.encode, value))
        if cls is dict:
            # by their digests: keys of different types have no order
            return _hash(b"dict", *sorted(map(self._entry, value.items())))
        if cls is set or cls is frozenset:
            return _hash(cls.__name__.encode(), *sorted(map(self.encode, value)))
        if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
            return _hash(b"global", _name(value))
        if isinstance(value, Enum):
            # by its name, since its value may be anything; a flag of no bits has none
            return _hash(b"enum", _name(cls), value.name.encode() if value.name else repr(value).encode())
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        # not imported: where numpy is not, no value is numpy's
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
            return self._array(value, cls, numpy)
        return self._object(value, cls)

    def _entry(self, entry: tuple[object, object]) -> bytes:
        return self.encode(entry[0]) + self.encode(entry[1])

    def _object(self, value: Any, cls: type) -> bytes:
        """A digest of what it would be pickled as."""
        reduced = _reduced(value, cls)
        if isinstance(reduced, str):
            return _hash(b"global", _name(value) if hasattr(value, "__qualname__") else reduced.encode())
        parts_of: list[Any] = [*reduced, None, None, None]
        made, args, state, items, pairs = parts_of[:5]
        if _is_unordered(value, cls) and made is cls and len(args) == 1:
            args = (frozenset(value),)  # it gives a list in the order of this process's hashes
        parts = [b"object", _name(cls), self.encode(made), self.encode(args), self.encode(state)]
        if items is not None:
            parts += [b"items", *map(self.encode, items)]
        if pairs is not None:
            entries: Iterable[bytes] = map(self._entry, pairs)
            parts += [b"pairs", *(entries if isinstance(value, OrderedDict) else sorted(entries))]
        return _hash(*parts)

    def _tensor(self, tensor: torch.Tensor) -> bytes:
        tensor = tensor.detach()
        head = (
            f"{tensor.dtype} {tensor.layout} {tuple(tensor.shape) if not tensor.is_nested else ''}".encode()
        )
        cls = _name(type(tensor))
        if tensor.layout is torch.sparse_coo:
            # the private ones: indices() raises for a tensor that is not coalesced
            parts = [tensor._indices(), tensor._values()]
            return _hash(b"tensor", cls, head, *map(self._tensor, parts))
        is_plain = type(tensor) in PLAIN_TENSORS and tensor.layout is torch.strided
        if is_plain and not tensor.is_quantized and not tensor.is_nested:
            return _hash(b"tensor", cls, head, _bytes_of(tensor))
        return self._object_of_tensor(tensor, cls + head)

    def _object_of_tensor(self, tensor: torch.Tensor, head: bytes) -> bytes:
        if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
        elif tensor.is_nested:
            parts = list(tensor.unbind())
        elif tensor.is_quantized:
            parts = [tensor.int_repr()]
            if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
                head += struct.pack("<dq", tensor.q_scale(), tensor.q_zero_point())
            else:
                parts += [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
        elif hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            parts = [getattr(tensor, name) for name in names]
            head += self.encode(context)
        else:
            raise UndecidableError(f"a {type(tensor).__name__} does not tell what it consists of")
        return _hash(b"tensor", head, *map(self._tensor, parts))

    def _array(self, value: Any, cls: type, numpy: Any) -> bytes:
        if isinstance(value, numpy.generic):
            return _hash(b"array", _name(cls), self._elements(numpy.asarray(value), numpy))
        if _reduces_as(cls, numpy.ndarray):
            return _hash(b"array", _name(cls), self._elements(value.view(numpy.ndarray), numpy))
        masked = sys.modules.get("numpy.ma")
        if masked is not None and _reduces_as(cls, masked.MaskedArray):
            head = [b"masked", _name(cls), _name(value.baseclass), self.encode(value._fill_value)]
            parts = [value.data.view(numpy.ndarray), masked.getmaskarray(value)]
            return _hash(*head, *(self._elements(part, numpy) for part in parts))
        return self._subclass(value, cls, numpy)

    def _elements(self, array: Any, numpy: Any) -> bytes:
        dtype, shape = array.dtype, str(array.shape).encode()
        if dtype.names:  # each by itself: what lies between the fields is nobody's
            head = [b"fields", str(dtype).encode(), shape]
            return _hash(*head, *(self._elements(array[name], numpy) for name in dtype.names))
        if dtype.hasobject:
            # its bytes are addresses, which differ in every process
            return _hash(dtype.str.encode(), shape, *map(self.encode, array.flatten().tolist()))
        raw = array.tobytes()  # row-major, whatever its order in memory
        if dtype.char in "gG" and numpy.finfo(numpy.longdouble).nmant == _X87_MANTISSA:
            size = numpy.dtype(numpy.longdouble).itemsize
            raw = numpy.frombuffer(raw, "u1").reshape(-1, size)[:, :_X87_BYTES].tobytes()
        return _hash(dtype.str.encode(), shape, raw)

    def _subclass(self, value: Any, cls: type, numpy: Any) -> bytes:
        """What an array is that says so itself; most add something to what each array says."""
        reduced = _reduced(value, cls)
        state = reduced[2] if type(reduced) is tuple and len(reduced) > 2 else None
        if value.dtype.hasobject or not isinstance(state, tuple):
            return self._object(value, cls)
        made, args, _, *rest = reduced
        plain = value.view(numpy.ndarray)
        own = plain.__reduce__()[2]
        if state[: len(own)] == own:
            state = (plain, *state[len(own) :])
        else:
            state = tuple(plain if type(part) is tuple and part == own else part for part in state)
        return _hash(
            b"array", _name(cls), self.encode(made), self.encode(args), self.encode(state), self.encode(rest)
        )


def _reduced(value: Any, cls: type) -> Any:
    try:
        reduce = copyreg.dispatch_table.get(cls)
        return reduce(value) if reduce is not None else value.__reduce_ex__(_PROTOCOL)
    except RecursionError:
        raise
    except Exception as error:  # the object's own code, which may raise anything
        raise UndecidableError(f"a {cls.__qualname__} does not tell what it consists of ({error})") from error


def _reduces_as(cls: Any, kind: Any) -> bool:
    """Whether an instance of ``cls`` is pickled as each ``kind`` is."""
    own = (cls.__reduce__, cls.__reduce_ex__) == (kind.__reduce__, kind.__reduce_ex__)
    return own and cls not in copyreg.dispatch_table


def _is_unordered(value: object, cls: Any) -> bool:
    """Whether ``value`` is a set that has no order of its own, and is pickled as each set."""
    kind = next((kind for kind in (set, frozenset) if isinstance(value, kind)), None)
    return kind is not None and _reduces_as(cls, kind) and cls.__iter__ is kind.__iter__


def _bytes_of(tensor: torch.Tensor) -> bytes:
    # a conjugated or negated view shares the bytes of what it is a view of
    plain = tensor.resolve_conj().resolve_neg().contiguous().cpu()
    return ctypes.string_at(plain.data_ptr(), plain.nbytes) if plain.nbytes else b""


def _name(value: Any) -> bytes:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}".encode()


def _hash(*parts: bytes) -> bytes:
    hasher = xxhash.xxh3_128()
    for part in parts:
        # with lengths: else ("ab", "c") and ("a", "bc") would have one digest
        hasher.update(struct.pack("<Q", len(part)))
        hasher.update(part)
    return hasher.digest()


_ATOMS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"",
    bool: lambda value: b"1" if value else b"0",
    int: lambda value: hex(value).encode(),
    float: lambda value: struct.pack("<d", value),
    complex: lambda value: struct.pack("<dd", value.real, value.imag),
    str: lambda value: value.encode("utf-8", "surrogatepass"),
    bytes: lambda value: value,
    bytearray: bytes,
    type(Ellipsis): lambda value: b"",
    type(NotImplemented): lambda value: b"",
    # from CPython 3.13 on a path is pickled as it was put together
    **{cls: lambda value: str(value).encode("utf-8", "surrogatepass") for cls in _PATHS},
}


def _describe(value: Any, path: str, places: Places, encoder: _Encoder, depth: int) -> None:
    places[path] = (encoder.encode(value), _words(value))
    if depth > _DEPTH or len(places) > _PLACES:
        return
    for step, inner in _inside(value):
        if path + step not in places:
            _describe(inner, path + step, places, encoder, depth + 1)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """(how it is reached, what lies there) of what ``value`` holds."""
    cls = type(value)
    if isinstance(value, Mapping):
        yield from ((f"[{_words(key)}]", inner) for key, inner in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", inner) for index, inner in enumerate(value))
    elif cls in (set, frozenset):
        yield from ((f"{{{_words(inner)}}}", inner) for inner in value)
    elif hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, type, Enum)):
        yield from ((f".{name}", inner) for name, inner in vars(value).items())
    elif cls.__module__ != "builtins":
        names = dict.fromkeys(name for base in cls.__mro__ for name in _slots(base) if hasattr(value, name))
        yield from ((f".{name}", getattr(value, name)) for name in names)


def _slots(cls: type) -> list[str]:
    slots = cls.__dict__.get("__slots__", ())
    return [slots] if isinstance(slots, str) else list(slots)


def _words(value: Any) -> str:
    """A few words for an atom, the name of its type for all else: another's ``repr`` may do anything."""
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if type(value) in _ATOMS:
        if type(value) is int and value.bit_length() > 200:
            return "a long int"
        text = repr(value[:_SHORT] if isinstance(value, (str, bytes, bytearray)) else value)
        return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."
    return f"a {type(value).__qualname__}"
