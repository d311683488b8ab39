"""Boxes against brute force: every element is read once, from where it lies."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp_async._geometry import (
    Box,
    box_at,
    common,
    contiguous_run,
    cut_box,
    extents,
    flat_slices,
    relative,
    slices,
)


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[list[int], Box]:
    shape = draw(st.lists(st.integers(1, 6), max_size=4))
    lows = [draw(st.integers(0, extent - 1)) for extent in shape]
    highs = [draw(st.integers(low + 1, extent)) for low, extent in zip(lows, shape, strict=True)]
    return shape, tuple(zip(lows, highs, strict=True))


@given(shapes_and_boxes(), st.integers(1, 64), st.integers(1, 256), st.sampled_from([1, 2, 8]))
def test_parts_of_a_box_hold_each_element_once(
    shape_and_box: tuple[list[int], Box], gap: int, limit: int, itemsize: int
) -> None:
    shape, box = shape_and_box
    whole = torch.arange(math.prod(shape)).reshape(shape)
    seen = torch.zeros_like(whole)
    for part, first, nbytes in cut_box(box, shape, itemsize, gap_bytes=gap, limit_bytes=limit):
        assert first % itemsize == 0
        assert nbytes % itemsize == 0
        read = whole.flatten()[first // itemsize : (first + nbytes) // itemsize]
        view = read.as_strided(extents(part), whole.stride())
        assert torch.equal(view, whole[slices(part)])
        seen[slices(part)] += 1
    expected = torch.zeros_like(whole)
    expected[slices(box)] = 1
    assert torch.equal(seen, expected)


@given(shapes_and_boxes())
def test_rows_far_apart_are_not_read_through(shape_and_box: tuple[list[int], Box]) -> None:
    shape, box = shape_and_box
    parts = list(cut_box(box, shape, 1, gap_bytes=1, limit_bytes=1 << 30))
    assert sum(nbytes for _, _, nbytes in parts) == math.prod(extents(box))


@given(shapes_and_boxes(), st.data())
def test_common_is_what_lies_in_both(shape_and_box: tuple[list[int], Box], data: st.DataObject) -> None:
    shape, one = shape_and_box
    lows = [data.draw(st.integers(0, extent - 1)) for extent in shape]
    sizes = [data.draw(st.integers(1, extent - low)) for low, extent in zip(lows, shape, strict=True)]
    other = box_at(lows, sizes)
    marks = torch.zeros(shape)
    marks[slices(one)] += 1
    marks[slices(other)] += 1
    met = common(one, other)
    both = torch.zeros(shape)
    if met is not None:
        both[slices(met)] = 1
        assert torch.equal(marks[slices(other)][slices(relative(met, lows))], torch.full(extents(met), 2.0))
    assert torch.equal(marks == 2, both == 1)


@given(shapes_and_boxes())
def test_contiguous_run_says_where_a_box_lies(case: tuple[list[int], Box]) -> None:
    shape, box = case
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    inside = numbers[tuple(slice(low, high) for low, high in box)].reshape(-1)
    run = contiguous_run(box, shape)
    is_run = bool((inside.diff() == 1).all())
    assert (run is not None) == is_run
    if run is not None:
        assert inside.tolist() == list(range(run[0], run[0] + run[1]))


@given(st.lists(st.integers(1, 6), max_size=4), st.data())
def test_flat_slices_tile_the_range(shape: list[int], data: st.DataObject) -> None:
    numel = torch.Size(shape).numel()
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    numbers = torch.arange(numel).view(shape)
    seen: list[int] = []
    pieces = list(flat_slices(shape, start, stop))
    for box, low, high in pieces:
        assert numbers[box].reshape(-1).tolist() == list(range(low, high))
        seen += range(low, high)
    assert seen == list(range(start, stop))
    assert len(pieces) <= 2 * max(len(shape), 1) + 1
