"""Hostile items and metadata: refused before anything of them has an effect."""

from __future__ import annotations

import fractions
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from dcp_async.formats.zip_item import object_item
from dcp_async.trust import Trust, UntrustedGlobal, decode_metadata, load_item


class Rebuilt:
    """Pickles as a call of the attacker's choice."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


def _load(raw: bytes) -> Any:
    return load_item(io.BytesIO(object_item(raw)), Trust())


def test_object_dtype_that_hides_its_pointers_is_refused() -> None:
    state = (3, "|", None, None, None, -1, -1, 0)
    with pytest.raises(UntrustedGlobal, match="dtype"):
        _load(pickle.dumps(Rebuilt(np.dtype, ("O", False, True), state), protocol=2))


def test_fields_that_reach_past_their_item_are_refused() -> None:
    state = (3, "|", None, ("a",), {"a": (np.dtype("i8"), 4)}, 8, 1, 16)
    with pytest.raises(UntrustedGlobal, match="dtype"):
        _load(pickle.dumps(Rebuilt(np.dtype, ("V8", False, True), state), protocol=2))


def test_build_on_a_class_is_refused_and_changes_nothing() -> None:
    before = fractions.Fraction.__add__
    with pytest.raises(UntrustedGlobal, match="Fraction"):
        _load(b"\x80\x02cfractions\nFraction\n}X\x01\x00\x00\x00xK\x01s}X\x07\x00\x00\x00__add__K\x01s\x86b.")
    assert fractions.Fraction.__add__ is before


def test_metadata_that_patches_a_class_is_refused_and_undone() -> None:
    before = dict(vars(MetadataIndex))
    raw = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadataIndex\n}}\x8c\x05__eq_K\x01s\x86b."
    with pytest.raises(UntrustedGlobal, match="MetadataIndex"):
        decode_metadata(raw)
    assert dict(vars(MetadataIndex)) == before


def test_legacy_streams_are_refused() -> None:
    stream = io.BytesIO()
    torch.save(torch.ones(2), stream, _use_new_zipfile_serialization=False)
    stream.seek(0)
    with pytest.raises(UntrustedGlobal, match="legacy"):
        load_item(stream, Trust())


@pytest.mark.parametrize("record", ["archive/constants.pkl", "archive/code/__torch__.py"])
def test_torchscript_archives_are_refused(record: str) -> None:
    stream = io.BytesIO()
    with torch.serialization._open_zipfile_writer(stream) as writer:
        for name in ("data.pkl", record.removeprefix("archive/")):
            writer.write_record(name, b"x", 1)
    stream.seek(0)
    with pytest.raises(UntrustedGlobal, match="TorchScript"):
        load_item(stream, Trust())


@pytest.mark.parametrize(
    "value",
    [
        np.array(["a", 1], dtype=object),
        np.dtype("O"),
        np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
        np.array(["2020"], dtype="M8[D]"),
        np.dtype("U7"),
        np.zeros((2, 3)).T,
    ],
    ids=repr,
)
def test_honest_numpy_values_pass(value: Any) -> None:
    loaded = _load(pickle.dumps(value, protocol=2))
    assert type(loaded) is type(value)
    assert repr(loaded) == repr(value)
