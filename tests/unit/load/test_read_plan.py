"""Pure planning of reads: boxes, coverage, spans, verification."""

from __future__ import annotations

import itertools
from array import array
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_async import _geometry as boxes
from dcp_async._geometry import flat_slices
from dcp_async.formats.distcp import BLOCK_BYTES, block_digests
from dcp_async.load.fetch import (
    Check,
    DamagedError,
    FetchBuffers,
    Fill,
    Piece,
    Span,
    host_memory,
    make_batches,
    make_spans,
)

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4)


@st.composite
def boxes_in(draw: st.DrawFn) -> tuple[list[int], boxes.Box]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    box = []
    for extent in shape:
        low = draw(st.integers(0, extent - 1))
        box.append((low, draw(st.integers(low + 1, extent))))
    return shape, tuple(box)


@given(boxes_in())
def test_contiguous_run_says_where_a_box_lies(case: tuple[list[int], boxes.Box]) -> None:
    shape, box = case
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    inside = numbers[tuple(slice(low, high) for low, high in box)].reshape(-1)
    run = boxes.contiguous_run(box, shape)
    is_run = bool((inside.diff() == 1).all())
    assert (run is not None) == is_run
    if run is not None:
        assert inside.tolist() == list(range(run[0], run[0] + run[1]))


@given(SHAPES, st.data())
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


@given(boxes_in(), st.data())
def test_check_coverage_finds_every_hole(case: tuple[list[int], boxes.Box], data: st.DataObject) -> None:
    shape, hole = case
    whole = tuple((0, extent) for extent in shape)
    boxes.check_coverage(shape, [whole])
    # everything but the hole: the slabs beside it, dimension by dimension
    slabs: list[boxes.Box] = []
    for dim, (low, high) in enumerate(hole):
        before = hole[:dim]
        rest = whole[dim + 1 :]
        slabs += [(*before, edge, *rest) for edge in ((0, low), (high, shape[dim])) if edge[0] < edge[1]]
    boxes.check_coverage(shape, [*slabs, hole])
    with pytest.raises(boxes.CoverageError, match="no chunk covers"):
        boxes.check_coverage(shape, slabs)


def test_of_two_spans_over_the_same_bytes_each_is_verified() -> None:
    content = bytes(range(256)) * (2 * BLOCK_BYTES // 256)
    targets = [bytearray(len(content)) for _ in range(2)]
    pieces = [
        Piece(0, len(content), memoryview(target), 0, f"t{index}") for index, target in enumerate(targets)
    ]
    tables = {"f": block_digests(memoryview(content))}
    spans = list(make_spans({"f": pieces}, tables, {"f": len(content)}, part_bytes=8 * BLOCK_BYTES))
    assert len(spans) == 2
    batch = [FetchBuffers(span) for span in spans]
    check = Check(batch)
    batch[0].segments[0][1][:] = content  # the second one's bytes are not there yet
    check.arrived(len(content))
    assert not check.done
    with pytest.raises(DamagedError, match=r"2 block\(s\)") as caught:
        check.arrived(2 * len(content))
    assert caught.value.names == ("t1",)


@settings(max_examples=60)
@given(st.data())
def test_spans_deliver_every_byte_once_and_verify_it(data: st.DataObject) -> None:
    nbytes = data.draw(st.integers(1, 6 * BLOCK_BYTES))
    content = bytearray((index * 2654435761) >> 13 & 0xFF for index in range(nbytes))
    digests = block_digests(memoryview(content))
    pieces: list[Piece] = []
    targets: list[tuple[int, bytearray]] = []
    at = 0
    while at < nbytes:
        at += data.draw(st.integers(0, BLOCK_BYTES + 7))
        size = min(data.draw(st.sampled_from([1, 100, 5000, BLOCK_BYTES, 3 * BLOCK_BYTES])), nbytes - at)
        if size <= 0:
            break
        target = bytearray(size)
        pieces.append(Piece(at, size, memoryview(target), 0, f"t{len(pieces)}"))
        targets.append((at, target))
        at += size
    part = data.draw(st.sampled_from([BLOCK_BYTES, 2 * BLOCK_BYTES, 64 * BLOCK_BYTES]))
    verified = data.draw(st.booleans())
    tables = {"f": digests} if verified else {}
    spans = list(make_spans({"f": pieces}, tables, {"f": nbytes}, part_bytes=part))
    bad = data.draw(st.none() | st.integers(0, nbytes - 1)) if verified else None
    if bad is not None:
        content[bad] ^= 1
    complained = False
    named: set[str] = set()
    for span in spans:
        assert span.stop - span.start <= part
        buffers = FetchBuffers(span)
        end = span.start
        for offset, memory in buffers.segments:
            assert offset == end
            memory[:] = content[offset : offset + len(memory)]
            end += len(memory)
        assert end == span.stop
        check = Check([buffers])
        try:
            for there in sorted(data.draw(st.lists(st.integers(0, span.stop - span.start), max_size=4))):
                check.arrived(there)
            check.finish()
        except DamagedError as error:
            complained = True
            named = set(error.names)
        buffers.scatter()
    block = (bad or 0) // BLOCK_BYTES * BLOCK_BYTES
    assert named <= {
        f"t{index}"
        for index, (start, target) in enumerate(targets)
        if start < block + BLOCK_BYTES and block < start + len(target)
    }
    read_at_all = bad is not None and any(span.start <= bad < span.stop for span in spans)
    assert complained == read_at_all
    for start, target in targets:
        assert target == content[start : start + len(target)]


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
