"""What a writer with bad intentions may put into a checkpoint: refused, at no great cost, and nothing of the
process is changed. Everything that could crash runs in a process of its own."""

from __future__ import annotations

import collections
import functools
import http
import io
import os
import pickle
import ssl
import struct
import zipfile
import zlib
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
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_async.formats import zip_item
from dcp_async.formats.metadata_reader import decode_metadata
from dcp_async.formats.stock_compat import merge_ranks, take_apart, usable_paths
from dcp_async.formats.stored_item import StoredItem, check_records, inflated_bound
from dcp_async.formats.tree import children_of, kind_of, tree_from_paths
from dcp_async.trust import Trust, UntrustedGlobal, load_pickle
from dcp_async.trust.pickle_grammar import check_pickle
from tests.support.processes import run_in_process


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _raw(text: str) -> bytes:
    return b"c_codecs\nencode\n" + _text(text) + _text("latin1") + b"\x86R"


_ARRAY = b"cnumpy\nndarray\n"
POINTERS = {
    "array_of_addresses": b"\x80\x02" + _ARRAY + b"K\x01\x85" + _text("O") + _raw("AAAAAAAA") + b"\x87R.",
    "tensor_at_address": b"\x80\x04ctorch\nTensor\n)}" + _text("cdata") + b"\x8a\x05AAAAAs\x92.",
    "storage_by_allocator": b"\x80\x04ctorch.storage\nUntypedStorage\nK\x08\x85}"
    + _text("allocator")
    + b"\x8a\x05AAAAAs\x92.",
    "storage": b"\x80\x04ctorch.storage\nUntypedStorage\nK\x08\x85\x81.",
    "parameter": b"\x80\x02ctorch.nn.parameter\nParameter\n)R.",
    "rebuilt_from_type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n"
    b"(cnumpy._core.multiarray\n_reconstruct\n"
    + _ARRAY
    + (b"(" + _ARRAY + b"K\x00\x85" + _raw("b") + b"t")
    + (b"(K\x01J\x00\x00\x00\x01\x85cnumpy\ndtype\n" + _text("f8") + b"\x89\x88\x87R\x89" + _raw("B" * 8))
    + b"ttR.",
    "typed_scalar": b"\x80\x02cnumpy\nvoid\nJ\xff\xff\xff\x7f\x85R.",
    "dtype_without_fields": b"\x80\x02cnumpy\ndtype\n"
    + _text("V8")
    + b"\x89\x88\x87R(K\x03"
    + _text("|")
    + b"N"
    + _text("a")
    + b"\x85}K\x08K\x01K\x10tb.",
    "new_enum_class": b"\x80\x02chttp\nHTTPStatus\n" + _text("New") + _text("a b") + b"\x86R.",
    "fraction_of_exponent": b"\x80\x02cfractions\nFraction\n" + _text("1e999999999") + b"\x85R.",
    "list_of_range": b"\x80\x02c__builtin__\nlist\nc__builtin__\nxrange\nJ\x00\x00\x00\x02\x85R\x85R.",
    "set_of_range": b"\x80\x02c__builtin__\nset\nc__builtin__\nxrange\nJ\x00\x00\x00\x02\x85R\x85R.",
    "bytes": b"\x80\x02c__builtin__\nbytes\nJ\x00\x00\x00\x40\x85R.",
    "bytearray": b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R.",
    "codec": b"\x80\x02c_codecs\nencode\n" + _text("x") + _text("punycode") + b"\x86R.",
    "tensor_state": b"\x80\x02ctorch._utils\n_rebuild_meta_tensor_no_storage\n"
    b"(ctorch\nfloat32\nK\x01\x85K\x01\x85\x89tR}b.",
}


def _load_each(pickles: dict[str, bytes]) -> dict[str, int]:
    """How a child ended over each. 42: refused; 0: loaded; 1: another error; below 0: crashed."""
    ends = {}
    for name, raw in pickles.items():
        if os.fork() == 0:
            code = 1
            try:
                repr(load_pickle(raw, Trust()))
                code = 0
            except UntrustedGlobal:
                code = 42
            finally:
                os._exit(code)
        ends[name] = os.waitstatus_to_exitcode(os.wait()[1])
    return ends


@pytest.fixture(scope="module")
def ends() -> dict[str, int]:
    """Most of these crash whoever makes them."""
    found: dict[str, int] = run_in_process(_load_each, POINTERS)
    return found


