"""Pieces of a tensor on several ranks cover it exactly once: those that overlap and leave a hole of the same
size are refused, whatever their layout, and those that fit are not."""

from __future__ import annotations

import itertools
import random

import pytest

from dcp_async.planning.conflicts import ConflictError, check_covered

Box = tuple[tuple[int, ...], tuple[int, ...]]

OVERLAPS: dict[str, tuple[tuple[int, ...], list[Box]]] = {
    "rows": ((6, 4), [((0, 0), (3, 4)), ((2, 0), (3, 4))]),
    "columns": ((4, 6), [((0, 0), (4, 3)), ((0, 2), (4, 3))]),
    "a mesh": ((4, 4), [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 2)), ((1, 2), (2, 2))]),
    "in one of three dimensions": ((2, 2, 4), [((0, 0, 0), (2, 2, 2)), ((0, 0, 1), (2, 2, 2))]),
    "a piece inside of another": ((9,), [((0,), (6,)), ((2,), (3,))]),
    "one place, two sizes": ((5,), [((0,), (3,)), ((0,), (2,))]),
}


def check(size: tuple[int, ...], boxes: list[Box]) -> None:
    check_covered("w", size, dict.fromkeys(boxes), list)


@pytest.mark.parametrize(("size", "boxes"), OVERLAPS.values(), ids=OVERLAPS)
def test_overlapping_pieces_are_refused_by_name(size: tuple[int, ...], boxes: list[Box]) -> None:
    with pytest.raises(ConflictError, match=r"w: the pieces at .* overlap"):
        check(size, boxes)


@pytest.mark.parametrize("box", [((5,), (2,)), ((-1,), (2,)), ((7,), (0,))])
def test_a_piece_outside_of_the_tensor_is_refused(box: Box) -> None:
    with pytest.raises(ConflictError, match=r"w: the piece of .* lies outside"):
        check((6,), [((0,), (4,)), box])


def cut(generator: random.Random, box: Box, depth: int) -> list[Box]:
    """``box`` in random pieces, none of which is like another."""
    offsets, shape = box
    dim = generator.randrange(len(shape))
    if depth == 0 or shape[dim] < 2:
        return [box]
    at = generator.randrange(1, shape[dim])
    low = (offsets, (*shape[:dim], at, *shape[dim + 1 :]))
    high = (
        (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :]),
        (*shape[:dim], shape[dim] - at, *shape[dim + 1 :]),
    )
    return cut(generator, low, depth - 1) + cut(generator, high, depth - 1)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_covers_a_tensor_once_is_taken_and_a_shifted_piece_is_not(seed: int) -> None:
    generator = random.Random(seed)
    size = tuple(generator.randrange(2, 9) for _ in range(generator.randrange(1, 4)))
    boxes = cut(generator, ((0,) * len(size), size), 5)
    check(size, generator.sample(boxes, len(boxes)))
    check(size, [*boxes, ((0,) * len(size), (0,) * len(size))])  # an empty piece takes no room
    for place, (offsets, shape) in itertools.islice(enumerate(boxes), 5):
        for dim, extent in enumerate(size):
            step = 1 if offsets[dim] + shape[dim] < extent else -1
            if offsets[dim] + step >= 0:
                moved = ((*offsets[:dim], offsets[dim] + step, *offsets[dim + 1 :]), shape)
                with pytest.raises(ConflictError):
                    check(size, [*boxes[:place], moved, *boxes[place + 1 :]])
