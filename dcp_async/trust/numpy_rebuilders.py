"""What of numpy's a pickle may call, and what BUILD may put into an array or a dtype.

Enters: arguments and states that a pickle of unknown origin chose. Leaves: arrays, scalars and dtypes whose
bytes are those that the pickle holds; or UntrustedGlobal for what would make numpy read foreign memory.
"""

from __future__ import annotations

import functools
import importlib
import math
from functools import lru_cache
from typing import Any

from .torch_rebuilders import UntrustedGlobal


@lru_cache(maxsize=1)
def numpy_globals() -> tuple[dict[tuple[str, str], Any], frozenset[Any]]:
    """What numpy's pickles name, and which of it they may call."""
    try:
        import numpy as np
        from numpy import dtypes
    except ImportError:
        return {}, frozenset()
    # private, and the only place that names it: numpy's own pickles call these to rebuild arrays and scalars
    core: Any = importlib.import_module("numpy._core")

    def dtype(kind: Any, *flags: Any) -> Any:
        if not isinstance(kind, str):
            raise UntrustedGlobal("numpy.dtype (of no text)")
        # a copy: BUILD sets its byte order, and numpy shares the usual ones
        return _checked_dtype(np.dtype(kind, copy=True))

    def reconstruct(cls: Any, shape: Any, kind: Any) -> Any:
        # as numpy writes it: the bytes come with BUILD; another shape would have memory that nobody filled
        if cls is not np.ndarray or shape != (0,):
            raise UntrustedGlobal("numpy.ndarray (rebuilt in an unusual way)")
        return core.multiarray._reconstruct(cls, shape, kind)

    def scalar(kind: Any, raw: Any) -> Any:
        if _checked_dtype(kind).hasobject:
            # its bytes would be taken for a pointer
            raise UntrustedGlobal("numpy scalar (of objects)")
        if isinstance(raw, str):  # protocol 2 of Python 2
            raw = raw.encode("latin-1")
        if not isinstance(raw, bytes) or len(raw) != kind.itemsize:
            raise UntrustedGlobal("numpy scalar (of a wrong size)")
        return core.multiarray.scalar(kind, raw)

    names: dict[tuple[str, str], Any] = {("numpy", "dtype"): dtype}
    for module in ("numpy._core", "numpy.core"):
        names[f"{module}.multiarray", "_reconstruct"] = reconstruct
        names[f"{module}.multiarray", "scalar"] = scalar
    for name, cls in vars(dtypes).items():
        if isinstance(cls, type) and name != "ObjectDType":
            names["numpy.dtypes", name] = functools.partial(_made_dtype, cls)
    calls = frozenset(names.values())
    names["numpy", "ndarray"] = np.ndarray
    for name, cls in vars(np).items():
        if isinstance(cls, type) and issubclass(cls, np.generic) and not issubclass(cls, np.object_):
            names["numpy", name] = cls
    return names, calls


def _made_dtype(cls: Any, *args: Any) -> Any:
    return _checked_dtype(cls(*args))


_OBJECT_FLAGS = 63
_POINTER_FLAGS = 0x01 | 0x02 | 0x04 | 0x20 | 0x40
"""Flags of a dtype that say that items hold references. An object dtype without them would take bytes for
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


def check_numpy_state(target: Any, state: Any) -> None:
    """What BUILD may put into an array or a dtype. Anything else could make numpy read foreign memory."""
    # here, not above: torch runs without numpy
    import numpy as np

    if isinstance(target, np.dtype):
        if not _is_dtype_state(target, state):
            raise UntrustedGlobal("numpy.dtype (with unusual state)")
    elif type(target) is np.ndarray:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], np.dtype):
            raise UntrustedGlobal("numpy.ndarray (with unusual state)")
        _, shape, dtype, _, raw = state
        _checked_dtype(dtype)
        extents = shape if isinstance(shape, tuple) else (-1,)
        ok = all(isinstance(extent, int) and extent >= 0 for extent in extents)
        wanted, unit = (list, 1) if dtype.hasobject else (bytes, dtype.itemsize)
        if not ok or type(raw) is not wanted or len(raw) != math.prod(extents) * unit:
            raise UntrustedGlobal("numpy.ndarray (with a wrong size)")
    else:
        raise UntrustedGlobal(f"numpy.{type(target).__name__} (to change it)")


def _is_dtype_state(target: Any, state: Any) -> bool:
    if not isinstance(state, tuple) or len(state) not in (8, 9) or state[2] is not None:
        return False
    names, fields, size, alignment, flags = state[3:8]
    if type(state[0]) is not int or state[1] not in ("<", ">", "=", "|", b"<", b">", b"=", b"|"):
        return False
    if target.kind == "O":
        return flags == _OBJECT_FLAGS and names is None and fields is None
    if (
        type(flags) is not int
        or flags & _POINTER_FLAGS
        or type(size) is not int
        or type(alignment) is not int
    ):
        return False
    # numpy takes the size of a flexible one from here, even -1, and ignores that of any other
    if size != target.itemsize and (size != -1 or target.kind in "SUV"):
        return False
    if alignment not in (-1, 1, 2, 4, 8, 16, 32, 64) or not _is_unit(target, state[8:]):
        return False
    return (names is None and fields is None) or (target.kind == "V" and _are_fields(target, names, fields))


def _is_unit(target: Any, more: tuple[Any, ...]) -> bool:
    """What a dtype of times has: (metadata, (unit, how many, of how many, event)), which numpy divides by."""
    if target.kind not in "mM":
        return not more or more[0] is None or isinstance(more[0], dict)
    if not more or not isinstance(more[0], tuple) or len(more[0]) != 2:
        return False
    unit = more[0][1]
    return (
        isinstance(unit, tuple)
        and len(unit) == 4
        and isinstance(unit[0], (bytes, str))
        and all(type(number) is int and 0 < number < 1 << 31 for number in unit[1:])
    )


def _are_fields(target: Any, names: Any, fields: Any) -> bool:
    """Numbers within the item, each of which has a name: numpy looks names up without a second thought."""
    import numpy as np

    if not isinstance(names, tuple) or not isinstance(fields, dict) or not set(names) <= fields.keys():
        return False
    if not all(isinstance(name, str) for name in fields):
        return False
    for field in fields.values():
        if not isinstance(field, tuple) or len(field) not in (2, 3) or not isinstance(field[0], np.dtype):
            return False
        part, offset = field[:2]
        if type(offset) is not int or offset < 0 or offset + part.itemsize > target.itemsize:
            return False
        if _checked_dtype(part).hasobject:
            return False
    return True
