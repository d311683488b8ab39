"""Files of unknown origin, made up: honest ones with damage, and ones of a grammar that only looks honest.

In: a random.Random. Out: cases for batch.py. The same seed gives the same cases.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import io
import json
import pickle
import struct
import tempfile
import warnings
from array import array
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import xxhash
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

from dcp_async import sync
from dcp_async.formats.distcp import BLOCK_BYTES, Footer
from dcp_async.formats.zip_item import object_item
from dcp_async.trust import plain_data as plain
from tests.fuzz.batch import Case

NUMBERS = (
    0,
    1,
    -1,
    127,
    128,
    255,
    256,
    65535,
    1 << 31,
    (1 << 31) - 1,
    1 << 32,
    1 << 63,
    (1 << 64) - 1,
    1 << 200,
)


def _saved(value: Any, *, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


@cache
def _values() -> list[Any]:
    return [
        1.5,
        "text",
        None,
        (1, 2, (3, "a")),
        {"a": [1, 2, 3], "b": {"c": (1, 2)}, 5: b"x" * 20},
        [{1, 2, 3}, frozenset({4}), bytearray(b"abc"), 1 << 90, range(3), slice(1, 2)],
        [
            decimal.Decimal("1.5"),
            fractions.Fraction(1, 3),
            datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
            datetime.timedelta(1),
        ],
        [collections.OrderedDict(a=1), collections.Counter("abb"), collections.deque([1, 2], 5)],
        collections.defaultdict(list, a=[1]),
        np.arange(6.0).reshape(2, 3),
        [np.array(["a", "bb"]), np.float32(1.5), np.array([(1, 2.5)], "i4,f8"), np.array(["2026"], "M8[s]")],
        np.array([None, 1], dtype=object),
        [torch.Size([1, 2]), torch.float16, torch.device("cpu")],
        np.random.default_rng(0).bit_generator.state,
    ]


@cache
def _tensors() -> list[Any]:
    with warnings.catch_warnings():  # some of these layouts are announced as young
        warnings.simplefilter("ignore")
        return _made_tensors()


def _made_tensors() -> list[Any]:
    return [
        torch.arange(6.0),
        torch.ones(2, 3, dtype=torch.uint16),
        torch.nn.Parameter(torch.ones(3)),
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        torch.ones(3, dtype=torch.complex64).conj(),
        [torch.ones(4)[1:], {"a": torch.zeros(2, 2).T}],
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    ]


@cache
def _metadata() -> list[bytes]:
    def entry(*shape: int) -> TensorStorageMetadata:
        chunk = ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
        return TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(shape), [chunk])

    names = [f"m.w{i}" for i in range(6)]
    entries: dict[str, Any] = {name: entry(4, i) for i, name in enumerate(names)} | {
        "n": BytesStorageMetadata()
    }
    places = {
        MetadataIndex(name, torch.Size([0, 0]), 0): _StorageInfo("__0_0.distcp", 9, 99) for name in names
    }
    whole = Metadata(entries, {name: tuple(name.split(".")) for name in entries}, places, StorageMeta())
    return [pickle.dumps(whole, protocol) for protocol in (2, 3, 4)]


@cache
def _checkpoint() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        with sync.CheckpointEngine(scratch) as engine:
            state: dict[str, Any] = {
                "model": {"w": torch.ones(8, 8).T.contiguous().T, "b": torch.ones(8)},
                "n": (1, 2),
                "k": {5: "v"},
            }
            state["keys"] = {(1, "a"): torch.ones(2), 2.5: 1}
            files = {"config.json": b"{}", "LICENSE": b"free"}
            engine.save(state, step=1, files=files).upload_completion.result(60)
        return {path.name: path.read_bytes() for path in Path(scratch, "step-00000001").iterdir()}


def _footer() -> bytes:
    return Footer(image_bytes=16 * 4096, digests=array("Q", range(-(-16 * 4096 // BLOCK_BYTES)))).encode()


def signed(manifest: dict[str, Any]) -> bytes:
    """A manifest with a valid checksum of itself, whatever it says."""
    body = json.dumps(
        {key: value for key, value in manifest.items() if key != "digest"}, separators=(",", ":")
    )
    return signed_text(body)


def signed_text(text: str) -> bytes:
    body = text.encode("utf-8", "surrogatepass")[:-1]
    return body + b',"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}'


def _manifest() -> dict[str, Any]:
    raw = next(content for name, content in _checkpoint().items() if name.startswith("manifest-"))
    found: dict[str, Any] = json.loads(raw)
    return found


@cache
def _honest() -> dict[str, list[bytes]]:
    """By verb, files as they are written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _made_honest()


