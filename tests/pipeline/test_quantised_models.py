"""What Hugging Face's files hold quantised in blocks is made plain on request, as torch does it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

from dcp_async import (
    CheckpointEngine,
    CorruptCheckpointError,
    IncompatibleStateError,
    LoadError,
    functional,
    open_checkpoint,
    sync,
)
from dcp_async.storage.local.reader import LocalReader
from tests.support.doubles import assert_same, raw_bytes

SHAPES = {"a.weight": (300, 200), "b.weight": (128, 384), "c.weight": (5, 7)}
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def write_model(
    directory: Path, values: dict[str, torch.Tensor], files: dict[str, str] | None = None, config: Any = None
) -> None:
    directory.mkdir(exist_ok=True)
    weights = {name: (files or {}).get(name, "model-00001-of-00002.safetensors") for name in values}
    for file in set(weights.values()):
        save_file({name: values[name] for name in values if weights[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    if config is not None:
        text = config if isinstance(config, str) else json.dumps({"quantization_config": config})
        (directory / "config.json").write_text(text)


def fp8() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    values = {"norm.weight": torch.randn(16)}
    for name, shape in SHAPES.items():
        values[name] = torch.randn(shape).to(torch.float8_e4m3fn)
        of_blocks = [-(-extent // 128) for extent in shape]
        values[f"{name}_scale_inv"] = torch.rand(of_blocks) * 3
    return values


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Block-wise FP8, one tensor's scales in another file than it."""
    values = fp8()
    write_model(tmp_path / "fp8", values, {"b.weight_scale_inv": "model-00002-of-00002.safetensors"})
    return tmp_path / "fp8"


