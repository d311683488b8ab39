"""A dict that keeps its newest entries, so that what nobody takes leave of is forgotten some day."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

REMEMBERED = 512
"""Ids whose late messages are told from those of saves to come: far more than any engine has in flight, and
few enough that a run of a million saves keeps nothing."""


class Recent(OrderedDict[K, V]):
    """Holds the ``REMEMBERED`` entries that were added last."""

    def __setitem__(self, key: K, value: V) -> None:
        # what is set again keeps its age: an id lives as long as its save, and no save as long as hundreds
        super().__setitem__(key, value)
        while len(self) > REMEMBERED:
            self.popitem(last=False)
