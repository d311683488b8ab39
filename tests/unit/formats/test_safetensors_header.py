"""Headers of safetensors files, whoever wrote them: what is believed of one fits the file, to the byte."""

from __future__ import annotations

import json
import struct
from math import prod
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dcp_async.formats import (
    LENGTH_BYTES,
    AmbiguousNameError,
    HeaderError,
    decode_header,
    header_bytes,
    join_files,
)

SIZES = st.integers(-1, 5) | st.sampled_from((1 << 31, 1 << 61, 1 << 63, 1 << 70))
KINDS = st.sampled_from(("F32", "BF16", "U8", "F8_E4M3", "F4", "", "f32")) | st.none()
ENTRIES = st.fixed_dictionaries(
    {"dtype": KINDS, "shape": st.lists(SIZES, max_size=3), "data_offsets": st.lists(SIZES, max_size=3)}
)
NAMES = st.text(max_size=3)
ANYTHING = st.recursive(st.none() | st.booleans() | SIZES | NAMES, lambda inner: st.lists(inner, max_size=3))


@st.composite
def honest(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header that describes its bytes, and how many there are."""
    entries, end = {}, 0
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        nbytes = 4 * prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    return entries, end


@st.composite
def changed(draw: st.DrawFn) -> tuple[Any, int]:
    """An honest one of which one part says something else."""
    entries, nbytes = draw(honest())
    entries[draw(st.sampled_from([*entries, "x", "__metadata__"]))] = draw(ENTRIES | ANYTHING)
    return entries, nbytes + draw(st.integers(-1, 8))


@given(honest() | changed(), st.binary(max_size=8))
def test_what_is_believed_fits_the_file_and_the_rest_is_told(case: tuple[Any, int], tail: bytes) -> None:
    header, nbytes = case
    raw = json.dumps(header).encode() + tail
    file_bytes = LENGTH_BYTES + len(raw) + max(nbytes, 0)
    assert header_bytes(struct.pack("<Q", len(raw)), file_bytes) == len(raw)
    try:
        tensors = decode_header(raw, file_bytes)
        metadata, locations = join_files({"a": tensors, "b": tensors[:1]}, None)
    except (HeaderError, AmbiguousNameError) as error:
        str(error).encode("utf-8", "backslashreplace")
        return
    end = LENGTH_BYTES + len(raw)
    for tensor in tensors:
        assert (tensor.start, tensor.stop) == (end, end + tensor.dtype.itemsize * prod(tensor.shape))
        end = tensor.stop
    assert end == file_bytes
    assert metadata.state_dict_metadata.keys() == {name for name, _ in locations}


@given(honest())
def test_an_honest_header_is_believed(case: tuple[dict[str, Any], int]) -> None:
    header, nbytes = case
    raw = json.dumps(header).encode()
    tensors = decode_header(raw, LENGTH_BYTES + len(raw) + nbytes)
    assert {tensor.name for tensor in tensors} == header.keys() - {"__metadata__"}
    for tensor in tensors:
        assert list(tensor.shape) == header[tensor.name]["shape"]


@given(st.binary(max_size=8), st.integers(0, 1 << 40))
def test_a_length_is_never_more_than_the_file_has(first: bytes, file_bytes: int) -> None:
    try:
        length = header_bytes(first, file_bytes)
    except HeaderError:
        return
    assert LENGTH_BYTES + length <= file_bytes
