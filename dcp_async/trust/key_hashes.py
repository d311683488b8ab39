"""Keys whose hashes meet, counted before a dict or set is made of them.

Enters: keys that a pickle of unknown origin chose, whose own hashing is bounded already. Leaves: nothing, or
ValueError where so many hash alike that inserting them takes quadratic time. Hashes of text and bytes are
seeded per process and those of small numbers are the numbers, so only the others are counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable

MAX_ALIKE = 1000
"""Comparing a thousand keys with each other takes milliseconds; no honest set of keys comes near."""
_SEEDED = frozenset({str, bytes, bool, type(None)})
_MODULUS = sys.hash_info.modulus


def risky(keys: Iterable[object]) -> list[object]:
    """Those whose hashes can be chosen."""
    return [
        key
        for key in keys
        if (kind := type(key)) not in _SEEDED and not (kind is int and -_MODULUS < key < _MODULUS)  # type: ignore[operator]
    ]


def count_hashes(keys: Iterable[object], counts: Counter[int]) -> None:
    """Add ``keys``, which are ``risky``, to ``counts``. Raises ValueError if too many are alike."""
    for key in keys:
        value = hash(key)
        counts[value] += 1
        if counts[value] > MAX_ALIKE:
            raise ValueError("it has keys that hash alike, too many to tell apart in time")


def check_hashes(keys: Iterable[object]) -> None:
    """Raises ValueError if too many of ``keys`` hash alike."""
    unseeded = risky(keys)
    # fewer can't be too many that are alike, so nothing of them is hashed here
    if len(unseeded) > MAX_ALIKE:
        count_hashes(unseeded, Counter())
