"""Which box of a tensor an index means, and what is left to do once that box is in memory.

Enters: what stands between brackets, and a shape. Leaves: a Box and an index into it, or IndexError,
TypeError. Pure. Invariant: the box holds all that is wanted, and nothing that no slice reaches over.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import EllipsisType
from typing import TypeAlias

from .._geometry import Box

Index: TypeAlias = "int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]"
"""Whole numbers, slices with steps of at least 1, and one ellipsis."""


def box_of(index: Index, shape: Sequence[int]) -> tuple[Box, tuple[int | slice, ...]]:
    """(the box of a tensor of ``shape`` that ``index`` means, the index to apply to what lies in it).

    Raises: IndexError, TypeError, ValueError, as indexing a tensor does.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    ellipses = [position for position, entry in enumerate(entries) if entry is ...]
    if len(ellipses) > 1:
        raise IndexError("an index has one ellipsis at most")
    num_missing = len(shape) - (len(entries) - len(ellipses))
    if num_missing < 0:
        raise IndexError(f"too many indices for a tensor of {len(shape)} dimensions")
    position = ellipses[0] if ellipses else len(entries)
    entries[position : position + len(ellipses)] = [slice(None)] * num_missing
    box: list[tuple[int, int]] = []
    rest: list[int | slice] = []
    for dim, (entry, extent) in enumerate(zip(entries, shape, strict=True)):
        bounds, inside = _bounds(entry, extent, dim)
        box.append(bounds)
        rest.append(inside)
    return tuple(box), tuple(rest)


def _bounds(entry: object, extent: int, dim: int) -> tuple[tuple[int, int], int | slice]:
    if isinstance(entry, slice):
        start, stop, step = entry.indices(extent)
        if step < 1:
            raise ValueError(f"the step of a slice is at least 1, not {step}")
        return (start, max(start, stop)), slice(None, None, step)
    if isinstance(entry, bool):  # a mask, to a tensor
        raise TypeError("a tensor is read by whole numbers and slices, not by bool")
    try:
        number = operator.index(entry)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        raise TypeError(
            f"a tensor is read by whole numbers and slices, not by {type(entry).__name__}"
        ) from None
    if not -extent <= number < extent:
        raise IndexError(f"index {number} is out of bounds for dimension {dim} of size {extent}")
    return (number % extent, number % extent + 1), 0
