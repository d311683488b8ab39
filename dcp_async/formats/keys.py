"""Keys of a saved mapping: what they are called in names, and how those are written that are no text.

Enters: a key of any hashable kind. Leaves: its text; its pickle, where JSON has no word for it; or a
PickledKey, so that nothing is unpickled to look at a tree.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass

PLAIN_KEYS = (str, bool, int, float, type(None))
"""Types of keys that JSON can write."""


def has_json(key: object) -> bool:
    """Whether JSON has a word for ``key`` itself: for an infinity or NaN it has none."""
    # by exact type: JSON would give an IntEnum back as an int
    return type(key) in PLAIN_KEYS and not is_non_finite(key)


def is_non_finite(key: object) -> bool:
    """Whether ``key`` is an infinity or NaN."""
    return isinstance(key, float) and not math.isfinite(key)


@dataclass(frozen=True, slots=True)
class PickledKey:
    """A mapping's key that is still pickled."""

    text: str
    """Its ``str()``, which names are made of."""
    raw: bytes | None
    """None if only ``plain`` is known of it: its class can't be pickled."""
    plain: str | int | float | None = None
    """What it is where its class is not trusted: an enum of text is that text."""

    def __str__(self) -> str:
        return self.text


def text_of(key: object) -> str:
    """What names are made of, as DCP makes them: ``str(key)``, and never of a subclass."""
    # str() of a key may give a subclass of str, whose own methods would be asked from here on
    return key if type(key) is str else str.__str__(str(key))


def plain_key(key: object) -> str | int | float | None:
    """The value of a key whose class extends str, int or float; None of any other."""
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, int):
        return int.__int__(key)
    return float.__float__(key) if isinstance(key, float) else None


def pickled_key(key: object) -> bytes | None:
    """The pickle of a key that JSON has no word for; None of any other, and of one that can do without.

    Raises: what its pickling raises.
    """
    if has_json(key):
        return None
    try:
        return pickle.dumps(key, protocol=2)
    except Exception:  # pickling runs the key's own code, which may raise anything
        plain = plain_key(key)
        if plain is None:
            raise
        return pickle.dumps(plain, protocol=2) if is_non_finite(plain) else None