def _made_honest() -> dict[str, list[bytes]]:
    values = _values()
    return {
        "leaf": [pickle.dumps(value, protocol) for value in values for protocol in (0, 2, 4)],
        "metadata": [*_metadata(), _checkpoint()[".metadata"]],
        "message": [
            plain.dumps([{"a": (1, b"x", None, 2.5), "names": ["w", "w"]}, 3]),
            plain.dumps({"x": [1] * 9}),
        ],
        "item": [
            *(_saved(value) for value in (*_tensors(), *values)),
            *(_saved(value, legacy=True) for value in (*_tensors()[:4], *values)),
            *(object_item(pickle.dumps(value, 2)) for value in values),
        ],
        "zip": [_saved(torch.ones(3)), object_item(b"x" * 90)],
        "footer": [_footer()],
    }


# --- damage

_OPCODES = bytes(range(0x28, 0x7E)) + bytes(range(0x80, 0x99))


def damaged(random: Random, raw: bytes, other: bytes) -> bytes:
    """``raw`` with one to four changes of the kinds that find most."""
    found = bytearray(raw)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(found) + 1)
        kind = random.randrange(8)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            found[at : at + 1] = bytes([random.choice(_OPCODES)])
        elif kind == 2:
            del found[at : at + random.randint(1, 9)]
        elif kind == 3:
            start = random.randrange(len(found) + 1)
            found[at:at] = found[start : start + random.randint(1, 40)]
        elif kind == 4:
            start = random.randrange(len(other) + 1)
            found[at:at] = other[start : start + random.randint(1, 60)]
        elif kind == 5:
            number = random.choice(NUMBERS) & ((1 << 64) - 1)
            width = random.choice((1, 2, 4, 8))
            found[at : at + width] = number.to_bytes(8, "little")[:width]
        elif kind == 6:
            found[at:at] = bytes([random.choice(_OPCODES)]) * random.choice((1, 60, 5000))
        elif random.random() < 0.2:
            del found[at:]
    return bytes(found)


def _any_json(random: Random, depth: int = 3) -> Any:
    leaves: tuple[Any, ...] = (
        None,
        True,
        0,
        -1,
        1.5,
        1e308,
        1 << 70,
        "",
        "a/b",
        "\ud800",
        "..",
        "x" * 300,
        [],
        {},
    )
    if depth == 0 or random.random() < 0.6:
        return random.choice(leaves)
    if random.random() < 0.5:
        return [_any_json(random, depth - 1) for _ in range(random.randrange(4))]
    return {str(random.choice(leaves)): _any_json(random, depth - 1) for _ in range(random.randrange(3))}


