"""What a pickle may call, and with which arguments.

Enters: arguments that a pickle of unknown origin chose. Leaves: values; or UntrustedGlobal for what would
reach foreign memory. Naming a class is harmless, calling it need not be: the constructors of numpy's and
torch's arrays take addresses, and their rebuilders take sizes on trust, so the functions here are called in
their place.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import importlib
import io
import itertools
import math
import pathlib
import pickle
import re
import types
import uuid
from collections.abc import Callable
from typing import Any

import torch

from .key_hashes import check_hashes


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


_MAX_BITS = 1 << 16
"""How large integers may be that are divided, in quadratic time, by what is called with them."""
_Tests = dict[Any, Callable[..., bool]]


def _listed(*args: Any) -> bool:
    """A container's content is written out, never made up, as by a range."""
    return not args or (len(args) == 1 and type(args[0]) in (list, tuple))


def _hashed(*args: Any) -> bool:
    """Whether what is hashed, as its keys or as pairs, is written out and harmless."""
    if not _listed(*args):
        return False
    items = args[0] if args else ()
    # of pairs the first parts are the keys; of a set the items themselves
    pairs = all(type(item) in (list, tuple) and len(item) == 2 for item in items)
    check_hashes([item[0] for item in items if type(item[0]) is not list] if pairs else [])
    check_hashes(item for item in items if type(item) is not list)
    return True


def _small_ints(*args: Any) -> bool:
    return all(type(arg) is int and arg.bit_length() <= _MAX_BITS for arg in args)


def _is_mapping(*args: Any) -> bool:
    return not args or (len(args) == 1 and type(args[0]) is dict)


def _any(*args: Any) -> bool:
    return True


def _none(*args: Any) -> bool:
    return not args


def _fraction(*args: Any) -> bool:
    """Not from an exponent, which makes a number of any length."""
    if len(args) == 1 and isinstance(args[0], str):
        return re.fullmatch(r"-?\d+(/\d+)?", args[0]) is not None
    return _small_ints(*args)


def _bytearray(*args: Any) -> bool:
    if args and isinstance(args[0], str):
        return args[1:] in (("latin-1",), ("latin1",))
    return not args or (len(args) == 1 and isinstance(args[0], bytes))


_PATHS = (pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.Path, pathlib.PosixPath)

_FACTORIES: tuple[type, ...] = (
    bool,
    bytes,
    dict,
    float,
    int,
    list,
    set,
    str,
    tuple,
    collections.OrderedDict,
    collections.Counter,
)

VALUES: _Tests = {
    **dict.fromkeys((set, frozenset, collections.OrderedDict), _hashed),
    collections.Counter: _is_mapping,
    # its factory is called for any key that is missing later, by whoever has the value
    collections.defaultdict: lambda *args: (
        not args or (len(args) == 1 and (args[0] is None or args[0] in _FACTORIES))
    ),
    collections.deque: lambda *args: _listed(*args[:1]) and len(args) <= 2,
    **dict.fromkeys((types.SimpleNamespace, bytes, io.BytesIO), _none),
    bytearray: _bytearray,
    fractions.Fraction: _fraction,
    decimal.Decimal: lambda *args: len(args) == 1 and isinstance(args[0], str),
    range: _small_ints,
    **dict.fromkeys((complex, slice, uuid.SafeUUID, *_PATHS), _any),
    uuid.UUID: _none,
    **dict.fromkeys((datetime.date, datetime.datetime, datetime.time), _any),
    **dict.fromkeys((datetime.timedelta, datetime.timezone), _any),
    torch.Size: lambda *args: _listed(*args),
    torch.device: _any,
}
"""Classes of values that may be called, and whether these arguments may be among theirs."""

NAMED: tuple[type, ...] = (str, int, float, bool, list, tuple, dict)
"""Stand in a pickle as a value, such as a defaultdict's factory, or as the base of a class of the user's."""


