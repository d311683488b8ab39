"""Stock torch.distributed.checkpoint reads what the engine writes, bit for bit, by each of its doors."""

from __future__ import annotations

import datetime
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dcp_async import CheckpointEngine, RNGState, StagingOptions
from tests.support.doubles import DTYPES, SHAPES, TrainingRun, assert_same, frozen, random_tensor
from tests.support.saves import SMALL

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]


async def write(root: Path, state: Any, staging: StagingOptions = SMALL) -> Path:
    async with CheckpointEngine(root, staging=staging) as engine:
        info = await (await engine.save(state)).upload_completion
    return root.joinpath(info.checkpoint_id)


def stock_load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def stock_unpack(path: Path, target: Path) -> Any:
    dcp_to_torch_save(path, target)
    return torch.load(target, weights_only=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
async def test_stock_load_fills_every_bit(root: Path, dtype: torch.dtype) -> None:
    saved = {f"t{index}": random_tensor(dtype, shape, index) for index, shape in enumerate(SHAPES)}
    path = await write(root, {"x": saved})
    target = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in saved.items()}
    assert_same(stock_load({"x": target}, path), {"x": saved})


@pytest.mark.parametrize(
    "staging", [SMALL, StagingOptions(), StagingOptions(overlap=True)], ids=["small", "default", "overlap"]
)
async def test_stock_load_resumes_a_training_run(root: Path, staging: StagingOptions) -> None:
    run, other = TrainingRun(1), TrainingRun(2)
    run.step(3)
    other.step(1)
    path = await write(root, run.state | {"epoch": 3, "note": ["x", {"y": 1.5}], "rng": RNGState()}, staging)
    target: dict[str, Any] = {
        "model": other.model.state_dict(),
        "optim": other.optim.state_dict(),
        "scheduler": other.scheduler.state_dict(),
        "epoch": 0,
        "note": ["", {"y": 0.0}],
    }
    stock_load(target, path)
    assert_same(frozen(target), run.picture() | {"epoch": 3, "note": ["x", {"y": 1.5}]})


async def test_stock_load_takes_statefuls(root: Path) -> None:
    run, other = TrainingRun(1), TrainingRun(2)
    run.step(2)
    other.step(1)
    path = await write(root, run.state)
    stock_load({"model": other.model, "optim": other.optim, "scheduler": other.scheduler}, path)
    assert_same(other.picture(), run.picture())


async def test_stock_unpacks_without_a_template(root: Path, tmp_path: Path) -> None:
    run = TrainingRun(1)
    run.step(2)
    path = await write(
        root, run.state | {"l": [torch.ones(2), {"k": torch.zeros(3)}], "plain": [1, 2], "s": "x"}
    )
    result = stock_unpack(path, tmp_path / "whole.pt")
    assert_same(result["model"], frozen(run.model))
    assert_same(result["l"], [torch.ones(2), {"k": torch.zeros(3)}])
    assert (result["plain"], result["s"]) == ([1, 2], "x")
    exp_avg = run.optim.state_dict()["state"][0]["exp_avg"]
    assert_same(result["optim"]["state"]["0"]["exp_avg"], exp_avg)


async def test_stock_sees_the_same_names_as_in_its_own_checkpoint(root: Path, tmp_path: Path) -> None:
    run = TrainingRun(1)
    run.step(2)
    state = {
        "run": frozen(run.state),
        "t": (torch.ones(2), 1),
        "e": {"a": {}, "b": [], "c": [[], {}]},
        "l": [[1, torch.ones(1)], [2]],
        "i": {3: torch.ones(1), -1: 2},
    }
    ours = await write(root, state)
    dcp.save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    mine = FileSystemReader(ours).read_metadata()
    stock = FileSystemReader(tmp_path / "stock").read_metadata()
    assert set(mine.state_dict_metadata) == set(stock.state_dict_metadata)
    assert mine.planner_data == stock.planner_data
    for name, entry in stock.state_dict_metadata.items():
        own = mine.state_dict_metadata[name]
        assert type(own) is type(entry)
        if isinstance(entry, TensorStorageMetadata):
            assert isinstance(own, TensorStorageMetadata)
            assert (own.size, own.properties.dtype) == (entry.size, entry.properties.dtype)
    assert set(mine.storage_data) == set(stock.storage_data)


