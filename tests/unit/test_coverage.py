"""Whether chunks cover a tensor exactly once, in time and memory of their number."""

from __future__ import annotations

import itertools
import random
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp_async._geometry import Box, CoverageError, check_coverage, first_fault


def _box(*at: int, size: int = 1) -> Box:
    return tuple((low, low + size) for low in at)


@pytest.mark.parametrize("dims", [2, 3, 6])
def test_chunks_on_a_diagonal_take_no_grid(dims: int) -> None:
    boxes = [_box(*[i * 2] * dims) for i in range(300)]
    tracemalloc.start()
    with pytest.raises(CoverageError, match="no chunk covers"):
        check_coverage([601] * dims, boxes)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_a_fine_grid_is_covered() -> None:
    boxes = [_box(*at, size=4) for at in itertools.product(range(0, 40, 4), repeat=3)]
    random.Random(0).shuffle(boxes)
    check_coverage([40, 40, 40], boxes)
    with pytest.raises(CoverageError, match="no chunk covers"):
        check_coverage([40, 40, 40], boxes[1:])


def test_a_pinwheel_is_covered() -> None:
    # no cut goes through it from side to side
    wheel: list[Box] = [
        ((0, 1), (0, 2)),
        ((0, 2), (2, 3)),
        ((2, 3), (1, 3)),
        ((1, 3), (0, 1)),
        ((1, 2), (1, 2)),
    ]
    check_coverage([3, 3], wheel)
    with pytest.raises(CoverageError, match=r"no chunk covers the region that starts at \[1, 1\]"):
        check_coverage([3, 3], wheel[:-1])


OVERLAPS: dict[str, list[Box]] = {
    "overlap_and_hole_of_one_size": [((0, 2),), ((1, 3),)],
    "twice": [((0, 4),), ((0, 4),)],
    "within": [((0, 4),), ((1, 2),)],
    "beyond": [((0, 4),), ((4, 5),)],
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_overlaps_are_found_whatever_their_sum(name: str) -> None:
    with pytest.raises(CoverageError, match="cover"):
        check_coverage([4], OVERLAPS[name])


def test_cuts_in_many_dimensions_are_refused_not_counted() -> None:
    boxes: list[Box] = [tuple((0, 1) for _ in range(40))]
    with pytest.raises(CoverageError, match="dimensions"):
        check_coverage([2] * 40, boxes)
    check_coverage([2] * 40, [tuple((0, 2) for _ in range(40))])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_the_first_fault_is_the_one_that_a_grid_shows(shape: list[int], data: st.DataObject) -> None:
    edges = (st.lists(st.integers(0, extent), min_size=2, max_size=2) for extent in shape)
    side = st.tuples(*(pair.map(lambda two: (min(two), max(two))) for pair in edges))
    boxes = data.draw(st.lists(side, max_size=6))
    counts = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        counts[tuple(slice(low, high) for low, high in box)] += 1
    wrong = (counts != 1).nonzero()
    fault = first_fault(shape, boxes)
    if not len(wrong):
        assert fault is None
    else:
        at = tuple(wrong[0].tolist())
        assert fault == (at, int(counts[at]))


@st.composite
def boxes_in(draw: st.DrawFn) -> tuple[list[int], Box]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    box = []
    for extent in shape:
        low = draw(st.integers(0, extent - 1))
        box.append((low, draw(st.integers(low + 1, extent))))
    return shape, tuple(box)


@given(boxes_in(), st.data())
def test_check_coverage_finds_every_hole(case: tuple[list[int], Box], data: st.DataObject) -> None:
    shape, hole = case
    whole = tuple((0, extent) for extent in shape)
    check_coverage(shape, [whole])
    # everything but the hole: the slabs beside it, dimension by dimension
    slabs: list[Box] = []
    for dim, (low, high) in enumerate(hole):
        before = hole[:dim]
        rest = whole[dim + 1 :]
        slabs += [(*before, edge, *rest) for edge in ((0, low), (high, shape[dim])) if edge[0] < edge[1]]
    check_coverage(shape, [*slabs, hole])
    with pytest.raises(CoverageError, match="no chunk covers"):
        check_coverage(shape, slabs)