def encode(text: Any, encoding: Any = "utf-8") -> Any:
    """How protocol 2 writes bytes; another codec would be imported."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8"):
        raise UntrustedGlobal("_codecs.encode (of something else than bytes)")
    return text.encode(encoding)


# --- torch

_utils: Any = torch._utils  # untyped, as is the next
_tensor: Any = torch._tensor


def _refused(what: str) -> UntrustedGlobal:
    return UntrustedGlobal(f"a torch rebuilder (with {what})")


def _ints(values: Any, what: str) -> tuple[int, ...]:
    """``values`` as a shape or strides. Raises UntrustedGlobal for what is neither."""
    if not isinstance(values, (tuple, list)) or not all(
        type(value) is int and value >= 0 for value in values
    ):
        raise _refused(f"an unusual {what}")
    return tuple(values)


def _check_inside(offset: Any, size: Any, stride: Any, room: int) -> None:
    """torch grows a storage that is too small, by what memory held before, and as far as it is told."""
    sizes, strides = _ints(size, "size"), _ints(stride, "stride")
    if type(offset) is not int or offset < 0 or len(sizes) != len(strides):
        raise _refused("an unusual offset")
    # the last element's place: strides are not negative, so no other lies further
    last = sum((extent - 1) * step for extent, step in zip(sizes, strides, strict=True))
    if offset > room or (0 not in sizes and offset + last >= room):
        raise _refused("elements outside of its storage")


def _check_typed(storage: Any) -> int:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise _refused("no storage")
    return int(storage._untyped_storage.nbytes())


def _check_rest(requires_grad: Any, hooks: Any, metadata: Any, dtype: torch.dtype) -> None:
    """Hooks would be called in a backward pass."""
    # an empty one is what torch itself writes
    if type(requires_grad) is not bool or (hooks is not None and (not isinstance(hooks, dict) or hooks)):
        raise _refused("hooks")
    if metadata and (
        not isinstance(metadata, dict)
        or not metadata.keys() <= {"conj", "neg"}
        or not all(type(value) is bool for value in metadata.values())
        or (metadata.get("conj") and not dtype.is_complex)
    ):
        raise _refused("unusual metadata")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> torch.Tensor:
    _check_inside(offset, size, stride, _check_typed(storage) // storage.dtype.itemsize)
    made: torch.Tensor = _utils._rebuild_tensor(storage, offset, size, stride)
    return made


def _rebuild_tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Any:
    _check_inside(offset, size, stride, _check_typed(storage) // storage.dtype.itemsize)
    _check_rest(requires_grad, hooks, metadata, storage.dtype)
    return _utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata)


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Any:
    if not isinstance(dtype, torch.dtype):
        raise _refused("no dtype")
    _check_inside(offset, size, stride, _check_typed(storage) // dtype.itemsize)
    _check_rest(requires_grad, hooks, metadata, dtype)
    return _utils._rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata)


def _rebuild_qtensor(
    storage: Any, offset: Any, size: Any, stride: Any, params: Any, requires_grad: Any, hooks: Any
) -> Any:
    room = _check_typed(storage) // storage.dtype.itemsize
    _check_inside(offset, size, stride, room)
    _check_rest(requires_grad, hooks, None, storage.dtype)
    # torch makes one of that size first, and does not check everywhere that there are scales enough
    if not isinstance(params, tuple) or len(params) not in (3, 4) or math.prod(size) > room:
        raise _refused("unusual quantizer parameters")
    if len(params) == 4:
        _, scales, zero_points, axis = params
        kinds = (list, torch.Tensor)
        if type(axis) is not int or not 0 <= axis < len(size):
            raise _refused("an unusual axis")
        for tensor in (scales, zero_points):
            if (
                not isinstance(tensor, kinds)
                or len(tensor) != size[axis]
                or (
                    isinstance(tensor, torch.Tensor)
                    and (tensor.dim() != 1 or tensor.layout is not torch.strided)
                )
            ):
                raise _refused("unusual quantizer parameters")
    return _utils._rebuild_qtensor(storage, offset, size, stride, params, requires_grad, hooks)


def _rebuild_sparse_tensor(layout: Any, data: Any) -> torch.Tensor:
    """Checked at once: torch does so after the load at best, and by default never."""
    compressed = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    if not isinstance(data, tuple):
        raise _refused("unusual data")
    if layout is torch.sparse_coo and len(data) in (3, 4):
        indices, values, size = data[:3]
        coalesced = data[3] if len(data) == 4 else None
        return torch.sparse_coo_tensor(indices, values, size, check_invariants=True, is_coalesced=coalesced)
    if layout in compressed and len(data) == 4:
        return torch.sparse_compressed_tensor(*data, layout=layout, check_invariants=True)
    raise _refused("an unusual layout")


def _rebuild_nested_tensor(buffer: Any, sizes: Any, strides: Any, offsets: Any) -> torch.Tensor:
    for part, dims in ((buffer, 1), (sizes, 2), (strides, 2), (offsets, 1)):
        if type(part) is not torch.Tensor or part.dim() != dims or not part.is_contiguous():
            raise _refused("unusual parts")
    for part in (sizes, strides, offsets):
        if part.dtype is not torch.int64:
            raise _refused("unusual parts")
    if not sizes.shape == strides.shape or len(offsets) != len(sizes):
        raise _refused("unusual parts")
    # each is a view of the buffer, at a place that the pickle chose
    for offset, size, stride in zip(offsets.tolist(), sizes.tolist(), strides.tolist(), strict=True):
        _check_inside(offset, size, stride, buffer.numel())
    return torch._nested_view_from_buffer(buffer, sizes, strides, offsets)


def _rebuild_njt(options: Any) -> Any:
    """A nested tensor of layout torch.jagged. What it has cached of its lengths is found again when it is
    needed."""
    values, offsets, lengths = (options.get(part) for part in ("values", "offsets", "lengths"))
    ragged, needs_grad = options.get("_ragged_idx", 1), options.get("requires_grad", False)
    if type(values) is not torch.Tensor or values.dim() < 1 or type(ragged) is not int:
        raise _refused("unusual parts")
    if not 1 <= ragged <= values.dim() or type(needs_grad) is not bool:
        raise _refused("unusual parts")
    for part in (offsets, lengths):
        if part is not None and (
            type(part) is not torch.Tensor
            or part.dim() != 1
            or part.dtype not in (torch.int64, torch.int32)
            or part.layout is not torch.strided
        ):
            raise _refused("unusual parts")
    if offsets is None or not len(offsets) or (lengths is not None and len(lengths) != len(offsets) - 1):
        raise _refused("unusual parts")
    # rows are found by these numbers alone: each must lie within the values
    starts = offsets.tolist()
    pairs = [(0, starts[0]), *itertools.pairwise(starts)]
    if lengths is not None:
        pairs += [(start, start + length) for start, length in zip(starts, lengths.tolist(), strict=False)]
    if not all(0 <= start <= end <= values.shape[ragged - 1] for start, end in pairs):
        raise _refused("offsets outside of its values")
    module = importlib.import_module("torch.nested._internal.nested_tensor")
    return module.NestedTensor(values, offsets, lengths=lengths, _ragged_idx=ragged, requires_grad=needs_grad)


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    if not isinstance(data, torch.Tensor):
        raise _refused("no tensor")
    _check_rest(requires_grad, hooks, None, data.dtype)
    return _utils._rebuild_parameter(data, requires_grad, hooks)


def _rebuild_parameter_with_state(data: Any, requires_grad: Any, hooks: Any, state: Any) -> Any:
    made = _rebuild_parameter(data, requires_grad, hooks)
    _set_state(made, state)
    return made


def _rebuild_from_cpu_tensor(data: Any, dtype: Any, device: Any, requires_grad: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise _refused("no tensor")
    # whatever device the pickle names: a load says where it goes
    return data.to(dtype=dtype, device="cpu").requires_grad_(bool(requires_grad))


def _rebuild_from_numpy(data: Any, dtype: Any, device: Any, requires_grad: Any) -> torch.Tensor:
    # a copy: the pickle may give the array other memory later
    return torch.from_numpy(data.copy()).to(dtype=dtype).requires_grad_(bool(requires_grad))


def _set_state(tensor: torch.Tensor, state: Any) -> None:
    """Attributes of a tensor's own, none that mean something to torch."""
    for part in state if isinstance(state, tuple) else (state,):
        for name, value in (part or {}).items():
            # grad, data or a method of this name would change what torch does with the tensor
            if not isinstance(name, str) or hasattr(torch.Tensor, name):
                raise _refused(
                    f"the attribute {str(name)[:40] if type(name) is str else type(name).__name__}"
                )
            setattr(tensor, name, value)


