"""Messages between ranks as bytes: plain data only.

Enters: None, bool, int, float, str, bytes, and lists, tuples and dicts of them. Leaves: their pickle, made
and read at C speed. Invariant: a store is an open socket, so nothing that arrives may name code; classes and
functions are refused by the reader, and by the writer already, where the mistake can be seen.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, NoReturn

from .pickle_grammar import check_plain_pickle

_PROTOCOL = 3
"""The newest under which sets and bytearrays still go through a class, so that the writer refuses them."""

_PREFETCH_BYTES = 1 << 17


class _Writer(pickle.Pickler):
    def reducer_override(self, obj: object) -> NoReturn:
        # asked for everything that is no plain type, subclasses of plain types included
        kind = obj if isinstance(obj, type) else type(obj)
        raise ValueError(f"a message between ranks is plain data; {kind.__qualname__} is not")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"it names {module}.{name}")


def dumps(message: object) -> bytes:
    """``message`` as bytes. Raises ValueError for anything but plain data."""
    file = io.BytesIO()
    try:
        _Writer(file, _PROTOCOL).dump(message)
    except ValueError:
        raise
    except (pickle.PicklingError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"a message between ranks is plain data: {error}") from error
    return file.getvalue()


def loads(raw: bytes | bytearray | memoryview) -> Any:
    """The message that ``raw`` holds. Raises ValueError for anything that ``dumps`` did not write."""
    # a reader with peek() and room for what pickle asks of it; else each opcode costs a call, 3 to 10 times
    # the time
    file = io.BufferedReader(io.BytesIO(raw), _PREFETCH_BYTES)
    try:
        check_plain_pickle(bytes(raw))
        message = _Reader(file).load()
    except Exception as error:  # a damaged pickle raises whatever the opcode at hand runs into
        raise ValueError(f"not a message between ranks: {str(error) or type(error).__name__}") from error
    if file.read(1):
        raise ValueError("not a message between ranks: bytes follow its end")
    return message
