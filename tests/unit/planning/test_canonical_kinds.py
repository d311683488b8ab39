"""What has no meaning leaves no trace in a digest: the order of a set's hashes also where a class extends it,
gaps between fields, an array's order in memory, the object at which a circle begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dcp_async.planning.canonical import digest, first_difference, places


class Tags(set[Any]):
    pass


class Frozen(frozenset[Any]):
    pass


class InOrder(set[Any]):
    """Remembers in which order it was filled."""

    def __init__(self, values: Any) -> None:
        super().__init__(values)
        self.order = list(values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.order)


class Array(np.ndarray):
    pass


class Named(np.ndarray):
    """As numpy's manual shows it."""

    name = "x"

    def __reduce__(self) -> Any:
        reduced: Any = super().__reduce__()
        made, args, state = reduced
        return made, args, (*state, self.name)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[:-1])


class Nested(Named):
    def __reduce__(self) -> Any:
        reduced: Any = np.ndarray.__reduce__(self)
        made, args, state = reduced
        return made, args, (state, {"name": self.name})


class Node:
    def __init__(self, name: str) -> None:
        self.name = name
        self.others: list[Node] = []


COLLIDING = (8, 0)  # in a small table the one that comes first lies first


def _aligned(gap: int) -> Any:
    made = np.zeros(3, np.dtype([("a", "i1"), ("b", "f8"), ("c", [("d", "i2"), ("e", "i8")])], align=True))
    made.view("u1")[1::32] = gap
    return made


def _with_object(gap: int) -> Any:
    made = np.zeros(2, np.dtype([("a", "i1"), ("b", "O")], align=True))
    made["b"] = [{"x", "y", gap - gap}, None]
    return made


def _extended(gap: int) -> Any:
    made = np.ones(4, np.longdouble)
    made.view("u1").reshape(4, -1)[:, 10:] = gap
    return made


def _layout(order: Any) -> Any:
    return np.arange(6.0).reshape(2, 3).copy(order=order)


def _masked(order: Any) -> Any:
    return np.ma.masked_array(_layout(order), mask=_layout(order) > 3)


def _pair(turn: int) -> Any:
    left, right = Node("left"), Node("right")
    left.others, right.others = [right], [left]
    both = {"x": left, "y": right}
    return dict(sorted(both.items(), reverse=bool(turn)))


def _triangle(turn: int) -> Any:
    nodes = [Node(str(at)) for at in range(3)]
    for node in nodes:
        node.others = [other for other in nodes if other is not node]
    apart = {"shared": nodes[0]}
    both = {"a": apart, "b": nodes[1], "c": [apart, nodes[2]]}
    return dict(sorted(both.items(), reverse=bool(turn)))


EQUAL: dict[str, Callable[[int], Any]] = {
    "a set's class": lambda turn: Tags(COLLIDING[:: 1 - 2 * turn]),
    "a frozenset's class": lambda turn: Frozen(COLLIDING[:: 1 - 2 * turn]),
    "one inside": lambda turn: {"k": (Tags([Frozen(COLLIDING[:: 1 - 2 * turn])]), 1)},
    "gaps between fields": _aligned,
    "gaps in a scalar": lambda turn: _aligned(turn)[0],
    "gaps beside objects": _with_object,
    "gaps behind a long double": _extended,
    "a masked array's order": lambda turn: _masked("CF"[turn]),
    "a subclass's order": lambda turn: _layout("CF"[turn]).view(Array),
    "a recarray's order": lambda turn: _layout("CF"[turn]).view(np.recarray),
    "the order of one with a name": lambda turn: _layout("CF"[turn]).view(Named),
    "the order of one that nests its state": lambda turn: _layout("CF"[turn]).view(Nested),
    "where a circle begins": _pair,
    "where a circle of three begins": _triangle,
}


def _named(name: str, kind: Any) -> Any:
    made = _layout("C").view(kind)
    made.name = name
    return made


def _with(value: Any, at: Any, new: Any) -> Any:
    value[at] = new
    return value


UNEQUAL: dict[str, tuple[Any, Any]] = {
    "elements of a set's class": (Tags([1]), Tags([2])),
    "a set and its class": (Tags([1]), {1}),
    "the order of one that has its own": (InOrder([0, 8]), InOrder([8, 0])),
    "fields": (_aligned(0), _with(_aligned(0), 1, (1, 0.0, (0, 0)))),
    "inner fields": (_aligned(0), _with(_aligned(0), 1, (0, 0.0, (0, 7)))),
    "the name of a field": (np.zeros(1, [("a", "i4")]), np.zeros(1, [("b", "i4")])),
    "long doubles": (np.ones(2, np.longdouble), np.array([1, 2], np.longdouble)),
    "masks": (_masked("C"), np.ma.masked_array(_layout("C"))),
    "fill values": (_masked("C"), np.ma.masked_array(_layout("C"), _layout("C") > 3, fill_value=7.0)),
    "elements of a subclass": (_layout("C").view(Array), (_layout("C") + 1).view(Array)),
    "a subclass and its base": (_layout("C").view(Array), _layout("C")),
    "names": (_named("x", Named), _named("y", Named)),
    "nested names": (_named("x", Nested), _named("y", Nested)),
    "what lies in a circle": (_pair(0), _with(_pair(0), "z", 1)),
}


@pytest.mark.parametrize("kind", EQUAL)
def test_equal_values_have_one_digest(kind: str) -> None:
    left, right = EQUAL[kind](0), EQUAL[kind](1)
    assert digest(left) == digest(right)
    assert digest((left, [right])) == digest((right, [left]))


@pytest.mark.parametrize("kind", UNEQUAL)
def test_values_that_differ_have_different_digests(kind: str) -> None:
    left, right = UNEQUAL[kind]
    assert digest(left) != digest(right)


def test_a_difference_inside_of_a_circle_is_found() -> None:
    other = _pair(1)
    other["y"].name = "elsewhere"
    assert digest(_pair(0)) != digest(other)
    path, there, here = first_difference(places(_pair(0)), places(other))
    assert path.endswith(".name")
    assert (there, here) == ("'right'", "'elsewhere'")


def test_circles_that_lie_in_one_another_end() -> None:
    """Each of many objects knows all the others: the ways through them can't be counted."""

    def crowd() -> list[Node]:
        nodes = [Node(str(at)) for at in range(40)]
        for node in nodes:
            node.others = nodes
        return nodes

    assert digest(crowd()) == digest(crowd())
    assert digest(crowd()) != digest(crowd()[:-1])