@pytest.mark.parametrize("name", POINTERS)
def test_what_may_be_named_may_not_be_called_at_will(name: str, ends: dict[str, int]) -> None:
    assert ends[name] == 42


class Rebuilt:
    """Pickles as a call of the attacker's choice."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


def _load(value: Any, trust: Trust | None = None) -> Any:
    """Through a zip, whose storages torch makes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return _item(stream.getvalue(), trust).decode(bytearray(stream.getvalue()))


def _item(raw: bytes, trust: Trust | None = None, **options: Any) -> StoredItem:
    given: dict[str, Any] = {"descriptors": (), "max_bytes": 1 << 20, "has_digests": False, **options}
    return StoredItem(name="x", file="f", offset=0, length=len(raw), trust=trust or Trust(), **given)


_U = torch._utils
_T = torch.ones(4)
_typed: Any = torch.storage.TypedStorage
_S = _typed(wrap_storage=_T.untyped_storage(), dtype=_T.dtype, _internal=True)
_NO_HOOKS: Any = collections.OrderedDict()
_INDICES = torch.tensor([[10**12]])
TENSORS: dict[str, tuple[Any, ...]] = {
    "larger": (_U._rebuild_tensor_v2, (_S, 0, (1000,), (1,), False, _NO_HOOKS)),
    "beyond": (_U._rebuild_tensor_v2, (_S, 3, (2,), (1,), False, _NO_HOOKS)),
    "stride": (_U._rebuild_tensor, (_S, 0, (2,), (4,))),
    "dtype": (_U._rebuild_tensor_v3, (_S, 0, (4,), (1,), False, _NO_HOOKS, torch.float64)),
    "hooks": (_U._rebuild_tensor_v2, (_S, 0, (4,), (1,), True, {0: complex})),
    "conjugate": (_U._rebuild_tensor_v2, (_S, 0, (4,), (1,), False, _NO_HOOKS, {"conj": True})),
    "nested": (
        _U._rebuild_nested_tensor,
        (_T, torch.tensor([[2], [3]]), torch.tensor([[1], [1]]), torch.tensor([0, 2])),
    ),
    "wrapper": (
        _U._rebuild_wrapper_subclass,
        (torch.Tensor, torch.float32, (4,), (1,), 0, torch.strided, "cpu", False),
    ),
    "attribute": (_U._rebuild_parameter_with_state, (_T, False, _NO_HOOKS, {"data": _T})),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_stay_within_their_storage(name: str) -> None:
    with pytest.raises(UntrustedGlobal):
        _load([_S, Rebuilt(*TENSORS[name])])


def test_sparse_tensors_are_checked() -> None:
    with pytest.raises(ValueError, match="indices"):
        _load(
            Rebuilt(_U._rebuild_sparse_tensor, (torch.sparse_coo, (_INDICES, torch.ones(1), torch.Size([3]))))
        )


def test_enum_members_are_not_changed() -> None:
    for state in (b"\x80\x02cssl\nVerifyMode\nK\x02\x85R}" + _text("_value_") + b"K\x00sb.",):
        with pytest.raises(UntrustedGlobal):
            load_pickle(state, Trust())
    assert ssl.VerifyMode.CERT_REQUIRED.value == 2
    assert load_pickle(pickle.dumps(http.HTTPStatus.OK, 2), Trust()) is http.HTTPStatus.OK


class Functor:
    def __init__(self) -> None:
        self.x = 1

    def __call__(self) -> int:
        return self.x


class Later(Functor):
    pass


def test_instances_of_trusted_classes_may_be_callable() -> None:
    assert load_pickle(pickle.dumps(Functor(), 2), Trust(safe_globals=(Functor,)))() == 1


def test_what_has_no_name_is_no_safe_global() -> None:
    with pytest.raises(ValueError, match="classes or functions"):
        Trust(safe_globals=(functools.partial(int),))


def test_safe_globals_of_torch_are_those_of_now() -> None:
    raw = pickle.dumps(Later(), 2)
    for _ in range(2):
        with pytest.raises(UntrustedGlobal):
            load_pickle(raw, Trust())
        with torch.serialization.safe_globals([Later]):
            assert load_pickle(raw, Trust())() == 1


# --- `.metadata`

_HOME = "torch.distributed.checkpoint.metadata"
_GOOD = pickle.dumps(Metadata(state_dict_metadata={}, storage_data={}), protocol=2)[2:]
CHANGES = {
    "enum": f"c{_HOME}\n_MEM_FORMAT_ENCODING\n".encode() + b"K\x00\x85R}" + _text("_value_") + b"Kcsb0",
    "name": f"c{_HOME}\nMetadata\n".encode() + b"N}" + _text("__qualname__") + _text("Evil") + b"s\x86b0",
    "defaults": b"ctorch.serialization\n_get_layout\nN}"
    + _text("__defaults__")
    + _text("torch.strided")
    + b"\x85s\x86b0",
    "attribute": f"c{_HOME}\nMetadataIndex\n".encode() + b"}" + _text("fqn") + b"K\x01sb0",
}


@pytest.mark.parametrize("name", CHANGES)
def test_metadata_changes_nothing_of_the_process(name: str) -> None:
    encoding = dcp_metadata._MEM_FORMAT_ENCODING
    before = [dict(vars(item)) for item in (Metadata, MetadataIndex, encoding, encoding(0))]
    with pytest.raises((UntrustedGlobal, ValueError)):
        decode_metadata(b"\x80\x02" + CHANGES[name] + _GOOD)
    assert before == [dict(vars(item)) for item in (Metadata, MetadataIndex, encoding, encoding(0))]
    assert Metadata.__qualname__ == "Metadata"
    assert getattr(torch.serialization._get_layout, "__defaults__", None) is None
    assert encoding.TORCH_CONTIGUOUS_FORMAT.value == 0


def _sound() -> Metadata:
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([3]), [chunk])
    places = {MetadataIndex("w", [0]): _StorageInfo("f", 0, 12), MetadataIndex("n"): _StorageInfo("f", 12, 5)}
    return Metadata({"w": entry, "n": BytesStorageMetadata()}, {"w": ("w",)}, places)


