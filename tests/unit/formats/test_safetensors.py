"""Safetensors files before a byte of a tensor is known: each is whole by itself, whatever ranks hold."""

from __future__ import annotations

import json
import logging
import random
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp_async.formats import (
    PublicFiles,
    PublicTensor,
    SafetensorsFormat,
    decode_header,
    files_of_index,
    safetensors,
)

Tensors = list[tuple[torch.dtype, tuple[int, ...]]]

TENSORS = st.lists(
    st.tuples(
        st.sampled_from([torch.float32, torch.bool, torch.bfloat16, torch.int64, torch.complex128]),
        st.lists(st.integers(0, 40), max_size=3).map(tuple),
    ),
    max_size=12,
)


def named(tensors: Tensors, names: list[str]) -> list[PublicTensor]:
    return [
        PublicTensor(names=[name], dtype=dtype, shape=shape)
        for name, (dtype, shape) in zip(names, tensors, strict=True)
    ]


def files_of(chosen: SafetensorsFormat, tensors: list[PublicTensor]) -> PublicFiles:
    files = chosen.public_files(tensors)
    assert files is not None
    return files


def header_of(files: PublicFiles) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", files.heads[0][:8])
    header: dict[str, Any] = json.loads(files.heads[0][8 : 8 + length])
    return header


@given(TENSORS, st.integers(1, 9000), st.randoms())
def test_every_file_holds_its_tensors_without_a_gap(
    tensors: Tensors, shard_bytes: int, random: random.Random
) -> None:
    names = [f"t{number}" for number in range(len(tensors))]
    chosen, given_as = SafetensorsFormat(max_shard_bytes=shard_bytes), named(tensors, names)
    files = chosen.public_files(given_as)
    wanted = {name for name, (dtype, _) in zip(names, tensors, strict=True) if dtype.itemsize < 16}
    if files is None:
        assert not wanted
        return
    seen, weights, index = set[str](), {}, None
    for number, (name, nbytes, head) in enumerate(zip(files.names, files.lengths, files.heads, strict=True)):
        if name.endswith(".json"):
            assert nbytes == len(head)
            index = files_of_index(head)
            continue
        stored = decode_header(head[8:], nbytes)  # raises for a gap or an overlap
        assert struct.unpack("<Q", head[:8]) == (len(head) - 8,)
        assert len(head) % 64 == 0
        for tensor in stored:
            position = names.index(tensor.name)
            assert (tensor.dtype, tensor.shape) == tensors[position]
            assert files.places[position] == (number, tensor.start)
            assert tensor.start % tensor.dtype.itemsize == 0
            seen.add(tensor.name)
            weights[tensor.name] = name
        payload = sum(tensor.stop - tensor.start for tensor in stored)
        assert payload == nbytes - len(head)
        assert payload <= shard_bytes or len(stored) == 1
    assert seen == wanted
    assert index == (weights if len(set(weights.values())) > 1 else None)
    # whichever rank speaks first
    random.shuffle(given_as)
    again = files_of(chosen, given_as)
    assert (again.names, again.lengths, again.heads) == (files.names, files.lengths, files.heads)


def test_only_weights_are_public_under_names_without_their_part() -> None:
    tensors: Tensors = [(torch.float32, (2,)), (torch.float32, (3,)), (torch.bfloat16, (4,))]
    chosen = SafetensorsFormat("model", name="weights", metadata={"run": "7"})
    files = files_of(chosen, named(tensors, ["model.a", "models.b", "model.c.d"]))
    assert files.names == ["weights.safetensors"]
    assert files.places.keys() == {0, 2}
    header = header_of(files)
    assert header.pop("__metadata__") == {"format": "pt", "run": "7"}
    assert list(header) == ["a", "c.d"]


def test_a_tied_name_is_noted_and_found_under_the_weights() -> None:
    tied = PublicTensor(names=["ema.x", "model.x", "model.y"], dtype=torch.float32, shape=(2,))
    header = header_of(files_of(SafetensorsFormat("model"), [tied]))
    assert header.pop("__metadata__") == {"format": "pt", "y": "x"}
    assert list(header) == ["x"]


def test_a_tied_name_takes_the_place_of_no_metadata() -> None:
    tied = PublicTensor(names=["w", "format", "y"], dtype=torch.float32, shape=(2,))
    header = header_of(files_of(SafetensorsFormat(), [tied]))
    assert header["__metadata__"] == {"format": "pt", "y": "w"}


def test_a_header_that_readers_refuse_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = named([(torch.float32, ())] * 50, [f"w{number}" for number in range(50)])
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(ValueError, match="max_shard_bytes"):
        SafetensorsFormat().public_files(tensors)
    assert SafetensorsFormat(max_shard_bytes=40).public_files(tensors) is not None


def test_what_such_files_cannot_hold_lies_beside_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    tensors: Tensors = [
        (torch.complex128, (2,)),
        (torch.float32, (2,)),
        (torch.float32, ()),
        (torch.float32, ()),
    ]
    with caplog.at_level(logging.WARNING):
        files = files_of(SafetensorsFormat(), named(tensors, ["c", "__metadata__", "half \ud800", "\u00e9"]))
    assert files.places.keys() == {3}
    assert "3 tensors" in caplog.text
    assert "c (torch.complex128)" in caplog.text


def test_a_part_without_tensors_is_refused() -> None:
    tensors = named([(torch.float32, (2,)), (torch.complex128, ())], ["model.a", "odd.b"])
    with pytest.raises(ValueError, match=r"weights='modle'.* the state has model, odd"):
        SafetensorsFormat("modle").public_files(tensors)
    with pytest.raises(ValueError, match="no tensor that such a file can hold"):
        SafetensorsFormat("odd").public_files(tensors)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"weights": ""}, "weights=''"),
        ({"weights": 3}, "weights=3"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0"),
        ({"max_shard_bytes": "5GB"}, "max_shard_bytes='5GB'"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"name": ".hidden"}, "name='.hidden'"),
        ({"name": "__0_0-x"}, "name='__0_0-x'"),
        ({"name": "a\n"}, r"name='a\\n'"),
        ({"name": "a\ud800"}, r"name='a\\ud800'"),
        ({"name": "a" * 201}, "name='aaa"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SafetensorsFormat(**arguments)  # type: ignore[arg-type]


def test_metadata_is_text() -> None:
    with pytest.raises(TypeError, match=r"metadata\['step'\]"):
        SafetensorsFormat(metadata={"step": 7})  # type: ignore[dict-item]