async def test_stock_reads_every_kind_of_view(root: Path) -> None:
    base = random_tensor(torch.float32, (60, 70), 1)
    saved = {
        "transposed": base.t(),
        "stepped": base[::3, 1::2],
        "expanded": base[:, :1].expand(60, 9),
        "conjugate": torch.randn(9, dtype=torch.complex64).conj(),
        "channels_last": torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3, 4)),
        "tied": base,
        "tie": base,
    }
    path = await write(root, saved)
    target = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in saved.items()}
    assert_same(stock_load(target, path), {name: tensor.detach() for name, tensor in saved.items()})


@pytest.mark.parametrize("size", [0, 1, 3000, 4000, 4100, 9000, 70_000, 1_100_000])
async def test_stock_reads_leaves_of_every_size(root: Path, size: int) -> None:
    path = await write(root, {"a": {"leaf": b"x" * size, "w": torch.ones(3)}, "z": 1})
    target = {"a": {"leaf": b"", "w": torch.zeros(3)}, "z": 0}
    assert_same(stock_load(target, path), {"a": {"leaf": b"x" * size, "w": torch.ones(3)}, "z": 1})


async def test_stock_reads_leaves_that_outgrew_and_left_their_slots(root: Path) -> None:
    async with CheckpointEngine(root, staging=SMALL) as engine:
        for step, size in enumerate([10, 3000, 3500, 5000, 50_000, 10]):
            state = {"leaf": "y" * size, "w": torch.ones(3) * step, "n": step}
            info = await (await engine.save(state, step=step)).upload_completion
            target = {"leaf": "", "w": torch.zeros(3), "n": -1}
            assert_same(stock_load(target, root / info.checkpoint_id), state)


async def test_stock_reads_numpy_and_standard_values(root: Path) -> None:
    saved = {
        "array": np.arange(6.0),
        "scalar": np.float32(0.5),
        "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "tuple": (1, torch.ones(2)),
        "set": {1, 2},
        "none": None,
        "nan": float("nan"),
    }
    path = await write(root, saved)
    assert_same(stock_load(dict.fromkeys(saved), path), saved)


async def test_stock_reads_many_tensors(root: Path) -> None:
    saved = {f"t{i}": random_tensor(torch.float32, (i % 50,), i) for i in range(300)}
    path = await write(root, saved)
    target = {name: torch.zeros(tensor.shape) for name, tensor in saved.items()}
    assert_same(stock_load(target, path), saved)


async def test_stock_reads_large_tensors(root: Path) -> None:
    saved = {
        "w": random_tensor(torch.bfloat16, (2048, 1025), 1),
        "v": random_tensor(torch.uint8, ((1 << 20) + 1,), 2),
    }
    path = await write(root, saved, StagingOptions())
    target = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in saved.items()}
    assert_same(stock_load(target, path), saved)


async def test_stock_reads_a_replaced_checkpoint(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        for n in range(3):
            await (
                await engine.save({"w": torch.ones(9) * n}, checkpoint_id="best", replace=True)
            ).upload_completion
    assert_same(stock_load({"w": torch.zeros(9)}, root / "best"), {"w": torch.ones(9) * 2})


async def test_each_item_is_a_file_that_torch_load_accepts_as_weights(root: Path) -> None:
    import io

    saved = {"w": random_tensor(torch.bfloat16, (33, 44), 1), "n": 3, "l": [1, "x"]}
    path = await write(root, saved)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        content = (path / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
        assert_same(torch.load(io.BytesIO(content), weights_only=True), saved[index.fqn])


async def test_each_item_is_a_zip_by_the_letter(root: Path) -> None:
    """Other tools read zips more strictly than torch does: sizes, offsets and directory must agree."""
    import io
    import zipfile

    path = await write(root, {"w": random_tensor(torch.uint8, (5000,), 1), "n": 3})
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        content = (path / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = {name.split("/", 1)[1] for name in archive.namelist()}
            assert {"data.pkl", "version"} <= names
            assert sum(entry.file_size for entry in archive.infolist()) <= len(content)
            for entry in archive.infolist():
                assert content[entry.header_offset : entry.header_offset + 4] == b"PK\x03\x04"