def test_sound_metadata_comes_back_as_it_was() -> None:
    for protocol in range(2, 6):
        decoded = decode_metadata(pickle.dumps(_sound(), protocol))
        assert decoded == _sound()
        assert {type(item) for item in decoded.storage_data} == {MetadataIndex}
        assert decoded.storage_data[MetadataIndex("w", [0])].length == 12


def _set(path: str, value: Any) -> Any:
    def change(metadata: Any) -> None:
        target = {
            "whole": metadata,
            "entry": metadata.state_dict_metadata["w"],
            "chunk": metadata.state_dict_metadata["w"].chunks[0],
            "place": metadata.storage_data[MetadataIndex("n")],
            "properties": metadata.state_dict_metadata["w"].properties,
        }[path.partition(".")[0]]
        setattr(target, path.partition(".")[2], value)

    return change


MALFORMED = {
    "sizes": _set("chunk.sizes", (3,)),
    "offsets": _set("chunk.offsets", None),
    "dimensions": _set("chunk.sizes", torch.Size([3, 1])),
    "chunks": _set("entry.chunks", None),
    "chunk": _set("entry.chunks", [5]),
    "key": lambda metadata: metadata.state_dict_metadata.update({5: BytesStorageMetadata()}),
    "entry": lambda metadata: metadata.state_dict_metadata.update({"x": 5}),
    "properties": _set("entry.properties", None),
    "dtype": _set("properties.dtype", "float32"),
    "negative": _set("entry.size", torch.Size([-3])),
    "gigantic": _set("entry.size", torch.Size([1 << 25, 1 << 25])),
    "names": _set("whole.state_dict_metadata", [1]),
    "places": _set("whole.storage_data", 5),
    "place": _set("place.offset", "0"),
    "index": lambda metadata: metadata.storage_data.update({5: _StorageInfo("f", 0, 1)}),
    "shared": lambda metadata: metadata.state_dict_metadata.update(
        dict.fromkeys(map(str, range(500)), _many_chunks())
    ),
}


def _many_chunks() -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))
    return TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([3]), [chunk] * 5000)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_metadata_is_damaged(name: str) -> None:
    metadata = _sound()
    MALFORMED[name](metadata)
    with pytest.raises(ValueError, match=r"."):
        decode_metadata(pickle.dumps(metadata))


