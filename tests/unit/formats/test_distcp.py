"""Layouts are complete to the byte, and footers notice every flipped bit."""

from __future__ import annotations

import io
import pickle
from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp_async.formats import FileLayout, distcp, zip_item

TENSORS = st.lists(
    st.tuples(
        st.sampled_from([torch.float32, torch.bool, torch.bfloat16, torch.complex128, torch.uint16]),
        st.lists(st.integers(0, 12), max_size=3).map(tuple),
    ),
    max_size=12,
)
SLOTS = st.lists(st.integers(1, 3).map(lambda pages: pages * 4096), max_size=4)


def _image(layout: FileLayout, cut: int) -> bytes:
    """The image as staging makes it: constants by regions of ``cut`` bytes, then payload and slots."""
    image = bytearray(b"\xaa" * layout.image_bytes)
    for start in range(0, layout.image_bytes, cut):
        layout.fill_constants(memoryview(image)[start : start + cut], start)
    for index, (offset, nbytes) in enumerate(zip(layout.payload_offsets, layout.payload_bytes, strict=True)):
        image[offset : offset + nbytes] = bytes([index % 2]) * nbytes
    for number, (offset, nbytes) in enumerate(layout.rooms()):
        item = zip_item.object_item(pickle.dumps(number, protocol=2))
        image[offset : offset + nbytes] = zip_item.pad_item(item, nbytes)
    return bytes(image)


@given(TENSORS, SLOTS, st.sampled_from([1, 7, 64, 4096, 9000]))
def test_every_item_of_a_layout_loads(
    tensors: list[tuple[torch.dtype, tuple[int, ...]]], slots: list[int], cut: int
) -> None:
    layout = distcp.DISTCP.layout(tensors, slots)
    image = _image(layout, cut)
    for index, (offset, nbytes) in enumerate(zip(layout.item_offsets, layout.item_bytes, strict=True)):
        value = torch.load(io.BytesIO(image[offset : offset + nbytes]), weights_only=False)
        if index < len(tensors):
            dtype, shape = tensors[index]
            assert value.dtype is dtype
            assert value.shape == shape
            assert set(bytes(value.untyped_storage())) <= {index % 2}
        else:
            assert value == index - len(tensors)


@given(TENSORS, SLOTS, st.sampled_from([1, 7, 64, 4096, 9000]))
def test_constants_do_not_depend_on_where_regions_are_cut(
    tensors: list[tuple[torch.dtype, tuple[int, ...]]], slots: list[int], cut: int
) -> None:
    layout = distcp.DISTCP.layout(tensors, slots)
    image = _image(layout, cut)
    assert image == _image(layout, layout.image_bytes or 1)
    inside: set[int] = set()
    for offset, nbytes in zip(layout.item_offsets, layout.item_bytes, strict=True):
        inside.update(range(offset, offset + nbytes))
    assert all(image[at] == 0 for at in range(layout.image_bytes) if at not in inside), "old bytes in a gap"


@given(TENSORS, SLOTS)
def test_layout_is_aligned_and_disjoint(
    tensors: list[tuple[torch.dtype, tuple[int, ...]]], slots: list[int]
) -> None:
    layout = distcp.DISTCP.layout([*tensors, (torch.float32, (1 << 18,))], slots)
    end = 0
    for offset, nbytes in zip(layout.item_offsets, layout.item_bytes, strict=True):
        assert offset >= end
        end = offset + nbytes
    assert all(offset % 64 == 0 for offset in layout.payload_offsets)
    assert layout.payload_offsets[-1] % 4096 == 0
    assert layout.image_bytes % 4096 == 0
    assert layout.own_bytes == layout.image_bytes
    assert layout.image_bytes >= end


@given(TENSORS, st.integers(0, 200_000), st.integers(0, 200_000))
def test_tensors_between_finds_exactly_the_overlapping(
    tensors: list[tuple[torch.dtype, tuple[int, ...]]], one: int, other: int
) -> None:
    layout = distcp.DISTCP.layout(tensors, [])
    start, stop = sorted((one, other))
    found = [index for index in layout.tensors_between(start, stop) if layout.payload_bytes[index]]
    assert found == [
        index
        for index, (offset, nbytes) in enumerate(
            zip(layout.payload_offsets, layout.payload_bytes, strict=True)
        )
        if nbytes and offset < stop and start < offset + nbytes
    ]


@given(st.binary(min_size=1, max_size=300_000), st.data())
def test_footer_round_trips_and_notices_a_flipped_bit(content: bytes, data: st.DataObject) -> None:
    image = content.ljust(-(-len(content) // 4096) * 4096, b"\0")
    footer = distcp.Footer(image_bytes=len(image), digests=distcp.block_digests(memoryview(image)))
    raw = footer.encode()
    nbytes = len(image) + len(raw)
    assert len(raw) == distcp.footer_bytes(len(image))
    whole = image + raw
    read = distcp.Footer.decode(whole[-distcp.footer_span(nbytes) :], nbytes)
    assert read == footer
    assert read.digest == footer.digest
    table = 8 * distcp.num_blocks(len(image))
    at = data.draw(st.integers(0, table - 1) | st.integers(len(raw) - 40, len(raw) - 1))
    damaged = bytearray(raw)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(distcp.FooterError):
        distcp.Footer.decode((image + damaged)[-distcp.footer_span(nbytes) :], nbytes)


def test_block_digests_notice_one_flipped_byte_in_its_block() -> None:
    image = bytearray(5 * distcp.BLOCK_BYTES + 4096)
    before = distcp.block_digests(memoryview(image))
    image[3 * distcp.BLOCK_BYTES + 17] ^= 1
    after = distcp.block_digests(memoryview(image))
    assert [index for index in range(len(before)) if before[index] != after[index]] == [3]
    assert isinstance(after, array)


def test_footer_of_a_newer_version_is_refused_by_name() -> None:
    footer = distcp.Footer(image_bytes=4096, digests=distcp.block_digests(memoryview(bytes(4096))))
    raw = bytearray(footer.encode())
    raw[-32:-28] = (distcp.FOOTER_VERSION + 1).to_bytes(4, "little")
    with pytest.raises(distcp.FooterError, match="version 2"):
        distcp.Footer.decode(bytes(raw), 4096 + len(raw))
