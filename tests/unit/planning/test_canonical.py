"""Equal values have one digest, however they came about; different ones have different digests, and the place
where they differ is named."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import os
import pathlib
import subprocess
import sys
import uuid
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from dcp_async.planning.canonical import UndecidableError, digest, first_difference, places

Point = namedtuple("Point", "x y")


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Plain:
    a: Any
    b: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    a: Any
    b: Any = None


class Opaque:
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("no")


def _text(times: int) -> str:
    return "".join(["ab"] * times)  # never the same object twice


SHARED = _text(3)
EQUAL: dict[str, tuple[Any, Any]] = {
    "sets": ({_text(n) for n in range(9)}, {_text(n) for n in reversed(range(9))}),
    "frozensets in a dict": ({"k": frozenset("abc")}, {"k": frozenset("cba")}),
    "strings of other identity": ((SHARED, SHARED), (_text(3), _text(3))),
    "a dict's order in a tuple": (({"a": 1, "b": 2},), ({"b": 2, "a": 1},)),
    "an array's order": (np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))),
    "a strided array": (np.arange(6)[::2], np.array([0, 2, 4])),
    "arrays of objects": (
        np.array([{"a": 1, "b": 2}], dtype=object),
        np.array([{"b": 2, "a": 1}], dtype=object),
    ),
    "numpy's scalars": ((np.float32(1.5), np.str_("x")), (np.float32(1.5), np.str_("x"))),
    "NaN": (float("nan"), float("nan")),
    "dataclasses": (Plain(1, {"x": 1, "y": 2}), Plain(1, {"y": 2, "x": 1})),
    "slots": (Slotted(1, {"p", "q"}), Slotted(1, {"q", "p"})),
    "a namedtuple": (Point({1, 2}, 3), Point({2, 1}, 3)),
    "enums": ((Color.RED, Level.LOW), (Color.RED, Level.LOW)),
    "counters": (Counter("aab"), Counter("baa")),
    "defaultdicts": (defaultdict(list, {1: [2], 3: []}), defaultdict(list, {3: [], 1: [2]})),
    "an OrderedDict": (OrderedDict(a=1, b={1, 2}), OrderedDict(a=1, b={2, 1})),
    "deques": (deque([{1, 2}], 3), deque([{2, 1}], 3)),
    "a namespace": (argparse.Namespace(a=1, b=2), argparse.Namespace(b=2, a=1)),
    "paths": (pathlib.PurePosixPath("a/b"), pathlib.PurePosixPath("a") / "b"),
    "times": (
        datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
        datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
    ),
    "numbers": (
        (fractions.Fraction(1, 3), decimal.Decimal("0.1"), uuid.UUID(int=5), 1 << 300),
        (fractions.Fraction(2, 6), decimal.Decimal("0.1"), uuid.UUID(int=5), 1 << 300),
    ),
    "tensors in tuples": ((torch.arange(6).reshape(2, 3).t(),), (torch.tensor([[0, 3], [1, 4], [2, 5]]),)),
    "torch's own": (
        (torch.float32, torch.Size((2,)), torch.device("cpu")),
        (torch.float32, torch.Size((2,)), torch.device("cpu")),
    ),
    "partial": (functools.partial(int, base=2), functools.partial(int, base=2)),
}
UNEQUAL: dict[str, tuple[Any, Any]] = {
    "int and bool": (1, True),
    "int and float": (1, 1.0),
    "the sign of zero": (0.0, -0.0),
    "the bits of NaN": (float("nan"), -float("nan")),
    "str and bytes": ("a", b"a"),
    "list and tuple": ([1], (1,)),
    "set and frozenset": ({1}, frozenset({1})),
    "an OrderedDict's order": (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
    "dict and Counter": ({"a": 1}, Counter("a")),
    "default factories": (defaultdict(list), defaultdict(int)),
    "dtypes": (np.float32(1), np.float64(1)),
    "shapes": (np.ones(2), np.ones((1, 2))),
    "elements": (np.array([1, 2]), np.array([1, 3])),
    "members": (Color.RED, Color.BLUE),
    "member and value": (Level.LOW, 1),
    "fields": (Plain(1), Plain(2)),
    "slots": (Slotted(1, (2,)), Slotted(1, (3,))),
    "classes": (Plain(1), Slotted(1)),
    "tensors": ((torch.ones(2),), (torch.tensor([1.0, 2.0]),)),
    "a deque's bound": (deque([1], 3), deque([1], 4)),
    "a shorter one": ([1, 2], [1, 2, 3]),
    "split elsewhere": (["ab", "c"], ["a", "bc"]),
}


@pytest.mark.parametrize("kind", EQUAL)
def test_equal_values_have_one_digest(kind: str) -> None:
    left, right = EQUAL[kind]
    assert digest(left) == digest(right)
    assert digest([left, {"k": (right,)}]) == digest([right, {"k": (left,)}])


@pytest.mark.parametrize("kind", UNEQUAL)
def test_values_that_differ_have_different_digests(kind: str) -> None:
    left, right = UNEQUAL[kind]
    assert digest(left) != digest(right)
    assert digest({"k": (left,)}) != digest({"k": (right,)})


def test_a_digest_holds_in_every_process() -> None:
    value = "[{'w%d' % n for n in range(20)}, {'a': (1.5, None, b'x')}]"
    code = f"from dcp_async.planning.canonical import digest; print(digest({value}))"
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": other},
        capture_output=True,
        check=True,
        text=True,
    )
    assert told.stdout.strip() == str(digest(eval(value)))


def test_circles_end() -> None:
    left: list[Any] = [1]
    left.append({"again": left})
    right: list[Any] = [1]
    right.append({"again": right})
    assert digest(left) == digest(right)


def test_what_occurs_many_times_is_looked_at_once() -> None:
    value: Any = (1.5,)
    for _ in range(60):
        value = (value, value)
    assert digest(value) == digest(value)


@pytest.mark.parametrize("value", [Opaque(), [{"k": Opaque()}]], ids=["itself", "inside"])
def test_what_does_not_tell_is_undecided(value: Any) -> None:
    with pytest.raises(UndecidableError, match="Opaque"):
        digest(value)


def test_what_goes_too_deep_is_undecided() -> None:
    value: Any = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(UndecidableError, match="deep"):
        digest(value)


@pytest.mark.parametrize(
    ("left", "right", "path", "words"),
    [
        ({"lr": [1, {"x": 3}]}, {"lr": [1, {"x": 4}]}, "['lr'][1]['x']", ("3", "4")),
        ({"a": 1}, {"a": 1, "b": 2}, "['b']", ("nothing", "2")),
        ({"a": 1, "b": 2}, {"a": 1}, "['b']", ("2", "nothing")),
        ({"s", "t"}, {"s"}, "{'t'}", ("'t'", "nothing")),
        (Plain(1, Slotted(2, "q")), Plain(1, Slotted(2, "r")), ".b.b", ("'q'", "'r'")),
        ((1, "x" * 100), (1, 2.5), "[1]", ("'" + "x" * 56 + "...", "2.5")),
        (1, 2, "", ("1", "2")),
    ],
)
def test_the_place_that_differs_is_named(left: Any, right: Any, path: str, words: tuple[str, str]) -> None:
    assert first_difference(places(left), places(right)) == (path, *words)
