"""`.metadata` of torch versions that this suite does not run on: read whatever a newer stock appends, refused
only for what a load must understand; written so that the oldest stock of the range reads it."""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_async.formats.metadata_reader import Unknown, decode_metadata
from dcp_async.formats.metadata_writer import Group, metadata_template
from dcp_async.trust import UntrustedGlobal

UID = "0123456789abcdef"
_KEYS = ("w", "leaf")


class NewerProperties(TensorProperties):
    """Pickles as a newer stock's would, in a form of the test's choice."""

    state: tuple[Any, ...] = ()

    def __getstate__(self) -> tuple[Any, ...]:
        return self.state


class Novel:
    """Of a module that only the writer had."""


def sound(properties: TensorProperties | None = None) -> Metadata:
    """A small Metadata, as stock makes it."""
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    tensor = TensorStorageMetadata(
        properties or TensorProperties(dtype=torch.bfloat16), torch.Size([2, 3]), [chunk]
    )
    places = {
        MetadataIndex("w", torch.Size([0, 0]), 0): _StorageInfo("__0_0.distcp", 0, 99),
        MetadataIndex("leaf"): _StorageInfo("__0_0.distcp", 99, 9),
    }
    return Metadata(
        {"w": tensor, "leaf": BytesStorageMetadata()},
        planner_data={"w": ("w",), "leaf": ("leaf",)},
        storage_data=places,
        storage_meta=StorageMeta(checkpoint_id="c"),
    )


def pickled(metadata: Metadata) -> bytes:
    """As if ``NewerProperties`` were stock's own class."""
    raw = pickle.dumps(metadata, protocol=2)
    ours = f"c{NewerProperties.__module__}\n{NewerProperties.__name__}\n".encode()
    stock = f"c{TensorProperties.__module__}\n{TensorProperties.__name__}\n".encode()
    return raw.replace(ours, stock)


def assert_sound(decoded: Metadata) -> None:
    assert tuple(decoded.state_dict_metadata) == _KEYS
    tensor = decoded.state_dict_metadata["w"]
    assert isinstance(tensor, TensorStorageMetadata)
    assert tensor.size == torch.Size([2, 3])
    assert type(tensor.properties) is TensorProperties
    assert tensor.properties == TensorProperties(dtype=torch.bfloat16)
    assert [(each.offsets, each.sizes) for each in tensor.chunks] == [((0, 0), (2, 3))]
    places = decoded.storage_data
    assert (places[MetadataIndex("w", torch.Size([0, 0]))].offset, places[MetadataIndex("leaf")].length) == (
        0,
        9,
    )


MORE: dict[str, tuple[Any, ...]] = {
    "five, as to torch 2.14": (),
    "six, as torch 2.15 has them": ((3, 1),),
    "six, with none": (None,),
    "seven": ((3, 1), "pinned"),
    "a nested one": (None, {"quantization": [1, 2.5, ("x",)]}),
    "a foreign one": (None, Novel()),
    "a foreign class": (Novel, Novel, Novel),
}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_fields_that_a_newer_stock_appends_to_the_properties_are_passed_over(more: tuple[Any, ...]) -> None:
    properties = NewerProperties(dtype=torch.bfloat16)
    usual: Any = TensorProperties.__getstate__
    properties.state = (*usual(properties)[:5], *more)
    assert_sound(decode_metadata(pickled(sound(properties))))


BROKEN: dict[str, tuple[Any, ...]] = {
    "too few": (torch.float32, torch.strided, False, dcp_metadata._MEM_FORMAT_ENCODING(0)),
    "none": (),
    "in another order": (
        torch.strided,
        torch.float32,
        False,
        dcp_metadata._MEM_FORMAT_ENCODING(0),
        False,
        None,
    ),
    "text for a dtype": (
        "float32",
        torch.strided,
        False,
        dcp_metadata._MEM_FORMAT_ENCODING(0),
        False,
        (3, 1),
    ),
    "a number for requires_grad": (
        torch.float32,
        torch.strided,
        1,
        dcp_metadata._MEM_FORMAT_ENCODING(0),
        False,
        None,
    ),
}


