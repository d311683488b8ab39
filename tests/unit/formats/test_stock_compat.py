"""What stock's zips and Metadata say of themselves: CRC-32s, ranks that are merged, paths that are usable."""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_async.formats.stock_compat import merge_ranks, usable_paths
from dcp_async.formats.stored_item import check_records, inflated_bound, pickle_start
from dcp_async.formats.zip_item import object_item, tensor_frame


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


ITEM = saved(torch.arange(40.0))
RECORDS = {
    entry.filename: (entry.header_offset, entry.file_size)
    for entry in zipfile.ZipFile(io.BytesIO(ITEM)).infolist()
}


def test_the_zips_of_torch_and_ours_pass() -> None:
    check_records(memoryview(ITEM), crcs=True)
    check_records(memoryview(object_item(b"x" * 99)), crcs=True)
    head, tail = tensor_frame(torch.float32, (3,))
    check_records(memoryview(head + bytes(12) + tail), crcs=True)


@pytest.mark.parametrize("name", RECORDS)
def test_each_byte_of_each_record_is_checked(name: str) -> None:
    header, nbytes = RECORDS[name]
    start = header + 30 + sum(struct.unpack_from("<HH", ITEM, header + 26))
    for position in range(start, start + nbytes):
        damaged = bytearray(ITEM)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(ValueError, match=f"{name} does not match its CRC-32"):
            check_records(memoryview(damaged), crcs=True)


@given(st.integers(0, len(ITEM) - 1), st.binary(min_size=1, max_size=9))
def test_damage_anywhere_raises_nothing_else(position: int, noise: bytes) -> None:
    damaged = ITEM[:position] + noise + ITEM[position + len(noise) :]
    with contextlib.suppress(ValueError):
        check_records(memoryview(damaged), crcs=True)


@given(st.integers(0, len(ITEM) - 1))
def test_a_zip_that_was_cut_is_damaged(nbytes: int) -> None:
    with pytest.raises(ValueError, match=r"its (zip|record)"):
        check_records(memoryview(ITEM[:nbytes]), crcs=True)


@given(st.binary(max_size=300))
def test_noise_is_damaged(noise: bytes) -> None:
    with pytest.raises(ValueError, match="zip"):
        check_records(memoryview(noise), crcs=True)


def _zip(crc: int, *, wide: bool, comment: bytes = b"") -> bytes:
    """A zip of one record, by the letter of the format; ``wide`` puts its numbers into zip64 fields."""
    content, name = b"payload", b"archive/data/0"
    size = 0xFFFFFFFF if wide else len(content)
    extra = struct.pack("<HHHHQQQ", 7, 0, 1, 24, len(content), len(content), 0) if wide else b""
    local = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 0, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name + content
    entry = struct.pack(
        "<4sHHHHHHIIIHHHHHII",
        *(b"PK\1\2", 0, 0, 0, 0, 0, 0, crc, size, size, len(name), len(extra), 0, 0, 0, 0),
        0xFFFFFFFF if wide else 0,
    )
    entry += name + extra
    at = len(local) + len(entry)
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(entry), len(local))
    end64 += struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
    offset = 0xFFFFFFFF if wide else len(local)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(entry), offset, len(comment))
    return local + entry + (end64 if wide else b"") + end + comment


@pytest.mark.parametrize("wide", [False, True], ids=["zip32", "zip64"])
@pytest.mark.parametrize("comment", [b"", b"written by somebody"], ids=["bare", "comment"])
def test_other_zips_are_understood(wide: bool, comment: bytes) -> None:
    good = zlib.crc32(b"payload")
    check_records(memoryview(_zip(good, wide=wide, comment=comment)), crcs=True)
    check_records(memoryview(_zip(0, wide=wide, comment=comment)), crcs=True)
    with pytest.raises(ValueError, match="data/0 does not match its CRC-32"):
        check_records(memoryview(_zip(good ^ 1, wide=wide, comment=comment)), crcs=True)


def test_the_pickle_is_found_where_it_is_the_first_record() -> None:
    at = pickle_start(ITEM[:200])
    assert at is not None
    assert ITEM[at : at + 2] == b"\x80\x02"
    assert pickle_start(ITEM[:20]) is None
    assert pickle_start(b"\x80\x02" + ITEM) is None
    assert pickle_start(_zip(0, wide=False)) is None


