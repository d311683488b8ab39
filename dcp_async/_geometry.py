"""Boxes of a tensor: where two of them meet, and which bytes of a row-major tensor hold one.

Enters: boxes, as [start, stop) per dimension, and shapes. Leaves: boxes and byte ranges. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

Offsets = tuple[int, ...]
"""Per dimension, of a tensor's first element in another; sizes have the same form."""
Box = tuple[tuple[int, int], ...]
"""Per dimension, [start, stop)."""


def box_at(offsets: Sequence[int], sizes: Sequence[int]) -> Box:
    """The box of ``sizes`` that begins at ``offsets``."""
    return tuple((low, low + extent) for low, extent in zip(offsets, sizes, strict=True))


def common(one: Box, other: Box) -> Box | None:
    """Where two boxes meet, None if they do not."""
    met = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return met if all(low < high for low, high in met) else None


def relative(box: Box, origin: Sequence[int]) -> Box:
    """``box`` as seen from ``origin``."""
    return tuple((low - start, high - start) for (low, high), start in zip(box, origin, strict=True))


def shifted(box: Box, origin: Box, to: Box) -> Box:
    """``box``, which lies in ``origin``, as it lies in ``to``, which is as large."""
    return tuple(
        (low + new - old, high + new - old)
        for (low, high), (old, _), (new, _) in zip(box, origin, to, strict=True)
    )


def slices(box: Box) -> tuple[slice, ...]:
    """The index that selects ``box``."""
    return tuple(slice(low, high) for low, high in box)


def extents(box: Box) -> tuple[int, ...]:
    """The shape of ``box``."""
    return tuple(high - low for low, high in box)


# a box has two to their power corners
MAX_CUT_DIMS = 16
"""In so many dimensions a tensor may be cut into pieces."""


def first_fault(shape: Sequence[int], boxes: Sequence[Box]) -> tuple[tuple[int, ...], int] | None:
    """The first element of ``shape`` that ``boxes`` do not cover exactly once, and how often they do; None if
    there is none.

    By corners: how often elements are covered is determined by where that changes in every dimension at once,
    which is at the corners of boxes only. Takes time by the number of boxes, not by where they lie.

    Raises: ValueError if the boxes cut more than ``MAX_CUT_DIMS`` dimensions.
    """
    whole = tuple((0, extent) for extent in shape)
    # a dimension that no box cuts adds nothing but twice the corners
    cut = [dim for dim, side in enumerate(whole) if any(box[dim] != side for box in boxes)]
    if len(cut) > MAX_CUT_DIMS:
        raise ValueError(f"it is cut in {len(cut)} dimensions, more than {MAX_CUT_DIMS}")
    changes: Counter[tuple[int, ...]] = Counter()
    # the whole counts -1, so that exact cover leaves no change anywhere
    for box, sign in ((whole, -1), *((box, 1) for box in boxes)):
        corners: list[tuple[tuple[int, ...], int]] = [((), sign)]
        for dim in cut:
            low, high = box[dim]
            corners = [
                (corner, change * side)
                for start, change in corners
                for corner, side in (((*start, low), 1), ((*start, high), -1))
            ]
        for corner, change in corners:
            changes[corner] += change
    # of all corners with a change the first has nothing before it that could make up for it
    wrong = min((corner for corner, change in changes.items() if change), default=None)
    if wrong is None:
        return None
    position = dict(zip(cut, wrong, strict=True))
    return tuple(position.get(dim, 0) for dim in range(len(shape))), 1 + changes[wrong]


def _reach(box: Box, strides: Sequence[int]) -> tuple[int, int]:
    """(first element, one past the last) of ``box`` in memory."""
    first = sum(low * stride for (low, _), stride in zip(box, strides, strict=True))
    last = sum((high - 1) * stride for (_, high), stride in zip(box, strides, strict=True))
    return first, last + 1