def changed_json(random: Random, value: Any) -> Any:
    """``value`` with one part replaced, removed, or doubled."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        if random.random() < 0.1:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: changed_json(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.8:
        at = random.randrange(len(value))
        if random.random() < 0.1:
            return [*value, value[at]]
        return [*value[:at], changed_json(random, value[at]), *value[at + 1 :]]
    if random.random() < 0.05:
        deep: Any = []
        for _ in range(random.choice((50, 150, 290))):
            deep = ["list", [deep]] if random.random() < 0.5 else [deep]
        return deep
    return _any_json(random)


def _changed_manifest(random: Random) -> bytes:
    manifest = _manifest()
    for _ in range(random.randint(1, 2)):
        manifest = changed_json(random, manifest)
        if not isinstance(manifest, dict):
            return signed_text(json.dumps({"format": "dcp_async", "version": 1}))
    text = json.dumps(
        {key: value for key, value in manifest.items() if key != "digest"}, separators=(",", ":")
    )
    if random.random() < 0.1:
        text = text.replace("null", random.choice(("NaN", "1e999", "9" * 5000, "-Infinity")), 1)
    if random.random() < 0.05:
        text = text.replace("[", "[" * random.choice((2, 1200)), 1)
    return signed_text(text)


def _changed_checkpoint(random: Random) -> dict[str, bytes]:
    files = dict(_checkpoint())
    manifest_name = next(name for name in files if name.startswith("manifest-"))
    data_name = next(name for name in files if name.endswith(".distcp"))
    kind = random.randrange(5)
    if kind <= 1:
        files[manifest_name] = _changed_manifest(random)
    elif kind == 2:  # stock's rules then
        files[".metadata"] = damaged(random, files[".metadata"], random.choice(_metadata()))
        manifest = _manifest()
        manifest["metadata_digest"] = xxhash.xxh3_64_hexdigest(files[".metadata"])
        files[manifest_name] = signed(manifest)
    elif kind == 3:
        files[data_name] = damaged(random, files[data_name], files[".metadata"])
    else:
        del files[manifest_name]
        files[".metadata"] = damaged(
            random, files[".metadata"].replace(data_name.encode(), b"x" * len(data_name)), files[".metadata"]
        )
        files["x" * len(data_name)] = files.pop(data_name)
    return files


_SHARES = {
    "leaf": 30,
    "metadata": 20,
    "message": 6,
    "item": 20,
    "zip": 5,
    "manifest": 10,
    "footer": 3,
    "checkpoint": 6,
}


def mutated(random: Random, count: int) -> Iterator[Case]:
    """Honest files with damage; what has a checksum of itself has a valid one."""
    verbs = random.choices(list(_SHARES), list(_SHARES.values()), k=count)
    for verb in verbs:
        if verb == "manifest":
            yield verb, _changed_manifest(random)
        elif verb == "checkpoint":
            yield verb, _changed_checkpoint(random)
        else:
            files = _honest()[verb]
            yield verb, damaged(random, random.choice(files), random.choice(_honest()["leaf"]))


# --- a grammar

_GLOBALS = (
    "collections deque", "collections defaultdict", "collections OrderedDict", "collections Counter",
    "builtins set", "builtins frozenset", "builtins bytearray", "builtins slice", "builtins range",
    "builtins complex", "builtins list", "builtins str", "builtins int", "fractions Fraction",
    "decimal Decimal", "pathlib PurePosixPath", "uuid UUID", "datetime timedelta", "datetime datetime",
    "types SimpleNamespace", "io BytesIO", "torch Size", "torch device", "torch Tensor", "torch float32",
    "torch FloatStorage", "torch.storage UntypedStorage", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor",
    "torch._utils _rebuild_nested_tensor",
    "torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_parameter",
    "torch._tensor _rebuild_from_type_v2", "torch.nested._internal.nested_tensor _rebuild_njt",
    "torch.nn.parameter Parameter", "numpy dtype", "numpy ndarray", "numpy._core.multiarray _reconstruct",
    "numpy._core.multiarray scalar", "numpy float64", "numpy.dtypes StringDType", "_codecs encode",
    "copyreg _reconstructor", "http HTTPStatus", "torch.serialization _get_layout",
    "torch.distributed.checkpoint.metadata Metadata", "torch.distributed.checkpoint.metadata MetadataIndex",
    "torch.distributed.checkpoint.metadata TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata TensorProperties",
    "torch.distributed.checkpoint.metadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.metadata BytesStorageMetadata",
    "torch.distributed.checkpoint.filesystem _StorageInfo",
)  # fmt: skip
_TEXTS = (
    "",
    "a",
    "w",
    "f8",
    "V8",
    "U4",
    "O",
    "M8[s]",
    "|",
    "<",
    "latin1",
    "1e9",
    "7/3",
    "torch.strided",
    "cpu",
    "x" * 300,
)
_FIELDS = (
    "state_dict_metadata", "planner_data", "storage_data", "properties", "size", "chunks", "offsets", "sizes",
    "fqn", "offset", "index", "relative_path", "length",
)  # fmt: skip


class _Writer:
    """Writes a pickle that keeps its stack in order, most of the time, and means no good."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._stored = 0
        self.out = bytearray(b"\x80\x04")

    def _text(self, text: str) -> None:
        self.out += b"X" + struct.pack("<I", len(text)) + text.encode()

    def atom(self) -> None:
        random = self._random
        kind = random.randrange(6)
        if kind == 0:
            self._text(random.choice((*_TEXTS, *_FIELDS)))
        elif kind == 1:
            self.out += pickle.dumps(random.choice(NUMBERS), 2)[2:-1]
        elif kind == 2:
            self.out += random.choice((b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f"))
        elif kind == 3:
            self.out += pickle.dumps(random.choice((b"", b"x" * 8, b"A" * 40)), 4)[2:-1].replace(b"\x94", b"")
        elif kind == 4:
            self.out += b"G" + struct.pack(">d", random.choice((0.0, 1.5, float("nan"), float("inf"), 1e300)))
        else:
            self.out += b"c" + random.choice(_GLOBALS).replace(" ", "\n").encode() + b"\n"

    def value(self, depth: int) -> None:
        random = self._random
        if self._stored and random.random() < 0.25:
            self.out += b"j" + struct.pack("<I", random.randrange(self._stored))
            return
        if depth == 0 or random.random() < 0.25:
            self.atom()
        else:
            self._composite(depth - 1)
        if random.random() < 0.4:
            self.out += b"r" + struct.pack("<I", self._stored)
            self._stored += 1
        if random.random() < 0.03:
            times = random.choice((3, 70, 3000))
            self.out += random.choice((b"\x85", b"2\x86", b"2\x86", b"]2a", b"\x85R")) * times

    def _values(self, depth: int, count: int) -> None:
        for _ in range(count):
            self.value(depth)

    def _composite(self, depth: int) -> None:
        random = self._random
        count = random.randrange(5)
        kind = random.randrange(8)
        if kind == 0:
            self.out += b"("
            self._values(depth, count)
            self.out += random.choice((b"t", b"l", b"\x91"))
        elif kind == 1:
            self.out += b"]("
            self._values(depth, count)
            self.out += b"e"
        elif kind == 2:
            self.out += b"}("
            self._values(depth, 2 * count)
            self.out += b"u"
        elif kind == 3:
            self.out += b"\x8f("
            self._values(depth, count)
            self.out += b"\x90"
        else:
            self.out += b"c" + random.choice(_GLOBALS).replace(" ", "\n").encode() + b"\n("
            self._values(depth, count)
            self.out += b"t" + random.choice((b"R", b"R", b"\x81"))
            if random.random() < 0.3:
                self.value(depth)
                self.out += b"b"
            if random.random() < 0.2:
                self._values(depth, 2)
                self.out += b"s"

    def finished(self) -> bytes:
        self.value(self._random.randint(2, 6))
        return bytes(self.out + b".")


def _generated_pickle(random: Random) -> bytes:
    return _Writer(random).finished()


def _generated_zip(random: Random) -> bytes:
    stream = io.BytesIO()
    with torch.serialization._open_zipfile_writer(stream) as writer:
        for name in ("data.pkl", "version", "byteorder", "data/0", "data/1"):
            content = {"data.pkl": _generated_pickle(random), "version": b"3\n", "byteorder": b"little"}.get(
                name
            )
            content = bytes(random.randrange(40)) if content is None else content
            if random.random() < 0.95:
                writer.write_record(name, content, len(content))
    return stream.getvalue()


def _generated_legacy(random: Random) -> bytes:
    head = _saved(1, legacy=True)
    start = len(head) - len(pickle.dumps(1, 2)) - len(pickle.dumps([], 2))
    kind = random.choice(("FloatStorage", "LongStorage", "BoolStorage", "BFloat16Storage"))
    numel = random.choice((0, 1, 4, 5, 1 << 40, -1))
    pid = b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    pid += pickle.dumps(numel, 2)[2:-1] + random.choice((b"N", b"N", b"K\x01")) + b"tQ"
    body = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + pid
        + b"K\x00K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    )
    whole = random.choice((body, b"ctorch\nTensor\nM\x10\x27\x85R", _generated_pickle(random)[2:-1], pid))
    keys = pickle.dumps(random.choice((["0"], [], ["0", "0"], ["1"])), 2)
    tail = struct.pack("<q", random.choice((4, 0, numel if abs(numel) < 1 << 62 else 1))) + bytes(
        random.randrange(60)
    )
    return head[:start] + b"\x80\x02" + whole + b"." + keys + tail


def _generated_manifest(random: Random) -> bytes:
    fields = {
        name: _any_json(random) if random.random() < 0.3 else value for name, value in _manifest().items()
    }
    return signed({**fields, "format": "dcp_async", "version": random.choice((1, 1, 1, 0, 2, True, "1"))})


def _generated_footer(random: Random) -> bytes:
    table = bytes(8 * random.randrange(3))
    parts = [random.choice(NUMBERS) & ((1 << 64) - 1) for _ in range(2)]
    trailer = struct.pack("<8sIIQQQ", b"DCPASYNC", 1, BLOCK_BYTES, *parts, xxhash.xxh3_64_intdigest(table))
    return table + bytes(4096 - len(table) - len(trailer)) + trailer


_GRAMMARS: dict[str, tuple[int, Callable[[Random], bytes]]] = {
    "leaf": (40, _generated_pickle),
    "metadata": (20, _generated_pickle),
    "message": (5, _generated_pickle),
    "item": (15, _generated_zip),
    "legacy": (10, _generated_legacy),
    "manifest": (15, _generated_manifest),
    "footer": (5, _generated_footer),
}


def generated(random: Random, count: int) -> Iterator[Case]:
    """Files of a grammar, most of them well-formed and few of them honest."""
    weights = [weight for weight, _ in _GRAMMARS.values()]
    for name in random.choices(list(_GRAMMARS), weights, k=count):
        yield "item" if name == "legacy" else name, _GRAMMARS[name][1](random)
