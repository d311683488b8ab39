"""Whether a load takes the pickle of an honest leaf back, as far as the leaf's values decide on that.

Enters: what a pickler of this process wrote. Leaves: ValueError for what the load's grammar refuses, such as
parts that refer to one another too many times; else whether only unpickling tells, as of keys whose hashes
meet. Invariant: what is not refused here, and need not be unpickled, is refused by its classes or not at all.
"""

from __future__ import annotations

import pickle
from typing import Any

from ..trust import MAX_ALIKE, Made, Walk, run

_NUMBERS = frozenset({int, float, bool, type(None)})
_FEW = 32
_RISKY = (
    pickle.LONG1,
    pickle.LONG4,
    pickle.BINFLOAT,
    pickle.REDUCE,
    pickle.NEWOBJ,
    pickle.TUPLE,
    pickle.TUPLE1,
    pickle.TUPLE2,
    pickle.TUPLE3,
)
"""One of these ends each key whose hash is neither seeded nor a small number of its own."""


def is_all_numbers(value: object) -> bool:
    """Whether ``value`` is a list or tuple of nothing else, or of a few such lists and tuples, as the state
    of a random number generator is. However long it is, no load refuses it."""
    if type(value) is not tuple and type(value) is not list:
        return False
    if _NUMBERS.issuperset(map(type, value)):
        return True
    rows = [part for part in value if type(part) not in _NUMBERS] if len(value) <= _FEW else [None]
    return all(type(row) in (tuple, list) and _NUMBERS.issuperset(map(type, row)) for row in rows)  # type: ignore[arg-type]  # the first half says that it has parts


def must_be_unpickled(pickled: bytes) -> bool:
    """Whether a load may still refuse ``pickled`` by its values. Raises ValueError if it surely does."""
    # a load's unpickler counts the hashes that meet; here only the chance of it is looked for
    walk = _KeyWalk(pickled, 0, seeded_keys=True)
    outline = run(walk)
    if walk.has_many_keys and sum(map(pickled.count, _RISKY)) > MAX_ALIKE:
        return True
    return bool(outline.names) and pickle.LONG4 in pickled  # what is called may not take so long a number


class _KeyWalk(Walk):
    """Notes whether anything may have more keys than may hash alike: picklers write that many at a time, or
    give a list of them to what is called."""

    has_many_keys = False

    def hash_all(self, keys: list[Any]) -> None:
        if len(keys) >= MAX_ALIKE:
            self.has_many_keys = True
        super().hash_all(keys)

    def push_call(self, function: Any, *arguments: Any) -> None:
        if any(type(given) is Made and given.weight > MAX_ALIKE for given in arguments):
            self.has_many_keys = True
        super().push_call(function, *arguments)
