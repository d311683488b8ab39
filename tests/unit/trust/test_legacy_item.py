"""Items in torch's old format: read to the bit by a reader of our own, or refused."""

from __future__ import annotations

import io
import pickle
import struct
from typing import Any

import pytest
import torch

from dcp_async.trust import Trust, UntrustedGlobal, check_globals, load_item
from tests.support.doubles import raw_bytes


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def _load(raw: bytes) -> Any:
    return load_item(io.BytesIO(raw), Trust())


_SHARED = torch.arange(6.0)
VALUES: dict[str, Any] = {
    "tensor": torch.arange(5.0),
    "dtypes": [
        torch.ones(3, dtype=dtype) for dtype in (torch.bfloat16, torch.int8, torch.bool, torch.complex64)
    ],
    "dtypes without a typed storage": [
        torch.ones(3).to(dtype) for dtype in (torch.uint16, torch.float8_e4m3fn)
    ],
    "shared": [_SHARED, _SHARED[2:], _SHARED.view(2, 3).T],
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "sparse": torch.eye(3).to_sparse(),
    "leaf": {"a": [1, "x", (2.5, None)], "b": {1, 2}},
}


@pytest.mark.parametrize("name", VALUES)
def test_what_torch_wrote_is_read(name: str) -> None:
    found, wanted = _load(_saved(VALUES[name])), VALUES[name]
    for mine, theirs in zip(
        *([each] if isinstance(each, torch.Tensor) else list(each) for each in (found, wanted)), strict=True
    ):
        if isinstance(theirs, torch.Tensor):
            assert mine.dtype == theirs.dtype
            assert raw_bytes(mine.to_dense()) == raw_bytes(theirs.to_dense())
        else:
            assert mine == theirs
    if name == "shared":
        assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()
    raw = _saved(VALUES[name])
    check_globals(raw, None, Trust())


_HEAD = _saved(1)[: -len(pickle.dumps(1, 2)) - len(pickle.dumps([], 2))]


def _item(body: bytes, keys: list[str], tail: bytes) -> bytes:
    return _HEAD + b"\x80\x02" + body + b"." + pickle.dumps(keys, 2) + tail


def _tensor(numel: int, size: int, *, kind: str = "FloatStorage", view: bytes = b"N") -> bytes:
    number = pickle.dumps(numel, 2)[2:-1]
    pid = b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    pid += number + view + b"tQ"
    shape = pickle.dumps(size, 2)[2:-1] + b"\x85"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + pid
        + b"K\x00"
        + shape
        + b"K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    )


FOUR = struct.pack("<q4f", 4, 1, 2, 3, 4)
BAD: dict[str, bytes] = {
    "tensor_of_a_number": _item(b"ctorch\nTensor\nM\x10\x27\x85R", [], b""),
    "storage_of_a_number": _item(b"ctorch\nFloatStorage\nM\x10\x27\x85R", [], b""),
    "storage_without_bytes": _item(_tensor(10_000, 10_000), ["0"], struct.pack("<q", 10_000)),
    "storage_without_key": _item(_tensor(4, 4), [], FOUR),
    "storage_of_a_terabyte": _item(_tensor(1 << 40, 1 << 40), ["0"], struct.pack("<q", 1 << 40)),
    "negative": _item(_tensor(-1, 4), ["0"], struct.pack("<q", -1)),
    "other_number": _item(_tensor(4, 4), ["0"], struct.pack("<q3f", 3, 1, 2, 3)),
    "larger_than_its_storage": _item(_tensor(4, 5), ["0"], FOUR),
    "view": _item(_tensor(4, 4, view=b"(X\x01\x00\x00\x001K\x00K\x02t"), ["0"], FOUR),
    "key_twice": _item(_tensor(4, 4), ["0", "0"], FOUR * 2),
    "no_type": _item(_tensor(4, 4, kind="Tensor"), ["0"], FOUR),
    "bomb": _item(b"})" + b"2\x86" * 60 + b"Ns", [], b""),
    "bytearray": _item(b"\x96" + struct.pack("<Q", 5 * 10**9), [], b""),
    "cut": _saved(torch.ones(40))[:-20],
    "version": _saved(1).replace(b"M\xe9\x03.", b"M\xea\x03.", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_what_its_bytes_do_not_hold_is_refused(name: str) -> None:
    with pytest.raises((ValueError, UntrustedGlobal)):
        _load(BAD[name])


def test_one_that_is_whole_is_read_as_it_says() -> None:
    assert _load(_item(_tensor(4, 4), ["0"], FOUR)).tolist() == [1, 2, 3, 4]