def contiguous_run(box: Box, shape: Sequence[int]) -> tuple[int, int] | None:
    """(first element, number) if ``box`` is one run of a row-major ``shape``, else None."""
    start, numel, partial = 0, 1, False
    # from the last dimension: once one is not whole, those before it may hold one index only
    for (low, high), extent in zip(reversed(box), reversed(shape), strict=True):
        if partial and high - low != 1:
            return None
        partial = partial or high - low != extent
        numel *= high - low
    stride = 1
    for (low, _), extent in zip(reversed(box), reversed(shape), strict=True):
        start += low * stride
        stride *= extent
    return start, numel


def cut_box(
    box: Box, shape: Sequence[int], itemsize: int, *, gap_bytes: int, limit_bytes: int
) -> Iterator[tuple[Box, int, int]]:
    """Cut ``box`` of a row-major ``shape`` into boxes that are each read by one contiguous range.

    Ranges are at most ``limit_bytes`` long where rows are, and skip what lies between two rows if that is at
    least ``gap_bytes``. Yields (box, first byte, number of bytes).
    """
    strides = contiguous_strides(shape)
    first, stop = _reach(box, strides)
    span = (stop - first) * itemsize
    # dimensions of one index are no cut: the first that has more is where rows follow each other
    dim = next((dim for dim, (low, high) in enumerate(box) if high - low > 1), None)
    if dim is None:
        yield box, first * itemsize, span
        return
    low, high = box[dim]
    row = (*box[:dim], (low, low + 1), *box[dim + 1 :])
    row_first, row_stop = _reach(row, strides)
    step = strides[dim] * itemsize
    if step - (row_stop - row_first) * itemsize >= gap_bytes:
        # one row at a time: what lies between two is worth skipping
        rows = 1
    elif span <= limit_bytes:
        yield box, first * itemsize, span
        return
    else:
        rows = max(limit_bytes // step, 1)
    for start in range(low, high, rows):
        some = (*box[:dim], (start, min(start + rows, high)), *box[dim + 1 :])
        yield from cut_box(some, shape, itemsize, gap_bytes=gap_bytes, limit_bytes=limit_bytes)


class CoverageError(ValueError):
    """The checkpoint's chunks do not cover what is wanted."""


def check_coverage(shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Raises CoverageError unless ``boxes`` cover every element of ``shape`` exactly once: never zeros where
    a chunk is missing, never one of two values where chunks contradict each other."""
    if 0 in shape or not shape:
        # nothing to cover, or a scalar, whose box has no sides: any chunk holds it
        if not shape and not boxes:
            raise CoverageError("no chunk holds its value")
        return
    try:
        fault = first_fault(shape, boxes)
    except ValueError as error:
        raise CoverageError(str(error)) from None
    if fault is not None:
        start, times = fault
        how = "no chunk covers" if times == 0 else f"{times} chunks cover"
        raise CoverageError(f"{how} the region that starts at {list(start)}")


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements, as torch gives them to a fresh tensor of ``shape``."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        # an extent of 0 counts as 1, as it does in torch
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return tuple(strides)


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor fills its memory once, in whatever order; slices and expanded tensors do not."""
    expected = 1
    for stride, extent in sorted(zip(strides, shape, strict=True)):
        # with one index there is no step, and torch lets the stride be anything
        if extent != 1:
            if stride != expected:
                return False
            expected *= extent
    return True


def flat_slices(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int | slice, ...], int, int]]:
    """Cut elements [start, stop) of a row-major enumeration of ``shape`` into boxes.

    Yields (index, first, last): the box and its place in the enumeration. At most two boxes per dimension and
    one in the middle.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (slice(start, stop),) if shape else (), start, stop
        return
    row = 1
    for extent in shape[1:]:
        row *= extent
    # the whole rows in the middle are one box; what is left before and behind them is cut likewise, by one
    # dimension less
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        for index, low, high in flat_slices(shape[1:], start - last * row, stop - last * row):
            yield (last, *index), last * row + low, last * row + high
        return
    if start < first * row:
        for index, low, high in flat_slices(shape[1:], start - (first - 1) * row, row):
            yield (first - 1, *index), (first - 1) * row + low, (first - 1) * row + high
    if first < last:
        yield (slice(first, last),), first * row, last * row
    if last * row < stop:
        for index, low, high in flat_slices(shape[1:], 0, stop - last * row):
            yield (last, *index), last * row + low, last * row + high