@pytest.mark.parametrize("state", BROKEN.values(), ids=BROKEN)
def test_properties_whose_known_fields_make_no_sense_are_refused(state: tuple[Any, ...]) -> None:
    properties = NewerProperties(dtype=torch.bfloat16)
    properties.state = state
    raw = pickled(sound(properties))
    with pytest.raises(ValueError, match="properties of w"):
        decode_metadata(raw)


def _everywhere(metadata: Metadata) -> dict[str, Any]:
    tensor = metadata.state_dict_metadata["w"]
    assert isinstance(tensor, TensorStorageMetadata)
    index = next(iter(metadata.storage_data))
    return {
        "Metadata": metadata,
        "TensorStorageMetadata": tensor,
        "ChunkStorageMetadata": tensor.chunks[0],
        "BytesStorageMetadata": metadata.state_dict_metadata["leaf"],
        "MetadataIndex": index,
        "_StorageInfo": metadata.storage_data[index],
        "StorageMeta": metadata.storage_meta,
    }


ADDED: dict[str, Any] = {
    "text": "x",
    "nested": {"a": [(1, 2), None]},
    "foreign": Novel(),
    "foreign inside": {"a": [Novel()]},
}


@pytest.mark.parametrize("cls", _everywhere(sound()))
@pytest.mark.parametrize("value", ADDED.values(), ids=ADDED)
def test_attributes_that_a_newer_stock_adds_are_passed_over(cls: str, value: Any) -> None:
    metadata = sound()
    _everywhere(metadata)[cls].__dict__["of_torch_9"] = value
    decoded = decode_metadata(pickle.dumps(metadata))
    assert_sound(decoded)
    assert type(_everywhere(decoded)[cls]).__name__ == cls
    assert "Inert" not in repr(vars(_everywhere(decoded)[cls]))


def _renamed(metadata: Metadata, old: bytes, new: bytes) -> bytes:
    raw = pickle.dumps(metadata, protocol=2)
    assert old in raw
    return raw.replace(old, new)


NEWER_VALUES: dict[str, tuple[Callable[[Metadata], bytes], str, str]] = {
    "a dtype": (
        lambda m: _renamed(m, b"ctorch\nbfloat16\n", b"ctorch\nfloat6_e3m2\n"),
        "dtype",
        "float6_e3m2",
    ),
    "a layout": (
        lambda m: _renamed(m, b"X\x0d\x00\x00\x00torch.strided", b"X\x0c\x00\x00\x00torch.tiled2"),
        "layout",
        "torch.tiled2",
    ),
}


@pytest.mark.parametrize(("make", "field", "name"), NEWER_VALUES.values(), ids=NEWER_VALUES)
def test_a_value_that_this_torch_lacks_is_refused_only_where_it_is_needed(
    make: Callable[[Metadata], bytes], field: str, name: str
) -> None:
    decoded = decode_metadata(make(sound()))
    found = decoded.state_dict_metadata["w"]
    assert isinstance(found, TensorStorageMetadata)
    value = getattr(found.properties, field)
    assert isinstance(value, Unknown)
    assert name in str(value)
    assert isinstance(decoded.state_dict_metadata["leaf"], BytesStorageMetadata)


@pytest.mark.parametrize("number", [3, 17, -1, 2**70])
def test_a_memory_format_that_this_torch_lacks_is_passed_over(number: int) -> None:
    raw = pickle.dumps(sound(), protocol=2)
    at = raw.index(b"_MEM_FORMAT_ENCODING\n")
    encoded = pickle.dumps(number, protocol=2)[2:-1]
    start = raw.index(b"K", at)
    assert_format(decode_metadata(raw[:start] + encoded + raw[start + 2 :]))


