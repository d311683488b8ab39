"""Messages between ranks: what is plain data goes through unchanged, nothing else goes through at all."""

from __future__ import annotations

import collections
import enum
import functools
import math
import os
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp_async.trust.plain_data import dumps, loads

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
_KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
PLAIN = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(_KEYS | st.tuples(_KEYS, _KEYS), inner)
    ),
)


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


class Exploit:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


Pair = collections.namedtuple("Pair", "left right")


def same(left: object, right: object) -> bool:
    """Equal, and of the same types all the way down (1 == True == 1.0)."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, float) and isinstance(right, float):
        return left == right and math.copysign(1, left) == math.copysign(1, right)
    return left == right


@given(PLAIN)
def test_plain_data_comes_back_as_it_was(message: object) -> None:
    assert same(loads(dumps(message)), message)


def test_plain_data_keeps_nan_and_large_integers() -> None:
    back = loads(dumps([math.nan, math.inf, 1 << 5000, -(1 << 70)]))
    assert math.isnan(back[0])
    assert back[1:] == [math.inf, 1 << 5000, -(1 << 70)]


@pytest.mark.parametrize(
    "odd",
    [
        {1}, frozenset(), bytearray(b"x"), 1j, object(), int, len, Colour.RED, Text("x"), Pair(1, 2),
        Exploit(), collections.OrderedDict(), collections.defaultdict(list), functools.partial(int), ...,
        ValueError("x"), torch.ones(2), torch.float32, torch.Size([1]), memoryview(b"x"), iter([]),
    ],
    ids=lambda odd: type(odd).__name__,
)  # fmt: skip
@pytest.mark.parametrize("wrap", [lambda odd: odd, lambda odd: {"key": [(odd,)]}], ids=["bare", "nested"])
def test_dumps_refuses_what_is_no_plain_data(odd: object, wrap: Any) -> None:
    with pytest.raises(ValueError, match="a message between ranks is plain data"):
        dumps(wrap(odd))


def test_dumps_refuses_what_is_nested_without_end() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="a message between ranks is plain data"):
        dumps(deep)
    while deep:  # or its deallocation recurses as deep
        (deep,) = deep  # type: ignore[assignment]  # a list of lists


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "hostile", [Exploit(), print, Colour.RED, torch.float32], ids=["reduce", "f", "enum", "attr"]
)
def test_loads_refuses_whatever_names_code(hostile: object, protocol: int) -> None:
    with pytest.raises(ValueError, match="not a message between ranks: it names"):
        loads(pickle.dumps([hostile], protocol))


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\x80", b"\x80\x03", b"\x80\x03.", b"\x80\x63N.", b"garbage", b"N", b"\x80\x03K\x01b.",
        b"cos\nsystem\n(S'true'\ntR.", b"(ios\nsystem\n.", b"\x80\x03}Pid\n.", b"\x80\x03NQ.",
        b"\x82\x01.", b"h\x05.",
    ],
)  # fmt: skip
def test_loads_refuses_damaged_bytes(raw: bytes) -> None:
    with pytest.raises(ValueError, match="not a message between ranks"):
        loads(raw)


@given(PLAIN, st.data())
def test_loads_refuses_a_message_that_was_cut_or_goes_on(message: object, data: st.DataObject) -> None:
    raw = dumps(message)
    with pytest.raises(ValueError, match="not a message between ranks"):
        loads(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(ValueError, match="bytes follow its end"):
        loads(raw + data.draw(st.binary(min_size=1)))
