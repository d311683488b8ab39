"""Safetensors files as others write them are read like a checkpoint; those that lie are told."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from dcp_async import (
    CheckpointEngine,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LoadError,
    functional,
    open_checkpoint,
    sync,
    verify,
)
from dcp_async.formats.safetensors_header import _DTYPES
from dcp_async.load import batches
from dcp_async.storage.local.reader import LocalReader
from tests.support.doubles import assert_same, random_tensor, raw_bytes


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: value.contiguous() for name, value in net().state_dict().items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two files and an index, as transformers writes them."""
    made, directory = tensors(), tmp_path / "hf"
    directory.mkdir()
    weights = {name: f"model-0000{1 + int(name[0])}-of-00002.safetensors" for name in made}
    for file in set(weights.values()):
        part = {name: made[name] for name in made if weights[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (directory / "config.json").write_text("{}")
    return directory


async def test_a_model_is_read_whole_in_part_and_one_by_one(model: Path) -> None:
    expected = tensors()
    async with open_checkpoint(model) as checkpoint:
        assert set(checkpoint.names) == set(expected)
        info = checkpoint.info
        assert (info.producer, info.num_files, info.step) == ("safetensors", 2, None)
        assert_same(await checkpoint.read(), expected)
        assert_same(await checkpoint.read("*.bias"), {k: v for k, v in expected.items() if "bias" in k})
        part = await checkpoint.tensor("0.weight", (slice(1, 7, 2), 3))
        assert torch.equal(part, expected["0.weight"][1:7:2, 3])
        assert_same({name: value async for name, value in checkpoint.stream()}, expected)
        metadata = await info.metadata()
        assert metadata.state_dict_metadata.keys() == expected.keys()


async def test_it_fills_modules_without_memory_and_dicts(model: Path) -> None:
    expected = tensors()
    with torch.device("meta"):
        made = net()
    made.to_empty(device="cpu")
    async with open_checkpoint(model) as checkpoint:
        await checkpoint.load({"model": made}, rename={"*": "model.*"})
        assert_same(dict(made.state_dict()), expected)
        flat = {name: torch.zeros_like(value) for name, value in expected.items()}
        await checkpoint.load(flat)
        half = {name: value.half() for name, value in flat.items()}
        with pytest.raises(LoadError, match="dtypes='convert'"):
            await checkpoint.load(half)
        await checkpoint.load(half, dtypes="convert")
    assert_same(flat, expected)
    assert_same(half, {name: value.half() for name, value in expected.items()})
    again = {name: torch.zeros_like(value) for name, value in expected.items()}
    await functional.load(again, checkpoint_id=model)
    assert_same(again, expected)
    with sync.open_checkpoint(model) as checkpoint:
        assert_same(checkpoint.read(), expected)


async def test_one_file_is_a_source_too_and_model_goes_before_its_variants(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(3).half()}, tmp_path / "model.fp16.safetensors")
    for path, dtype in ((tmp_path, torch.float32), (tmp_path / "model.fp16.safetensors", torch.float16)):
        async with open_checkpoint(path) as checkpoint:
            assert (await checkpoint.read())["a"].dtype == dtype


async def test_files_without_an_index_are_one_model(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "y.safetensors")
    async with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names) == {"a", "b"}
    save_file({"a": torch.ones(3)}, tmp_path / "z.safetensors")
    with pytest.raises(LoadError, match=r"more than one model: 'a' lies in several files: x\.safe") as caught:
        async with open_checkpoint(tmp_path):
            pass
    assert not isinstance(caught.value, CorruptCheckpointError)  # nothing is damaged