def assert_format(decoded: Metadata) -> None:
    found = decoded.state_dict_metadata["w"]
    assert isinstance(found, TensorStorageMetadata)
    assert found.properties.memory_format is torch.preserve_format


def test_a_stand_in_for_what_this_torch_lacks_can_not_be_changed() -> None:
    for build in (b"}b", b"X\x01\x00\x00\x00ab", b"N}X\x05\x00\x00\x00_nameX\x01\x00\x00\x00xs\x86b"):
        with pytest.raises(UntrustedGlobal):
            decode_metadata(b"\x80\x02ctorch\nfloat6_e3m2\n" + build + b".")


def test_one_item_at_two_places_is_refused() -> None:
    metadata = sound()
    other = MetadataIndex("leaf")
    other.__dict__["of_torch_9"] = 1
    metadata.storage_data[MetadataIndex("leaf2")] = _StorageInfo("__0_0.distcp", 0, 1)
    raw = pickle.dumps(metadata, protocol=2)
    raw = raw.replace(b"X\x05\x00\x00\x00leaf2", b"X\x04\x00\x00\x00leaf")
    with pytest.raises(ValueError, match="several places for one item"):
        decode_metadata(raw)


# --- what we write


def encoded(properties: TensorProperties) -> bytes:
    entry = sound(properties).state_dict_metadata["w"]
    group = Group(entry, ["w"], [[(0, 64, 99)]])
    return metadata_template([group], {"w": ("w",)}).render(UID)


def five_fields(state: Any) -> tuple[Any, ...]:
    """What stock before torch 2.15 makes of it, which has exactly five names for it."""
    dtype, layout, requires_grad, memory_format, pin_memory = state
    return dtype, layout, requires_grad, memory_format, pin_memory


def states_in(raw: bytes) -> list[Any]:
    """The states of the properties in ``raw``."""
    found: list[Any] = []

    class Properties:
        def __setstate__(self, state: Any) -> None:
            found.append(state)

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str, /) -> Any:
            return Properties if name == "TensorProperties" else super().find_class(module, name)

    Reader(io.BytesIO(raw)).load()
    return found


ORDINARY: dict[str, TensorProperties] = {
    "by dtype": TensorProperties(dtype=torch.float32),
    "of a matrix": TensorProperties.create_from_tensor(torch.ones(3, 4)),
    "of a transposed one": TensorProperties.create_from_tensor(torch.ones(3, 4).t()),
    "of a parameter": TensorProperties.create_from_tensor(torch.nn.Parameter(torch.ones(2))),
}


@pytest.mark.parametrize("properties", ORDINARY.values(), ids=ORDINARY)
def test_properties_are_written_as_the_oldest_stock_reads_them(
    properties: TensorProperties, caplog: pytest.LogCaptureFixture
) -> None:
    raw = encoded(properties)
    assert [five_fields(state)[0] for state in states_in(raw)] == [properties.dtype]
    loaded: Any = pickle.loads(raw)  # as this stock does
    found = loaded.state_dict_metadata["w"].properties
    assert (found.dtype, found.layout, found.requires_grad) == (
        properties.dtype,
        properties.layout,
        properties.requires_grad,
    )
    assert not caplog.records


def test_a_field_that_would_be_lost_is_written_and_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual: Any = TensorProperties.__getstate__

    def newer(self: TensorProperties) -> tuple[Any, ...]:
        state: tuple[Any, ...] = usual(self)
        return (*state[:5], None, vars(self).get("tiles"))

    monkeypatch.setattr(TensorProperties, "__getstate__", newer)
    plain = TensorProperties(dtype=torch.float32)
    assert [len(state) for state in states_in(encoded(plain))] == [5]
    assert not caplog.records
    tiled = TensorProperties(dtype=torch.float32)
    tiled.__dict__["tiles"] = (4, 4)
    with caplog.at_level(logging.WARNING):
        raw = encoded(tiled)
    assert [state[6] for state in states_in(raw)] == [(4, 4)]
    assert "an older torch will not load this checkpoint" in caplog.text
