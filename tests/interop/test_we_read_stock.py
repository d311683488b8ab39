"""The engine reads what stock torch.distributed.checkpoint writes, bit for bit, however it was written."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from dcp_async import (
    CheckpointEngine,
    CheckpointError,
    CorruptCheckpointError,
    IncompatibleStateError,
)
from tests.support.doubles import (
    DTYPES,
    SHAPES,
    TrainingRun,
    assert_holds_only,
    assert_same,
    frozen,
    random_tensor,
)
from tests.support.saves import SMALL

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]


WRITERS: dict[str, Callable[[Path], FileSystemWriter]] = {
    "one_thread": lambda path: FileSystemWriter(path, sync_files=False),
    "two_threads": lambda path: FileSystemWriter(path, thread_count=2, sync_files=False),
    "file_per_item": lambda path: FileSystemWriter(path, single_file_per_rank=False, sync_files=False),
}


def stock_save(path: Path, state: Any, kind: str = "one_thread", planner: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dcp.save(state, storage_writer=WRITERS[kind](path), planner=planner, no_dist=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
async def test_every_bit_of_a_dtype(root: Path, dtype: torch.dtype) -> None:
    saved = {f"t{index}": random_tensor(dtype, shape, index) for index, shape in enumerate(SHAPES)}
    stock_save(root / "step-00000001", {"x": saved})
    target = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in saved.items()}
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await engine.load({"x": target})
        assert_same(target, saved)
        assert_same(await engine.read(), {"x": saved})


@pytest.mark.parametrize("kind", WRITERS)
async def test_a_training_run(root: Path, kind: str) -> None:
    run, other = TrainingRun(1), TrainingRun(2)
    run.step(3)
    state = run.state | {"epoch": 3, "list": [1, 2], "deep": {"l": [torch.ones(3), {"x": 1}]}}
    stock_save(root / "step-00000012", state, kind)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        target: dict[str, Any] = {
            **other.state,
            "epoch": 0,
            "list": [],
            "deep": {"l": [torch.zeros(3), {"x": 0}]},
        }
        report = await engine.load(target)
        assert_same(other.picture(), run.picture())
        assert (target["epoch"], target["list"], target["deep"]["l"][1]) == (3, [1, 2], {"x": 1})
        assert_same(target["deep"]["l"][0], torch.ones(3))
        assert report.checkpoint_id == "step-00000012"
        assert report.next_step == 13
        result = await engine.read()
        assert_same(result["model"], frozen(run.model))
        assert result["epoch"] == 3


@pytest.mark.parametrize("kind", WRITERS)
async def test_a_stock_checkpoint_is_listed(root: Path, kind: str) -> None:
    stock_save(root / "step-00000012", {"a": torch.ones(10), "b": torch.ones(20), "n": 1}, kind)
    async with CheckpointEngine(root) as engine:
        latest = await engine.latest()
        assert latest is not None
        assert (latest.checkpoint_id, latest.producer, latest.step) == ("step-00000012", "stock", 12)
        assert (latest.torch_version, latest.world_size, dict(latest.notes)) == (None, None, {})
        files = list((root / "step-00000012").glob("*.distcp"))
        assert (latest.num_files, latest.nbytes) == (len(files), sum(file.stat().st_size for file in files))
        assert set((await latest.metadata()).state_dict_metadata) == {"a", "b", "n"}


@pytest.mark.parametrize("kind", WRITERS)
async def test_views_and_ties(root: Path, kind: str) -> None:
    base = random_tensor(torch.float32, (60, 70), 1)
    saved = {
        "transposed": base.t(),
        "stepped": base[::3, 1::2],
        "narrow": base[5:9],
        "expanded": torch.ones(1, 5).expand(4, 5),
        "permuted": random_tensor(torch.int16, (3, 4, 5), 2).permute(2, 0, 1),
        "tied": base,
        "parameter": torch.nn.Parameter(torch.randn(4, 4)),
    }
    stock_save(root / "s", saved, kind)
    target = {name: torch.ones(tensor.shape, dtype=tensor.dtype) for name, tensor in saved.items()}
    strided = {"transposed": torch.ones(60, 70).t()}
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await engine.load(target, "s")
        await engine.load(strided, "s", strict=False)
        result = await engine.read("s")
    expected = {name: tensor.detach() for name, tensor in saved.items()}
    assert_same(target, expected)
    assert_same({name: tensor.detach() for name, tensor in result.items()}, expected)
    assert_same(strided["transposed"], base.t())


class ChunkPlanner(DefaultSavePlanner):
    """Cuts each matrix into a grid of chunks, as several ranks would."""

    rows, columns = 7, 5

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items: list[WriteItem] = []
        for item in plan.items:
            tensor = self.state_dict.get(item.index.fqn)
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or item.tensor_data is None:
                items.append(item)
                continue
            for row in range(0, tensor.size(0), self.rows):
                for column in range(0, tensor.size(1), self.columns):
                    offsets = torch.Size([row, column])
                    sizes = torch.Size(
                        [min(self.rows, tensor.size(0) - row), min(self.columns, tensor.size(1) - column)]
                    )
                    data = TensorWriteData(
                        chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                        properties=item.tensor_data.properties,
                        size=tensor.size(),
                    )
                    index = MetadataIndex(item.index.fqn, offsets)
                    items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        tensor = self.state_dict[index.fqn]
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
            return super().lookup_object(index)
        assert index.offset is not None
        row, column = index.offset
        return tensor[row : row + self.rows, column : column + self.columns]


@pytest.mark.parametrize("kind", WRITERS)
async def test_tensors_that_were_saved_in_chunks(root: Path, kind: str) -> None:
    saved = {"m": random_tensor(torch.float32, (50, 33), 1), "v": random_tensor(torch.int64, (9,), 2), "n": 4}
    stock_save(root / "s", saved, kind, ChunkPlanner())
    target = {"m": torch.zeros(50, 33), "v": torch.zeros(9, dtype=torch.int64), "n": 0}
    turned = {"m": torch.zeros(33, 50).t()}
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await engine.load(target, "s")
        assert_same(target, saved)
        assert_same(await engine.read("s"), saved)
        await engine.load(turned, "s")
    assert_same(turned["m"], saved["m"])


async def test_a_missing_chunk_is_noticed_before_anything_is_touched(root: Path) -> None:
    stock_save(root / "s", {"m": torch.ones(50, 33)}, "one_thread", ChunkPlanner())
    path = root / "s" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    del metadata.state_dict_metadata["m"].chunks[3]
    path.write_bytes(pickle.dumps(metadata))
    target = {"m": torch.zeros(50, 33)}
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CheckpointError, match="m"):
            await engine.load(target, "s")
        with pytest.raises(CheckpointError):
            await engine.read("s")
    assert_same(target["m"], torch.zeros(50, 33))


async def test_chunk_data_that_nothing_stores_is_noticed(root: Path) -> None:
    stock_save(root / "s", {"m": torch.ones(50, 33)}, "one_thread", ChunkPlanner())
    path = root / "s" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    del metadata.storage_data[list(metadata.storage_data)[5]]
    path.write_bytes(pickle.dumps(metadata))
    target = {"m": torch.zeros(50, 33)}
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CheckpointError, match="m"):
            await engine.load(target, "s")
    assert_same(target["m"], torch.zeros(50, 33))


@pytest.mark.parametrize("damage", ["missing", "short", "empty"])
async def test_a_stock_data_file_of_the_wrong_size_is_noticed_before_anything_is_touched(
    root: Path, damage: str
) -> None:
    stock_save(root / "s", {f"t{i}": torch.ones(5000) for i in range(3)})
    (file,) = (root / "s").glob("*.distcp")
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, 0 if damage == "empty" else file.stat().st_size // 2)
    target = {f"t{i}": torch.zeros(5000) for i in range(3)}
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError):
            await engine.load(target, "s")
    assert_same(target, {f"t{i}": torch.zeros(5000) for i in range(3)})


async def test_a_stock_checkpoint_of_another_shape_is_refused(root: Path) -> None:
    stock_save(root / "s", {"w": torch.ones(5, 4)})
    target = {"w": torch.zeros(4, 5)}
    async with CheckpointEngine(root) as engine:
        with pytest.raises(IncompatibleStateError, match="w"):
            await engine.load(target, "s")
    assert_same(target["w"], torch.zeros(4, 5))


async def test_latest_falls_back_over_a_truncated_stock_checkpoint(root: Path) -> None:
    for step in (1, 2):
        stock_save(root / f"step-{step:08d}", {"w": torch.ones(5000) * step})
    (file,) = (root / "step-00000002").glob("*.distcp")
    os.truncate(file, file.stat().st_size // 2)
    target = {"w": torch.zeros(5000)}
    async with CheckpointEngine(root) as engine:
        report = await engine.load(target)
    assert (report.checkpoint_id, report.skipped) == ("step-00000001", ("step-00000002",))
    assert_same(target["w"], torch.ones(5000))


async def test_stock_and_own_checkpoints_live_side_by_side(root: Path) -> None:
    stock_save(root / "step-00000003", {"w": torch.ones(50) * 3})
    async with CheckpointEngine(root) as engine:
        first = await (await engine.save({"w": torch.ones(50) * 4})).upload_completion
        assert first.step == 4
        stock_save(root / "step-00000005", {"w": torch.ones(50) * 5})
        assert [(info.step, info.producer) async for info in engine.checkpoints()] == [
            (3, "stock"),
            (4, "dcp_async"),
            (5, "stock"),
        ]
        assert_same(await engine.read(), {"w": torch.ones(50) * 5})
        assert_same(await engine.read(3), {"w": torch.ones(50) * 3})
        await (await engine.save({"w": torch.ones(50) * 6}, step=6)).upload_completion
    assert_same(
        sorted(path.name for path in (root / "step-00000003").iterdir()), [".metadata", "__0_0.distcp"]
    )


async def test_a_stock_checkpoint_can_be_replaced_by_ours(root: Path) -> None:
    stock_save(root / "best", {"w": torch.ones(50)})
    async with CheckpointEngine(root) as engine:
        response = await engine.save({"w": torch.zeros(50)}, checkpoint_id="best", replace=True)
        await response.upload_completion
        assert_same(await engine.read("best"), {"w": torch.zeros(50)})


async def test_python_leaves_of_stock_need_trust(root: Path) -> None:
    from dcp_async import Trust, UntrustedCheckpointError

    stock_save(root / "s", {"leaf": Custom(4), "w": torch.ones(2)})
    async with CheckpointEngine(root) as engine:
        with pytest.raises(UntrustedCheckpointError, match="Custom"):
            await engine.read("s")
        assert_same(await engine.read("s", keys=["w"]), {"w": torch.ones(2)})
    async with CheckpointEngine(root, trust=Trust(safe_globals=(Custom,))) as engine:
        assert (await engine.read("s"))["leaf"].value == 4


class Custom:
    def __init__(self, value: int) -> None:
        self.value = value


async def test_a_flat_torch_dict_saved_by_stock(root: Path) -> None:
    """Names with dots at the top level, as most trainers hand them to stock."""
    run = TrainingRun(1)
    saved = {f"model.{name}": tensor for name, tensor in frozen(run.model).items()}
    stock_save(root / "s", saved)
    target = TrainingRun(2)
    async with CheckpointEngine(root) as engine:
        await engine.load({"model": target.model}, "s")
        assert_same(await engine.read("s"), saved)
    assert_same(frozen(target.model), frozen(run.model))


async def test_bytes_behind_the_pickle_and_pathlib_paths_are_accepted(root: Path) -> None:
    """Stock pickles its own checkpoint_id as a pathlib path into `.metadata`."""
    stock_save(root / "s", {"w": torch.ones(5)})
    assert b"pathlib" in (root / "s" / ".metadata").read_bytes()
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read("s"), {"w": torch.ones(5)})


async def test_a_resume_from_stock_continues_with_ours(root: Path) -> None:
    whole = TrainingRun(1)
    whole.step(3)
    stock_save(root / "step-00000003", whole.state)
    resumed = TrainingRun(2)
    async with CheckpointEngine(root) as engine:
        assert (await engine.load(resumed.state)).next_step == 4
        torch.manual_seed(7)
        resumed.step(2)
        await (await engine.save(resumed.state)).upload_completion
        torch.manual_seed(7)
        whole.step(2)
        assert_same(resumed.picture(), whole.picture())
        other = TrainingRun(3)
        assert (await engine.load(other.state)).step == 4
        assert_same(other.picture(), whole.picture())
    assert_holds_only_ours(root, "step-00000004")


def assert_holds_only_ours(root: Path, name: str) -> None:
    import shutil

    for entry in root.iterdir():
        if entry.name != name:
            shutil.rmtree(entry)
    assert_holds_only(root, [name])