def test_items_are_bounded_by_dtype_and_shape() -> None:
    meta = _tensor((4, 1000), [])
    assert 16_000 < inflated_bound(meta, (4, 1000), 10) < 2_000_000
    assert inflated_bound(meta, (2, 1000), 10) < inflated_bound(meta, (4, 1000), 10)
    assert inflated_bound(None, (), 10) >= 1 << 20
    assert inflated_bound(None, (), 1 << 30) > 1 << 30
    meta.properties.layout = torch.sparse_coo
    assert inflated_bound(meta, (4, 1000), 10) == inflated_bound(None, (), 10)


# --- Metadata


def _tensor(
    size: Sequence[int], chunks: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=torch.float32),
        size=torch.Size(size),
        chunks=[
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes in chunks
        ],
    )


def _of_rank(rank: int, entries: Mapping[str, Any], planner_data: Any = None) -> Metadata:
    places = {}
    for name, entry in entries.items():
        for chunk in getattr(entry, "chunks", [None]):
            index = MetadataIndex(name, chunk.offsets if chunk else None)
            places[index] = _StorageInfo(f"__{rank}_0.distcp", 0, 1)
    return Metadata(state_dict_metadata=dict(entries), storage_data=places, planner_data=planner_data)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.randoms())
def test_rows_of_all_ranks_are_united(rows: list[int], random: Any) -> None:
    size = (sum(rows), 3)
    by_rank: dict[int, Metadata] = {}
    at = 0
    for rank, count in enumerate(rows):
        by_rank[rank] = _of_rank(rank, {"m": _tensor(size, [((at, 0), (count, 3))])})
        at += count
    shuffled = dict(random.sample(sorted(by_rank.items(), key=lambda entry: entry[0]), len(by_rank)))
    merged = merge_ranks(shuffled)
    entry = merged.state_dict_metadata["m"]
    assert isinstance(entry, TensorStorageMetadata)
    covered = [
        row for chunk in entry.chunks for row in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
    ]
    assert sorted(covered) == list(range(sum(rows)))
    for chunk in entry.chunks:
        if chunk.sizes[0]:
            place = merged.storage_data[MetadataIndex("m", chunk.offsets)]
            assert place.relative_path == f"__{_owner(rows, chunk.offsets[0])}_0.distcp"


def _owner(rows: Sequence[int], row: int) -> int:
    for rank, count in enumerate(rows):
        if row < count:
            return rank
        row -= count
    raise AssertionError(row)


def test_paths_of_all_ranks_are_united() -> None:
    leaf = BytesStorageMetadata()
    merged = merge_ranks(
        {
            0: _of_rank(0, {"a.b": leaf}, {"a.b": ("a", "b")}),
            1: _of_rank(1, {"a.c": leaf, "d": leaf}, {"a.c": ("a", "c"), "d": 5}),
        }
    )
    assert merged.planner_data == {"a.b": ("a", "b"), "a.c": ("a", "c")}
    assert set(merged.state_dict_metadata) == {"a.b", "a.c", "d"}


def test_an_item_that_a_rank_describes_but_does_not_store_stays_without_a_place() -> None:
    metadata = _of_rank(0, {"leaf": BytesStorageMetadata(), "m": _tensor((1,), [((0,), (1,))])})
    metadata.storage_data.clear()
    assert merge_ranks({0: metadata}).storage_data == {}
    metadata.storage_data = None
    assert merge_ranks({0: metadata}).storage_data == {}


@pytest.mark.parametrize(
    ("planner_data", "usable"),
    [
        ({"a.0": ("a", 0), "b": ("b",)}, {"a.0": ("a", 0), "b": ("b",)}),
        ({"a.0": ["a", 0]}, {"a.0": ("a", 0)}),
        ({"a.0": ("a", "0")}, {"a.0": ("a", "0")}),
        ({"a.0": ("a.0",)}, {"a.0": ("a.0",)}),
        ({"a.0": ("a", 1)}, {}),
        ({"a.0": ("a", 0.0)}, {}),
        ({"a.0": ("a", False)}, {}),
        ({"a.0": ()}, {}),
        ({"a.0": "a.0"}, {}),
        ({"unknown": ("unknown",)}, {}),
        ({"b": ("b",), "b.c": ("b", "c")}, {"b": ("b",)}),
        ({"b.c": ("b", "c")}, {}),  # b stands at the top itself
        (None, {}),
        ([1], {}),
    ],
)
def test_only_paths_that_fit_their_name_are_used(planner_data: Any, usable: Any) -> None:
    names = dict.fromkeys(("a.0", "b", "b.c"), BytesStorageMetadata())
    assert usable_paths(Metadata(state_dict_metadata={**names}, planner_data=planner_data)) == usable
