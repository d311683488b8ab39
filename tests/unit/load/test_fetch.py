"""Fetching: every byte of a span arrives once, and is verified before it is used."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_async.formats import BLOCK_BYTES, block_digests
from dcp_async.load.failures import DamagedError
from dcp_async.load.fetch import Check, FetchBuffers
from dcp_async.load.spans import Piece, make_spans


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
