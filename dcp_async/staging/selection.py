"""Some tensors of a state, picked out of each list that has one entry per tensor.

Enters: indices. Leaves: what stands there, picked in C: a selection is made once per plan and asked in every
save, which may not cost a step of Python per tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import TypeVar

T = TypeVar("T")


def picker(indices: Sequence[int]) -> Callable[[Sequence[T]], tuple[T, ...]]:
    """A function that picks what stands at ``indices``, in their order."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda values: tuple([values[index] for index in indices])  # itemgetter of one gives no tuple


class Selection:
    """Distinct tensors of one structure, in the order in which they were named."""

    def __init__(self, indices: Iterable[int]) -> None:
        self.indices = list(dict.fromkeys(indices))
        self._is_prefix = self.indices == list(range(len(self.indices)))
        self._pick: Callable[[Sequence[object]], tuple[object, ...]] = picker(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def pick(self, values: Sequence[T]) -> Sequence[T]:
        """Those of ``values``, one per tensor of the state; the same list if that is all of them in its
        order."""
        if self._is_prefix and len(self.indices) == len(values):
            return values
        pick: Callable[[Sequence[T]], Sequence[T]] = self._pick  # type: ignore[assignment]  # generic per call
        return pick(values)

    def differing(self, now: Sequence[object], expected: Sequence[object]) -> set[int]:
        """The indices at which two lists, of one entry per selected tensor, differ."""
        now, expected = tuple(now), tuple(expected)
        if now == expected:  # compared in C, since it is so nearly always
            return set()
        pairs = zip(self.indices, now, expected, strict=True)
        return {index for index, current, known in pairs if current != known}