_NESTED = "torch.nested._internal.nested_tensor"


class TensorRebuilders:
    """torch's rebuilders, by their names; ``trusted`` tells which subclasses of tensors are the user's."""

    def __init__(self, trusted: Callable[[Any], bool]) -> None:
        self._trusted = trusted
        plain: dict[str, Callable[..., Any]] = {
            "_rebuild_tensor": _rebuild_tensor,
            "_rebuild_tensor_v2": _rebuild_tensor_v2,
            "_rebuild_tensor_v3": _rebuild_tensor_v3,
            "_rebuild_qtensor": _rebuild_qtensor,
            "_rebuild_sparse_tensor": _rebuild_sparse_tensor,
            "_rebuild_nested_tensor": _rebuild_nested_tensor,
            "_rebuild_parameter": _rebuild_parameter,
            "_rebuild_parameter_with_state": _rebuild_parameter_with_state,
            "_rebuild_device_tensor_from_cpu_tensor": _rebuild_from_cpu_tensor,
            "_rebuild_device_tensor_from_numpy": _rebuild_from_numpy,
            # as it is: without memory any size will do
            "_rebuild_meta_tensor_no_storage": _utils._rebuild_meta_tensor_no_storage,
            "_rebuild_wrapper_subclass": self._wrapper_subclass,
        }
        self.names: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", name): function for name, function in plain.items()
        }
        self.names[_NESTED, "_rebuild_njt"] = _rebuild_njt
        # before the last one, so that it can't be asked to call itself
        self._inner = frozenset(self.names.values())
        self.names["torch._tensor", "_rebuild_from_type_v2"] = self._from_type

    def _wrapper_subclass(self, cls: Any, *args: Any) -> Any:
        # a subclass runs code of its own from here on: its __new__, its __torch_dispatch__
        if not self._trusted(cls):
            raise UntrustedGlobal(f"{cls.__module__}.{cls.__qualname__}", allowable=True)
        return _utils._rebuild_wrapper_subclass(cls, *args)

    def _from_type(self, function: Any, cls: Any, args: Any, state: Any) -> Any:
        if function not in self._inner or not isinstance(args, tuple):
            raise _refused("a function that is none of torch's")
        made = function(*args)
        if self._trusted(cls):
            # made already, by a function that was checked: torch is left its class and state
            return _tensor._rebuild_from_type_v2(lambda: made, cls, (), state)
        if function is _rebuild_njt and cls is type(made):
            return made  # its state repeats its parts
        if cls not in (torch.Tensor, torch.nn.Parameter):
            raise _refused("an unusual class")
        if type(made) is not cls:
            made = made.as_subclass(cls)
        _set_state(made, state)
        return made