BOMBS = {
    "memo": b"\x80\x02Nr" + struct.pack("<I", 1 << 31) + b".",
    "text_memo": b"Np2147483648\n.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_ask_for_much_memory_are_damaged(name: str) -> None:
    for decode in (decode_metadata, functools.partial(load_pickle, trust=Trust()), check_pickle):
        with pytest.raises(ValueError, match="pickle"):
            decode(BOMBS[name])


@pytest.mark.parametrize("protocol", range(6))
def test_honest_pickles_end_where_they_end(protocol: int) -> None:
    value: Any = [{str(i): (i, -i, i * 1e9, b"x" * i, {i}, None, True)} for i in range(400)]
    raw = pickle.dumps([value, 1 << 3000, "x" * 70000, Functor()], protocol)
    assert check_pickle(b"before" + raw + b"after", 6).end == 6 + len(raw)
    with pytest.raises(ValueError, match="cut off"):
        check_pickle(raw[:-1])


def test_ranks_that_nobody_has_are_not_all_told() -> None:
    with pytest.raises(ValueError, match=r"no metadata of rank 1, 2, 3, 4, 5, but of 2 others"):
        merge_ranks({0: Metadata({}), 1 << 60: Metadata({})})


def test_lists_of_holes_stay_mappings() -> None:
    names = [f"a{i}.1048575" for i in range(2000)]
    metadata = Metadata(
        dict.fromkeys(names, BytesStorageMetadata()),
        planner_data={name: (name.partition(".")[0], 1048575) for name in names},
    )
    tree = tree_from_paths(usable_paths(metadata), names)
    assert {kind_of(child) for _, child in children_of(tree)} == {"dict"}
    few = tree_from_paths({"a.0": ("a", 0), "a.3": ("a", 3)}, ["a.0", "a.3"])
    assert kind_of(children_of(few)[0][1]) == "list"


def test_paths_of_great_depth_are_not_used() -> None:
    path = ("a",) * 5000
    metadata = Metadata({".".join(path): BytesStorageMetadata()}, planner_data={".".join(path): path})
    assert usable_paths(metadata) == {}


# --- leaves that are taken apart


def test_containers_without_end_are_not_taken_apart() -> None:
    circle: dict[str, Any] = {}
    circle["y"] = circle
    laugh: Any = 1
    for _ in range(12):
        laugh = [laugh] * 10
    for value in (circle, laugh):
        with pytest.raises(ValueError, match="without end"):
            collections.deque(take_apart(value, "a", ("a",), {"a.b"}), maxlen=0)


def test_two_values_of_one_name_are_damage() -> None:
    with pytest.raises(ValueError, match=r"two values of the name a\.1"):
        dict(take_apart({1: "number", "1": "text"}, "a", ("a",), {"a.1"}))


# --- zips


def _zip(entries: list[tuple[bytes, bytes, int, int]], body: bytes) -> bytes:
    """A zip with a directory of its own making: (name, content, where its header lies, CRC-32)."""
    lines = []
    for name, content, at, crc in entries:
        line = zip_item.central_entry(name, len(content), at)
        lines.append(line[:16] + struct.pack("<I", crc) + line[20:])
    return body + zip_item.zip_directory(lines, len(body))


def test_the_pickle_that_was_judged_is_the_one_that_is_loaded() -> None:
    good, evil = pickle.dumps(5, 2), b"\x80\x02cos\ngetpid\n)R."
    name = b"archive/data.pkl"
    first = zip_item.local_header(name, len(good)) + good
    raw = _zip(
        [(name, evil, len(first), 0)],
        first + zip_item.local_header(name, len(evil)) + evil,
    )
    item = _item(raw)
    assert not item.judge(bytearray(raw[: item.head_bytes]))
    with pytest.raises(ValueError, match="another pickle"):
        item.decode(bytearray(raw))


@pytest.mark.parametrize("digests", [True, False])
def test_deflated_records_are_refused(digests: bool) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "archive/data.pkl", b"\x80\x02X" + struct.pack("<I", 9 << 20) + bytes(9 << 20) + b"."
        )
        archive.writestr("archive/version", "3\n")
    raw = stream.getvalue()
    with pytest.raises(ValueError, match="compressed"):
        _item(raw, has_digests=digests).decode(bytearray(raw))


def test_records_that_share_bytes_are_refused() -> None:
    data = bytes(1000)
    body = zip_item.local_header(b"archive/x", len(data)) + data
    for names in ((b"archive/x", b"archive/y"), (b"archive/x", b"archive/X")):
        with pytest.raises(ValueError, match=r"overlaps|twice"):
            check_records(
                memoryview(_zip([(name, data, 0, zlib.crc32(data)) for name in names], body)), crcs=True
            )


def test_leaves_inflate_within_an_absolute_bound() -> None:
    assert inflated_bound(None, (), 1 << 40) <= (1 << 40) + (8 << 30)
    assert inflated_bound(None, (), 1 << 30) <= 16 << 30