async def test_of_several_indexes_one_is_named_by_its_path(tmp_path: Path) -> None:
    for variant in ("fp16", "fp32"):
        save_file({variant: torch.ones(3)}, tmp_path / f"x.{variant}.safetensors")
        index = {"weight_map": {variant: f"x.{variant}.safetensors"}}
        (tmp_path / f"x.{variant}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match=r"several models, x\.fp16.*by its own path") as caught:
        async with open_checkpoint(tmp_path):
            pass
    assert not isinstance(caught.value, CorruptCheckpointError)
    async with open_checkpoint(tmp_path / "x.fp32.safetensors.index.json") as checkpoint:
        assert set(checkpoint.names) == {"fp32"}


@pytest.mark.parametrize("kind", sorted(_DTYPES))
async def test_every_dtype_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    dtype = getattr(torch, _DTYPES[kind])
    values = {
        "plain": random_tensor(dtype, (5, 3)),
        "scalar": random_tensor(dtype, ()),
        "empty": torch.empty((0, 4), dtype=dtype),
    }
    entries, data = {}, b""
    for name, value in values.items():  # by hand: the package writes fewer dtypes than the format has
        raw = raw_bytes(value)
        entries[name] = {
            "dtype": kind,
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    write(tmp_path / "model.safetensors", entries, data)
    async with open_checkpoint(tmp_path) as checkpoint:
        assert_same(await checkpoint.read(), values)


def write(path: Path, entries: Any, data: bytes, length: int | None = None) -> None:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES: dict[str, tuple[Any, bytes, int | None, str]] = {
    "a header beyond the file": ({"a": ONE}, bytes(8), 1 << 40, "its header would take"),
    "a header one byte too long": ({"a": ONE}, b"", 63, "its header would take|no JSON"),
    "no JSON": (b"{'a'}", b"", None, "no JSON"),
    "no UTF-8": (b'{"\xff":1}', b"", None, "no JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", None, "no JSON"),
    "a list": (b"[]", b"", None, "no mapping"),
    "a key twice": (b'{"a":1,"a":2}', b"", None, "a key twice"),
    "an unknown dtype": ({"a": {**ONE, "dtype": "F7"}}, bytes(8), None, "'F7'"),
    "a dtype that is no text": ({"a": {**ONE, "dtype": ["F32"]}}, bytes(8), None, "dtype"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), None, "lacks its dtype"),
    "a negative size": ({"a": {**ONE, "shape": [-2]}}, bytes(8), None, "shape of 'a'"),
    "a truth value": ({"a": {**ONE, "shape": [True]}}, bytes(8), None, "shape of 'a'"),
    "more than its bytes": ({"a": {**ONE, "shape": [3]}}, bytes(8), None, "takes 12"),
    "a product that overflows": ({"a": {**ONE, "shape": [1 << 61] * 9}}, bytes(8), None, "takes"),
    "beyond the end": ({"a": ONE}, bytes(7), None, "the file has"),
    "bytes at the end": ({"a": ONE}, bytes(9), None, "the file has"),
    "a hole": ({"a": {**ONE, "data_offsets": [4, 12]}}, bytes(12), None, "leaves a hole"),
    "an overlap": ({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12), None, "overlaps"),
    "backwards": ({"a": {**ONE, "data_offsets": [8, 0]}}, bytes(8), None, "no range"),
    "sharding that is no text": (
        {"a": ONE, "__metadata__": {"DCP_SHARDING_INFO": 5}}, bytes(8), None, "no text",
    ),
    "a part of another rank": (
        {"a": ONE, "__metadata__": {"DCP_SHARDING_INFO": '{"a":{"saved_offsets":[0,0]}}'}},
        bytes(8),
        None,
        "1 dimensions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
async def test_a_header_that_lies_is_told_and_nothing_is_loaded(lie: str, tmp_path: Path) -> None:
    entries, data, length, words = LIES[lie]
    write(tmp_path / "model.safetensors", entries, data, length)
    target = {"a": torch.zeros(2)}
    with pytest.raises(CorruptCheckpointError, match=f"model.safetensors: .*({words}).*nothing was loaded"):
        await functional.load(target, checkpoint_id=tmp_path)
    assert not target["a"].any()


async def test_an_index_that_lies_is_told(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    for changed, words in (
        ({**weights, "0.bias": "model-00003-of-00002.safetensors"}, "which is not there"),
        ({**weights, "absent": weights["0.bias"]}, "'absent' lies in model-00001.*which lacks it"),
        ({**weights, "0.bias": "../other.safetensors"}, "no file beside it"),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(CorruptCheckpointError, match=words):
            async with open_checkpoint(model):
                pass
    index.write_text("{")
    with pytest.raises(CorruptCheckpointError, match="no JSON"):
        async with open_checkpoint(model):
            pass


async def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path / "no" / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointNotFoundError):
            async with open_checkpoint(path):
                pass


async def test_the_links_of_hugging_faces_cache_are_followed(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        os.rename(file, blobs / f"sha{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha{number}")
    async with open_checkpoint(snapshot) as checkpoint:
        assert_same(await checkpoint.read(), tensors())
    async with open_checkpoint(snapshot / "model-00001-of-00002.safetensors") as checkpoint:
        assert set(checkpoint.names) == {"0.weight", "0.bias"}
    target = {"0.bias": torch.zeros(8)}
    await functional.load(target, checkpoint_id=snapshot / "model-00001-of-00002.safetensors")
    assert_same(target["0.bias"], tensors()["0.bias"])


async def test_verify_says_that_nothing_vouches_for_it(model: Path) -> None:
    report = await verify(model)
    assert report.ok
    assert (report.producer, report.num_files) == ("safetensors", 2)
    assert set(report.unrecorded) == set(tensors())
    assert report.nbytes == sum(value.nbytes for value in tensors().values())


async def test_no_more_is_read_than_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"large": torch.ones(1 << 20), "other": torch.ones(1 << 20)}, tmp_path / "model.safetensors")
    read: list[int] = []
    real = LocalReader.read_into

    async def count(self: LocalReader, file: str, pieces: Any, arrived: Any = None) -> None:
        read.append(sum(len(memory) for _, memory in pieces))
        await real(self, file, pieces, arrived)

    monkeypatch.setattr(LocalReader, "read_into", count)
    async with open_checkpoint(tmp_path) as checkpoint:
        part = await checkpoint.tensor("large", (slice(100, 1100),))
    assert torch.equal(part, torch.ones(1000))
    assert sum(read) < 4000 + 1024


@pytest.mark.parametrize("consolidated", [False, True])
async def test_what_stocks_writer_for_hugging_face_wrote_is_read(consolidated: bool, tmp_path: Path) -> None:
    expected = tensors()
    writer = HuggingFaceStorageWriter(
        path=str(tmp_path / "hf"),
        fqn_to_index_mapping=dict.fromkeys(expected, 1),
        save_distributed=not consolidated,
    )
    stock.save(dict(expected), storage_writer=writer, no_dist=True)
    directories = {file.parent for file in (tmp_path / "hf").rglob("*.safetensors")}
    for directory in directories:
        async with open_checkpoint(directory) as checkpoint:
            assert_same(await checkpoint.read(), expected)


async def test_parts_of_ranks_are_joined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    for rank, (start, stop) in enumerate(((0, 4), (4, 6))):
        sharding = json.dumps({"w": {"saved_offsets": [start, 0]}})
        save_file(
            {"w": whole[start:stop].contiguous()},
            tmp_path / f"shard-0000{rank}-model-00001-of-00001.safetensors",
            metadata={"DCP_SHARDING_INFO": sharding, "DCP_VERSION": "1.0"},
        )
    async with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal((await checkpoint.read())["w"], whole)
        assert torch.equal(await checkpoint.tensor("w", (slice(3, 5), 2)), whole[3:5, 2])
    # nothing tells that there was a third one
    told = [record.getMessage() for record in caplog.records if "tensors are shorter" in record.getMessage()]
    assert len(told) == 2
    assert "w (6, 4)" in told[0]
    caplog.clear()
    async with open_checkpoint(tmp_path) as checkpoint:
        await checkpoint.load({"w": torch.zeros(6, 4)})
        with pytest.raises(LoadError, match=r"\(8, 4\)"):
            await checkpoint.load({"w": torch.zeros(8, 4)})
    assert not caplog.records  # the state's shape tells


async def test_an_engine_says_how_a_model_is_read(model: Path) -> None:
    async with CheckpointEngine(model.parent) as engine:
        assert await engine.latest() is None
        with pytest.raises(CheckpointNotFoundError, match=r"open_checkpoint\(path\)"):
            await engine.load({}, "hf")


async def test_what_is_quantised_in_blocks_is_not_taken_without_its_scales(tmp_path: Path) -> None:
    weight, scales = torch.ones(128, 128).to(torch.float8_e4m3fn), torch.full((1, 1), 3.0)
    save_file({"w": weight, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    for dtypes in ("exact", "convert"):
        target = {"w": torch.zeros(128, 128)}
        async with open_checkpoint(tmp_path) as checkpoint:
            with pytest.raises(LoadError, match=r"dequantize=torch\.float32") as caught:
                await checkpoint.load(target, dtypes=dtypes)
        assert "dtypes='convert'" not in str(caught.value)
        assert not target["w"].any()
    kept = {"w": torch.zeros(128, 128).to(torch.float8_e4m3fn)}
    async with open_checkpoint(tmp_path) as checkpoint:
        await checkpoint.load(kept)
    assert_same(kept["w"], weight)


async def test_a_stream_holds_such_tensors_once(tmp_path: Path) -> None:
    nbytes = 8 << 20
    save_file({str(n): torch.ones(nbytes // 4) for n in range(3)}, tmp_path / "model.safetensors")
    async with open_checkpoint(tmp_path) as checkpoint:
        (first, taken), *_ = list(batches(checkpoint._known().contents, checkpoint.names, 2 * nbytes))
    assert (len(first), taken) == (2, 2 * nbytes)  # read straight into their tensors


async def test_empty_tensors_at_one_place_keep_their_shapes(tmp_path: Path) -> None:
    state = {"a": torch.empty(0, 3), "b": torch.empty(0, 5), "c": torch.empty(0, dtype=torch.int32)}
    save_file(state, tmp_path / "empty.safetensors")
    async with open_checkpoint(tmp_path / "empty.safetensors") as checkpoint:
        assert_same(await checkpoint.read(), state)