def as_torch_reads(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    made = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    made["norm.weight"] = torch.zeros(16)
    stock.load(
        made, storage_reader=QuantizedHuggingFaceStorageReader(str(path), target_dtype=dtype), no_dist=True
    )
    return made


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
async def test_fp8_is_what_torchs_reader_makes_of_it(dtype: torch.dtype, model: Path) -> None:
    expected = as_torch_reads(model, dtype)
    async with open_checkpoint(model, dequantize=dtype) as checkpoint:
        assert set(checkpoint.names) == set(expected)
        assert checkpoint.metadata.state_dict_metadata.keys() == expected.keys()
        assert_same(await checkpoint.read(), expected)
        target = {name: torch.zeros_like(value) for name, value in expected.items()}
        await checkpoint.load(target)
        assert_same(target, expected)
        assert_same({name: value async for name, value in checkpoint.stream(budget_bytes=1 << 16)}, expected)
        for index in ((slice(100, 140), slice(50, 130)), (slice(1, 299, 3), 5), (7,), (slice(128, 128), 0)):
            part = await checkpoint.tensor("a.weight", index)
            assert raw_bytes(part.contiguous()) == raw_bytes(expected["a.weight"][index].contiguous())
    with sync.open_checkpoint(model, dequantize=dtype) as checkpoint:
        assert_same(checkpoint.read("b.*"), {"b.weight": expected["b.weight"]})


async def test_every_verb_of_an_engine_makes_values_plain(tmp_path: Path, model: Path) -> None:
    async with open_checkpoint(model, dequantize=torch.float32) as checkpoint:
        expected = await checkpoint.read()
    own = tmp_path / "own"
    async with CheckpointEngine(own) as engine:
        assert_same(await engine.read(model, dequantize=torch.float32), expected)
        async with engine.checkpoint(model, dequantize=torch.float32) as checkpoint:
            assert_same(await checkpoint.read(), expected)
        target = {"m": {name: torch.zeros_like(value) for name, value in expected.items()}}
        report = await engine.load(target, model, rename={"*": "m.*"}, dequantize=torch.float32)
        assert (report.missing, report.unexpected) == ((), ())
        assert_same(target["m"], expected)
        part = {"m": {"a.weight": torch.zeros(300, 200)}}
        await engine.load(
            part, model, keys=["m.a.*"], rename={"*": "m.*"}, dequantize=torch.float32, atomic=True
        )
        assert_same(part["m"]["a.weight"], expected["a.weight"])
        halves = {"a.weight": torch.zeros(300, 200).half()}
        with pytest.raises(IncompatibleStateError, match="float16"):
            await engine.load(halves, model, keys=["a.weight"], dequantize=torch.float32)
        await engine.load(halves, model, keys=["a.weight"], dequantize=torch.float32, dtypes="convert")
        assert_same(halves["a.weight"], expected["a.weight"].half())
    with sync.CheckpointEngine(own) as engine:
        assert_same(engine.read(model, dequantize=torch.float32), expected)
        with engine.checkpoint(model, dequantize=torch.float32) as checkpoint:
            assert_same(checkpoint.read(), expected)
        flat = {name: torch.zeros_like(value) for name, value in expected.items()}
        engine.load(flat, model, dequantize=torch.float32)
        assert_same(flat, expected)


async def test_dcps_function_makes_values_plain_without_a_reader_of_torchs(model: Path) -> None:
    async with open_checkpoint(model, dequantize=torch.bfloat16) as checkpoint:
        expected = await checkpoint.read()
    target = {name: torch.zeros_like(value) for name, value in expected.items()}
    await functional.load(target, checkpoint_id=model, dequantize=torch.bfloat16)
    assert_same(target, expected)
    again = {"a.weight": torch.zeros(300, 200, dtype=torch.float64)}
    sync.load(again, checkpoint_id=model, dequantize=torch.bfloat16)  # dtypes are converted, as ever with DCP
    assert_same(again["a.weight"], expected["a.weight"].double())
    with pytest.raises(LoadError, match=r"dequantize=torch\.float32"):
        await functional.load({"a.weight": torch.zeros(300, 200)}, checkpoint_id=model)
    reader = QuantizedHuggingFaceStorageReader(str(model))
    with pytest.raises(ValueError, match="reads by itself"):
        await functional.load(target, storage_reader=reader, dequantize=torch.bfloat16)


def as_transformers_makes_it(
    weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """The formula of its integrations/finegrained_fp8.py, for whole blocks."""
    rows, columns = weight.shape[-2:]
    cut = weight.to(torch.float32).reshape(-1, rows // block[0], block[0], columns // block[1], block[1])
    factors = scales.reshape(-1, rows // block[0], columns // block[1])[:, :, None, :, None]
    return (cut * factors.to(torch.float32)).reshape(weight.shape)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
async def test_blocks_are_as_large_as_the_config_says_in_every_expert(
    kind: torch.dtype, scale: torch.dtype, tmp_path: Path
) -> None:
    weight, scales = torch.randn(3, 64, 96).to(kind), (torch.rand(3, 2, 6) + 0.5).to(scale)
    config = {"quant_method": "fp8", "weight_block_size": [32, 16]}
    write_model(tmp_path, {"w": weight, "w_scale_inv": scales}, config=config)
    expected = as_transformers_makes_it(weight, scales, (32, 16))
    async with open_checkpoint(tmp_path, dequantize=torch.float32) as checkpoint:
        assert_same(await checkpoint.read(), {"w": expected})
        part = await checkpoint.tensor("w", (slice(1, 3), slice(31, 40), slice(90, 96)))
        assert_same(part, expected[1:3, 31:40, 90:96])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
async def test_one_scale_may_stand_for_a_whole_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = torch.randn(300, 200).to(torch.float8_e4m3fn)
    values = {"w": weight, "w_scale_inv": torch.full(shape, 0.3)}
    write_model(tmp_path, values, config={"quant_method": "fp8", "weight_block_size": None})
    async with open_checkpoint(tmp_path, dequantize=torch.float32) as checkpoint:
        assert_same((await checkpoint.read())["w"], weight.float() * 0.3)
        assert_same(await checkpoint.tensor("w", (slice(129, 131), 199)), weight.float()[129:131, 199] * 0.3)


def mxfp4() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {
        "mlp.up_blocks": torch.randint(0, 256, (4, 64, 5, 16), dtype=torch.uint8),
        "mlp.up_scales": torch.arange(4 * 64 * 5, dtype=torch.int64).to(torch.uint8).reshape(4, 64, 5),
        "mlp.up_bias": torch.randn(4, 64).bfloat16(),
    }


def bits(values: torch.Tensor) -> tuple[bytes, bytes]:
    """What makes two results the same: which of the processor's many NaNs stands for one is no matter."""
    nan = values.isnan()
    return raw_bytes(nan), raw_bytes(torch.where(nan, torch.zeros_like(values), values))


def torch_mxfp4(path: Path, dtype: torch.dtype, offsets: list[int], lengths: list[int]) -> torch.Tensor:
    """A part, as torch's reader makes it plain."""
    reader = QuantizedHuggingFaceStorageReader(str(path), target_dtype=dtype)
    reader.read_metadata()
    index = MetadataIndex("mlp.up_blocks")
    zeros = torch.Size([0] * 3)
    item = ReadItem(LoadItemType.TENSOR, index, zeros, index, torch.Size(offsets), torch.Size(lengths))
    with safe_open(path / "model-00001-of-00002.safetensors", framework="pt") as file:
        return reader._read_quantized_tensor_with_block_alignment(item, file)


@pytest.mark.parametrize("dtype", DTYPES)
async def test_mxfp4_is_what_torchs_reader_makes_of_it(dtype: torch.dtype, tmp_path: Path) -> None:
    values = mxfp4()
    assert len(set(values["mlp.up_scales"].flatten().tolist())) == 256  # each exponent, the last as well
    write_model(tmp_path, values, config={"quant_method": "mxfp4"})
    async with open_checkpoint(tmp_path, dequantize=dtype) as checkpoint:
        assert set(checkpoint.names) == {"mlp.up_blocks", "mlp.up_bias"}
        whole = (await checkpoint.read())["mlp.up_blocks"]
        expected = torch_mxfp4(tmp_path, dtype, [0, 0, 0], [4, 64, 160])
        assert whole.shape == expected.shape == (4, 64, 160)
        assert bits(whole) == bits(expected)
        part = await checkpoint.tensor("mlp.up_blocks", (slice(1, 3), slice(7, 60), slice(31, 97)))
        assert bits(part) == bits(torch_mxfp4(tmp_path, dtype, [1, 7, 31], [2, 53, 66]))
        target = {
            "mlp.up_blocks": torch.zeros(4, 64, 160, dtype=dtype),
            "mlp.up_bias": values["mlp.up_bias"] * 0,
        }
        await checkpoint.load(target)
        assert bits(target["mlp.up_blocks"]) == bits(expected)


async def test_parts_of_ranks_are_made_plain_together(tmp_path: Path) -> None:
    values = mxfp4() | fp8()
    for rank, cut in enumerate((slice(0, 3), slice(3, 4))):
        part = {name: values[name][cut].contiguous() for name in ("mlp.up_blocks", "mlp.up_scales")}
        rows = slice(0, 130) if rank == 0 else slice(130, 300)
        part["a.weight"] = values["a.weight"][rows].contiguous()
        places = {
            name: {"saved_offsets": [cut.start, *[0] * (value.dim() - 1)]} for name, value in part.items()
        }
        places["a.weight"] = {"saved_offsets": [rows.start, 0]}
        if rank == 0:
            part["a.weight_scale_inv"] = values["a.weight_scale_inv"]
            places["a.weight_scale_inv"] = {"saved_offsets": [0, 0]}
        metadata = {"DCP_SHARDING_INFO": json.dumps(places)}
        save_file(part, tmp_path / f"shard-0000{rank}-model-00001-of-00001.safetensors", metadata=metadata)
    write_model(tmp_path / "whole", {name: values[name] for name in (*part, "a.weight_scale_inv")})
    async with (
        open_checkpoint(tmp_path, dequantize=torch.bfloat16) as checkpoint,
        open_checkpoint(tmp_path / "whole", dequantize=torch.bfloat16) as whole,
    ):
        expected = await whole.read()
        made = await checkpoint.read()
        assert made.keys() == expected.keys()
        for name, value in made.items():
            assert bits(value) == bits(expected[name])
        box = await checkpoint.tensor("a.weight", (slice(120, 140), slice(100, 150)))
        assert raw_bytes(box) == raw_bytes(expected["a.weight"][120:140, 100:150].contiguous())


async def test_a_slice_reads_its_blocks_and_their_scales_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "w": torch.zeros(8192, 1024).to(torch.float8_e4m3fn),
        "w_scale_inv": torch.ones(64, 8),
        "x_blocks": torch.zeros(1024, 64, 16, dtype=torch.uint8),
        "x_scales": torch.zeros(1024, 64, dtype=torch.uint8),
    }
    write_model(tmp_path, values)
    read: list[int] = []
    real = LocalReader.read_into

    async def count(self: LocalReader, file: str, pieces: Any, arrived: Any = None) -> None:
        read.append(sum(len(memory) for _, memory in pieces))
        await real(self, file, pieces, arrived)

    async with open_checkpoint(tmp_path, dequantize=torch.bfloat16) as checkpoint:
        monkeypatch.setattr(LocalReader, "read_into", count)
        await checkpoint.tensor("w", slice(1000, 1100))
        assert sum(read) == 100 * 1024 + 2 * 8 * 4
        read.clear()
        await checkpoint.tensor("x_blocks", slice(10, 30))
        assert sum(read) == 20 * 64 * 17


async def test_as_it_is_stored_it_is_read_without_being_asked(model: Path) -> None:
    async with open_checkpoint(model) as checkpoint:
        assert_same(await checkpoint.read(), fp8())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "config.json is no JSON"),
        ("[]", "config.json is no mapping"),
        ('{"quantization_config": []}', "quantization_config of config.json"),
        ({"weight_block_size": [128]}, "no pair of sizes"),
        ({"weight_block_size": [128, -1]}, "no pair of sizes"),
        ({"weight_block_size": [True, 128]}, "no pair of sizes"),
        (
            {"weight_block_size": [64, 128]},
            r"a.weight_scale_inv is \(3, 2\).* in blocks of 64x128 needs \(5, 2\)",
        ),
    ],
)
async def test_a_config_that_does_not_fit_is_told(config: Any, words: str, tmp_path: Path) -> None:
    write_model(tmp_path, fp8(), config=config)
    target = {"a.weight": torch.zeros(300, 200)}
    async with CheckpointEngine(tmp_path / "own") as engine:
        with pytest.raises(CorruptCheckpointError, match=f"{words}.*nothing was loaded"):
            await engine.load(target, tmp_path, dequantize=torch.float32)
        assert_same(await engine.read(tmp_path), fp8())  # it matters to nobody else
    assert not target["a.weight"].any()


