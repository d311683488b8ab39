"""Spans: pure planning of what one call reads."""

from __future__ import annotations

import itertools
from array import array
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp_async.load.spans import Fill, Span, host_memory, make_batches


@given(
    st.lists(st.tuples(st.sampled_from("fgh"), st.integers(0, 9), st.integers(1, 9)), max_size=30),
    st.integers(1, 30),
)
def test_batches_keep_every_span_in_order_and_stay_small(
    places: list[tuple[str, int, int]], part_bytes: int
) -> None:
    spans = [Span(file, start, start + nbytes, [], None) for file, start, nbytes in places]
    batches = list(make_batches(spans, part_bytes=part_bytes))
    assert [span for batch in batches for span in batch] == spans
    for batch in batches:
        assert len({span.file for span in batch}) == 1
        assert len(batch) == 1 or sum(span.stop - span.start for span in batch) <= part_bytes
    for batch, following in itertools.pairwise(batches):  # and no batch could have taken the next span too
        more = sum(span.stop - span.start for span in [*batch, following[0]])
        assert more > part_bytes or following[0].file != batch[0].file


def test_fill_is_finished_once_when_its_last_piece_arrives() -> None:
    finished: list[bytes] = []
    fill = Fill(10, lambda buffer: finished.append(bytes(buffer)))
    fill.memory()[:6] = b"abcdef"
    fill.filled(6)
    assert finished == []
    fill.memory()[6:] = b"ghij"
    fill.filled(4)
    assert finished == [b"abcdefghij"]


def test_host_memory_is_the_tensor() -> None:
    tensor = torch.zeros(5, dtype=torch.int16)
    host_memory(tensor)[2:4] = b"\x07\x00"
    assert tensor.tolist() == [0, 7, 0, 0, 0]
    empty: Any = torch.empty(0)
    assert len(host_memory(empty)) == 0
    assert isinstance(array("Q"), array)
