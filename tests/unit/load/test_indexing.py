"""An index of a tensor becomes a box to read and an index into it, or the error that indexing gives."""

from __future__ import annotations

from types import EllipsisType

import pytest
import torch

from dcp_async.load.indexing import Index, box_of

TENSOR = torch.arange(5 * 6 * 7).reshape(5, 6, 7)


@pytest.mark.parametrize(
    ("index", "box"),
    [
        ((slice(1, 3),), ((1, 3), (0, 6), (0, 7))),
        (slice(-2, None), ((3, 5), (0, 6), (0, 7))),
        (2, ((2, 3), (0, 6), (0, 7))),
        ((-1, slice(4), 0), ((4, 5), (0, 4), (0, 1))),
        ((..., slice(2, 7, 3)), ((0, 5), (0, 6), (2, 7))),
        ((1, ..., 6), ((1, 2), (0, 6), (6, 7))),
        ((slice(4, 2), slice(9, 12)), ((4, 4), (6, 6), (0, 7))),
        ((slice(1, 5, 2), slice(None, None, 4)), ((1, 5), (0, 6), (0, 7))),
        ((), ((0, 5), (0, 6), (0, 7))),
        (..., ((0, 5), (0, 6), (0, 7))),
        ((1, 2, ..., 3), ((1, 2), (2, 3), (3, 4))),
    ],
)
def test_a_box_and_what_is_left_give_what_the_index_means(index: Index, box: object) -> None:
    found_box, rest = box_of(index, TENSOR.shape)
    assert found_box == box
    read = TENSOR[tuple(slice(*bounds) for bounds in found_box)]
    assert torch.equal(read[rest], TENSOR[index])


def test_a_tensor_without_dimensions_has_one_element() -> None:
    assert [box_of(index, ()) for index in ((), ...)] == [((), ())] * 2


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ((0, 0, 0, 0), IndexError),
        (5, IndexError),
        ((0, -7), IndexError),
        ((..., ...), IndexError),
        (True, TypeError),
        (1.5, TypeError),
        (None, TypeError),
        (slice(None, None, -1), ValueError),
    ],
)
def test_an_index_that_can_not_be_is_refused(
    index: int | slice | EllipsisType | tuple[int, ...], error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"index|indices|slice|whole numbers"):
        box_of(index, TENSOR.shape)