async def test_what_is_quantised_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    write_model(tmp_path / "gptq", fp8(), config={"quant_method": "gptq"})
    write_model(tmp_path / "int8", {"w": torch.ones(4, 4, dtype=torch.int8), "w_scale_inv": torch.ones(1, 1)})
    async with CheckpointEngine(tmp_path / "own") as engine:
        for name, words in (("gptq", "quantised by 'gptq'.*fp8 and mxfp4"), ("int8", "w is torch.int8")):
            for verb in (engine.read, lambda path, **more: engine.load({}, path, **more)):
                with pytest.raises(LoadError, match=words) as caught:
                    await verb(tmp_path / name, dequantize=torch.float32)
                assert not isinstance(caught.value, CorruptCheckpointError)
            with pytest.raises(LoadError, match=words):
                async with engine.checkpoint(tmp_path / name, dequantize=torch.float32):
                    pass
        await engine.save({"w": torch.ones(2)}, step=1)
        await engine.wait()
        with pytest.raises(LoadError, match="dequantize= is for safetensors files"):
            await engine.load({"w": torch.ones(2)}, dequantize=torch.float32)
        with pytest.raises(TypeError, match=r"is a torch\.dtype such as"):
            await engine.read(dequantize="bfloat16")  # type: ignore[arg-type]  # what many would write
        with pytest.raises(ValueError, match=r"one of torch\.bfloat16"):
            open_checkpoint(tmp_path / "int8", dequantize=torch.int8)


