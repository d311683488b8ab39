"""Items made by hand are what torch.save would have meant."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp_async._geometry import contiguous_strides
from dcp_async.formats import zip_item

DTYPES = sorted(zip_item.PLAIN_DTYPES, key=str)


def _raw(nbytes: int, *, as_bool: bool) -> bytes:
    return bytes(index % (2 if as_bool else 251) for index in range(nbytes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (7, 5), (2, 300, 129)], ids=str)
def test_tensor_frame_loads_as_the_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    reference = torch.empty(shape, dtype=dtype)
    payload = _raw(reference.nbytes, as_bool=dtype is torch.bool)
    head, tail = zip_item.tensor_frame(dtype, shape)
    for weights_only in (True, False):
        loaded = torch.load(io.BytesIO(head + payload + tail), weights_only=weights_only)
        assert loaded.dtype is dtype
        assert loaded.shape == reference.shape
        assert loaded.stride() == reference.stride()
        stored = torch.empty(0, dtype=torch.uint8).set_(loaded.untyped_storage())
        assert stored.numpy().tobytes()[: len(payload)] == payload


def test_tensor_frame_of_more_than_4_gib_is_zip64(tmp_path: Any) -> None:
    shape = ((1 << 32) + 8,)
    head, tail = zip_item.tensor_frame(torch.uint8, shape)
    path = tmp_path / "big"
    with path.open("wb") as file:  # sparse: only the ends are written
        file.write(head + b"begin")
        file.seek(len(head) + shape[0] - 3)
        file.write(b"end" + tail)
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded.shape == shape
    assert bytes(loaded[:5].tolist()) == b"begin"
    assert bytes(loaded[-3:].tolist()) == b"end"


@given(st.lists(st.integers(0, 2000), max_size=5))
def test_contiguous_strides_match_torch(shape: list[int]) -> None:
    assert contiguous_strides(shape) == torch.empty(shape, device="meta").stride()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    st.integers(0, 3),
)
def test_padded_object_loads_and_fills_its_room(value: object, more: int) -> None:
    item = zip_item.object_item(pickle.dumps(value, protocol=2))
    room = zip_item.padded_bytes(len(item), 4096) + more * 4096
    padded = zip_item.pad_item(item, room)
    assert len(padded) == room
    assert torch.load(io.BytesIO(padded), weights_only=False) == value


@pytest.mark.parametrize("numel", [0, 1, 1000, 3 << 18])
def test_padded_torch_save_loads(numel: int) -> None:
    stream = io.BytesIO()
    torch.save({"a": torch.arange(numel), "b": [torch.ones(2), "x"]}, stream)
    item = stream.getvalue()
    padded = zip_item.pad_item(item, zip_item.padded_bytes(len(item), 4096))
    loaded = torch.load(io.BytesIO(padded), weights_only=True)
    assert torch.equal(loaded["a"], torch.arange(numel))
    assert loaded["b"][1] == "x"


def test_pad_item_refuses_a_room_that_is_too_small() -> None:
    item = zip_item.object_item(pickle.dumps("x" * 5000, protocol=2))
    with pytest.raises(ValueError, match="does not fit"):
        zip_item.pad_item(item, 4096)
