"""Hostile items and metadata: refused before anything of them has an effect."""

from __future__ import annotations

import fractions
import io
import pickle
import tarfile
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from dcp_async.formats.metadata_reader import decode_metadata
from dcp_async.formats.stored_item import pickle_start
from dcp_async.formats.zip_item import object_item
from dcp_async.trust import Trust, UntrustedGlobal, check_globals, load_item


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


def _legacy(value: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    stream.seek(0)
    return stream


def test_legacy_streams_are_read() -> None:
    assert torch.equal(load_item(_legacy({"a": torch.ones(2)}), Trust())["a"], torch.ones(2))


def test_legacy_streams_follow_the_same_trust() -> None:
    assert load_item(_legacy([fractions.Fraction(1, 3)]), Trust()) == [fractions.Fraction(1, 3)]
    with pytest.raises(UntrustedGlobal, match="Own") as caught:
        load_item(_legacy([Own()]), Trust())
    assert caught.value.allowable
    assert load_item(_legacy([Own()]), Trust(safe_globals=(Own,)))[0].value == [1]


def test_legacy_tar_files_are_no_items() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    stream.seek(0)
    with pytest.raises(ValueError, match="neither a zip nor"):
        load_item(stream, Trust())


def _head(value: Any, nbytes: int = 1024) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()[:nbytes]


PLAIN: dict[str, Any] = {
    "float": torch.ones(300),
    "younger_dtype": torch.ones(300, dtype=torch.uint32),
    "float8": torch.ones(300).to(torch.float8_e4m3fn),
    "parameter": torch.nn.Parameter(torch.ones(300)),
    "sparse": torch.eye(300).to_sparse(),
    "conjugate": torch.ones(300, dtype=torch.complex64).conj(),
    "leaf": [1, {"a": torch.ones(300)}, fractions.Fraction(1, 3)],
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("name", PLAIN)
def test_the_head_of_an_honest_item_passes(name: str) -> None:
    head = _head(PLAIN[name])
    check_globals(head, pickle_start(head), Trust())


class Own:
    def __init__(self) -> None:
        self.value = [1]


@pytest.mark.parametrize(
    "pickled",
    [
        pickle.dumps([1, Rebuilt(eval, ("1",))], protocol=2),
        pickle.dumps(Rebuilt(eval, ("1",)), protocol=4),
        pickle.dumps({Own: Own()}, protocol=4),
        pickle.dumps([Own() for _ in range(9)], protocol=2),
        b"(cos\nsystem\no.",
        b"(S'x'\nios\nsystem\n.",
    ],
    ids=["eval", "eval_4", "class_as_key", "many", "obj", "inst"],
)
def test_the_head_of_a_hostile_item_names_its_global(pickled: bytes) -> None:
    head = object_item(pickled)
    with pytest.raises(UntrustedGlobal):
        check_globals(head, pickle_start(head), Trust())
    check_globals(head, pickle_start(head), Trust(unsafe=True))


def test_a_class_that_is_trusted_passes_and_is_not_made() -> None:
    head = object_item(pickle.dumps(Own(), protocol=2))
    with pytest.raises(UntrustedGlobal, match="Own") as caught:
        check_globals(head, pickle_start(head), Trust())
    assert caught.value.allowable
    check_globals(head, pickle_start(head), Trust(safe_globals=(Own,)))


@pytest.mark.parametrize("nbytes", [65, 100, 150, 200])
def test_a_head_that_ends_within_the_pickle_does_not_suffice(nbytes: int) -> None:
    head = _head(torch.ones(300), nbytes)
    with pytest.raises(ValueError, match="readable"):
        check_globals(head, pickle_start(head), Trust())


def test_metadata_with_foreign_objects_beside_what_a_load_needs_is_decoded_without_them() -> None:
    metadata = Metadata(state_dict_metadata={}, planner_data={"x": Own()}, storage_data={})
    metadata.extra = [Rebuilt(eval, ("1/0",))]  # type: ignore[attr-defined]  # as other projects add them
    decoded = decode_metadata(pickle.dumps(metadata))
    assert (decoded.planner_data, vars(decoded)["extra"]) == (None, None)
    assert (decoded.state_dict_metadata, decoded.storage_data) == ({}, {})


@pytest.mark.parametrize("field", ["state_dict_metadata", "storage_data"])
@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: [[x]], lambda x: {(1, x): 2}], ids=["", "list", "key"]
)
def test_metadata_with_foreign_objects_in_what_a_load_needs_is_refused(field: str, wrap: Any) -> None:
    metadata = Metadata(state_dict_metadata={}, storage_data={})
    getattr(metadata, field)["w"] = wrap(Own())
    with pytest.raises(UntrustedGlobal, match="Own"):
        decode_metadata(pickle.dumps(metadata))


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


class _OwnList(list[Any]):
    """Its ``object.__reduce__`` is what copyreg gives in the protocols before 2, whatever the protocol."""

    def __reduce__(self) -> Any:
        return object.__reduce__(self)


class _OwnDict(dict[str, Any]):
    def __reduce__(self) -> Any:
        return object.__reduce__(self)


class _OwnTuple(tuple[Any, ...]):
    def __reduce__(self) -> Any:
        return object.__reduce__(self)


class _OwnSet(set[Any]):
    def __reduce__(self) -> Any:
        return object.__reduce__(self)


class _OwnText(str):
    def __reduce__(self) -> Any:
        return object.__reduce__(self)


@pytest.mark.parametrize(
    "value",
    [_OwnList([1, 2]), _OwnDict(a=1), _OwnTuple((1, 2)), _OwnSet({1, 2}), _OwnText("ab")],
    ids=lambda value: type(value).__name__,
)
def test_a_trusted_class_that_extends_a_builtin_is_rebuilt_with_what_it_holds(value: Any) -> None:
    raw = pickle.dumps(value, protocol=2)
    assert b"_reconstructor" in raw
    loaded = load_item(io.BytesIO(object_item(raw)), Trust(safe_globals=(type(value),)))
    assert type(loaded) is type(value)
    assert loaded == value