async def test_names_alone_make_nothing_quantised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {
        "x_blocks": torch.randn(2, 3),
        "x_scales": torch.randn(2),
        "y_scale_inv": torch.randn(2),
        "z": torch.randn(3).to(torch.float8_e5m2),
        "empty": torch.empty(0, 4).to(torch.float8_e4m3fn),
        "empty_scale_inv": torch.empty(0, 1),
    }
    write_model(tmp_path, values)
    expected = {name: value for name, value in values.items() if not name.startswith("empty")}
    with caplog.at_level(logging.WARNING):
        async with open_checkpoint(tmp_path, dequantize=torch.bfloat16) as checkpoint:
            assert_same(
                await checkpoint.read(), expected | {"empty": torch.empty(0, 4, dtype=torch.bfloat16)}
            )
    assert not caplog.records


async def test_groups_that_do_not_fit_their_scales_are_told(tmp_path: Path) -> None:
    blocks = torch.zeros(2, 3, 16, dtype=torch.uint8)
    for scales in (torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)):
        write_model(tmp_path, {"x_blocks": blocks, "x_scales": scales})
        with pytest.raises(CorruptCheckpointError, match="are no groups with a scale each"):
            async with open_checkpoint(tmp_path, dequantize=torch.bfloat16):
                pass
