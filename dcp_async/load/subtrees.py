"""Which names of a state lie below which: what text tells, corrected by what the state is made of.

Enters: a FlatState, and the names that a load may fill. Leaves: the names at and below a head. Pure. Keys may
have dots, so that "ema.m" beside a Stateful "ema" looks like a name of its state, and is none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from ..state import Extent, FlatState


class Subtrees:
    """The names of one state, sorted once: what lies below a head is found by bisection."""

    def __init__(self, flat: FlatState, names: Iterable[str]) -> None:
        self._names = sorted(names)
        self._extents = flat.extents
        self._strangers: dict[str, frozenset[str]] = {}
        """Object -> names that begin with its own and lie beside it; most have none, and are not here."""
        for head, extent in flat.extents.items():
            inside = flat.order[extent.leaves.start : extent.leaves.stop]
            beside = frozenset(_at_or_below(head, self._names)).difference(inside)
            # pieces of distributed tensors have names that are not in order: they lie where those do
            if beside and (beside := beside.intersection(flat.order)):
                self._strangers[head] = beside

    def at_or_below(self, head: str) -> list[str]:
        """Names that are ``head`` or lie below it, sorted."""
        names = _at_or_below(head, self._names)
        for owner, strangers in self._strangers.items():
            if _is_below(head, owner) and self._lies_in(head, owner):
                names = [name for name in names if name not in strangers]
        return names

    def objects_in(self, head: str, objects: Iterable[str]) -> set[str]:
        """Those of ``objects`` that lie below ``head``."""
        outer = self._extents.get(head)
        return {
            name for name in objects if name != head and _is_below(name, head) and self._is_in(name, outer)
        }

    def _lies_in(self, head: str, owner: str) -> bool:
        """Whether ``head``, which begins with ``owner``, lies inside of it or is it: not if it belongs to an
        object that lies beside."""
        outer = self._extents[owner]
        return all(
            self._is_in(name, outer)
            for name in self._extents
            if _is_below(head, name) and _is_below(name, owner) and name != owner
        )

    def _is_in(self, name: str, outer: Extent | None) -> bool:
        extent = self._extents.get(name)
        # what has no extent is a name that somebody inside of an object chose: text tells
        return outer is None or extent is None or extent.objects.start in outer.objects


def _is_below(name: str, head: str) -> bool:
    return name == head or name.startswith(f"{head}.")


def _at_or_below(head: str, names: Sequence[str]) -> list[str]:
    """Those of ``names``, which are sorted, that are ``head`` or begin with it and a dot."""
    first = bisect_left(names, f"{head}.")
    last = first
    while last < len(names) and names[last].startswith(f"{head}."):
        last += 1
    exact = bisect_left(names, head)
    own = [head] if exact < len(names) and names[exact] == head else []
    return [*own, *names[first:last]]
