"""What several ranks of stock wrote is read whole by one process: with collectives, and without."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItemType

from dcp_async import (
    CheckpointEngine,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UntrustedCheckpointError,
)
from dcp_async.storage.local.storage import LocalStorage
from tests.interop.rank_jobs import JOBS, run_rank
from tests.interop.stock_states import sharded_whole
from tests.support.doubles import assert_same, blank, random_tensor
from tests.support.processes import run_in_processes

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),
]

WORLDS = {2: list(JOBS), 4: ["collectives", "no_collectives", "threads"]}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every job of every world, by real processes over gloo."""
    directory = tmp_path_factory.mktemp("worlds")
    for world_size, jobs in WORLDS.items():
        (folder := directory / str(world_size)).mkdir()
        run_in_processes([(run_rank, (folder, world_size, rank, jobs)) for rank in range(world_size)])
        (folder / "rendezvous").unlink(missing_ok=True)
    return directory


@pytest.mark.parametrize(("world_size", "job"), [(n, job) for n in WORLDS for job in WORLDS[n]])
async def test_shards_of_real_ranks_are_put_together(worlds: Path, world_size: int, job: str) -> None:
    target = blank(sharded_whole())
    async with CheckpointEngine(worlds / str(world_size)) as engine:
        await engine.load(target, job)
        assert_same(target, sharded_whole())
        assert_same(await engine.read(job), sharded_whole())
        assert job in [info.checkpoint_id async for info in engine.checkpoints()]


# --- without collectives: one metadata per rank


class RankWriter(FileSystemWriter):
    """Writes what rank ``rank`` writes with ``use_collectives=False``."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(path, sync_files=False)
        self._as_rank = rank

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, rank=self._as_rank, use_collectives=False)


class RowsPlanner(DefaultSavePlanner):
    """Saves rows [low, high) of each matrix, as a rank does that holds no others."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = []
        for item in plan.items:
            data = item.tensor_data
            if data is not None and len(data.size) == 2:
                chunk = ChunkStorageMetadata(
                    offsets=torch.Size([self.low, 0]),
                    sizes=torch.Size([self.high - self.low, data.size[1]]),
                )
                item = dataclasses.replace(
                    item,
                    index=MetadataIndex(item.index.fqn, chunk.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(chunk=chunk, properties=data.properties, size=data.size),
                )
            items.append(item)
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        whole = self.state_dict[index.fqn]
        is_matrix = isinstance(whole, torch.Tensor) and whole.dim() == 2
        return whole[self.low : self.high] if is_matrix else super().lookup_object(index)


MATRIX = random_tensor(torch.float32, (9, 5), 1)
BOUNDS = ((0, 4), (4, 5), (5, 9))


def save_as_rank(path: Path, rank: int, state: Any, bounds: tuple[int, int] | None = None) -> None:
    planner = DefaultSavePlanner() if bounds is None else RowsPlanner(*bounds)
    path.parent.mkdir(parents=True, exist_ok=True)
    dcp.save(state, storage_writer=RankWriter(path, rank), planner=planner, no_dist=True)


def save_as_ranks(path: Path, bounds: Any = BOUNDS) -> None:
    for rank, rows in enumerate(bounds):
        save_as_rank(path, rank, {"a": {"m": MATRIX}, "v": torch.ones(6), "epoch": 4}, rows)


WHOLE = {"a": {"m": MATRIX}, "v": torch.ones(6), "epoch": 4}


async def test_ranks_that_did_not_speak_are_merged(root: Path) -> None:
    save_as_ranks(root / "step-00000007")
    target = blank(WHOLE)
    async with CheckpointEngine(root) as engine:
        report = await engine.load(target)
        assert (report.checkpoint_id, report.next_step) == ("step-00000007", 8)
        assert_same(target, WHOLE)
        assert_same(await engine.read(7), WHOLE)
        latest = await engine.latest()
        assert latest is not None
        assert (latest.producer, latest.world_size, latest.num_files) == ("stock", 3, 3)
        matrix = (await latest.metadata()).state_dict_metadata["a.m"]
        assert isinstance(matrix, TensorStorageMetadata)
        assert len(matrix.chunks) == 3


async def test_of_replicas_the_lowest_rank_counts(root: Path) -> None:
    for rank in (1, 0, 2):
        save_as_rank(root / "s", rank, {"rank": rank, "w": torch.full((3,), float(rank))})
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read("s"), {"rank": 0, "w": torch.zeros(3)})


async def test_what_one_rank_alone_has_is_found(root: Path) -> None:
    save_as_rank(root / "s", 0, {"a": 1})
    save_as_rank(root / "s", 1, {"b": {"c": torch.ones(2)}})
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read("s"), {"a": 1, "b": {"c": torch.ones(2)}})


async def test_an_empty_shard_does_not_hide_the_rows_that_begin_where_it_lies(root: Path) -> None:
    for rank, rows in enumerate([(0, 4), (4, 4), (4, 9), (9, 9)]):
        save_as_rank(root / "s", rank, {"m": MATRIX}, rows)
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read("s"), {"m": MATRIX})


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def _resize(metadata: Any) -> None:
    metadata.state_dict_metadata["a.m"].size = torch.Size([10, 5])


def _retype(metadata: Any) -> None:
    metadata.state_dict_metadata["a.m"].properties.dtype = torch.int32


def _turn_into_leaf(metadata: Any) -> None:
    metadata.state_dict_metadata["a.m"] = metadata.state_dict_metadata["epoch"]


@pytest.mark.parametrize("change", [_resize, _retype, _turn_into_leaf])
async def test_ranks_that_contradict_each_other_are_damage(
    root: Path, change: Callable[[Any], object]
) -> None:
    save_as_ranks(root / "step-00000001")
    save_as_ranks(root / "step-00000002")
    _edit(root / "step-00000002" / "__1.metadata", change)
    target = blank(WHOLE)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError, match=r"rank 1 .*a\.m"):
            await engine.load(target, 2)
        assert_same(target, blank(WHOLE))
        assert (await engine.load(target)).skipped == ("step-00000002",)
        assert [info.step async for info in engine.checkpoints()] == [1]
    assert_same(target, WHOLE)


async def test_chunks_that_contradict_each_other_are_damage(root: Path) -> None:
    save_as_ranks(root / "s", bounds=((0, 4), (0, 5), (5, 9)))
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError, match=r"another chunk of a\.m"):
            await engine.read("s")


async def test_a_rank_that_is_missing_in_between_is_named(root: Path) -> None:
    save_as_ranks(root / "s")
    (root / "s" / "__1.metadata").unlink()
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError, match="no metadata of rank 1"):
            await engine.load(blank(WHOLE), "s")
        assert await engine.latest() is None


async def test_a_last_rank_that_is_missing_is_noticed_before_anything_is_touched(root: Path) -> None:
    """Nothing tells how many ranks there were; that rows are missing does."""
    save_as_ranks(root / "s")
    (root / "s" / "__2.metadata").unlink()
    target = blank(WHOLE)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError, match=r"a\.m") as caught:
            await engine.load(target, "s")
        assert not caught.value.partially_loaded
        assert_same(await engine.read("s", keys=["v", "epoch"]), {"v": torch.ones(6), "epoch": 4})
    assert_same(target, blank(WHOLE))


@pytest.mark.parametrize("damage", ["missing", "short"])
async def test_a_data_file_of_one_rank_is_checked(root: Path, damage: str) -> None:
    save_as_ranks(root / "s")
    if damage == "missing":
        (root / "s" / "__1_0.distcp").unlink()
    else:
        os.truncate(root / "s" / "__1_0.distcp", 100)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError, match="__1_0"):
            await engine.read("s")


async def test_without_rank_0_there_is_no_checkpoint(root: Path) -> None:
    save_as_ranks(root / "s")
    (root / "s" / "__0.metadata").unlink()
    async with CheckpointEngine(root) as engine:
        assert await engine.latest() is None
        with pytest.raises(CheckpointNotFoundError):
            await engine.read("s")


async def test_the_metadata_of_all_ranks_comes_before_that_of_each(root: Path) -> None:
    save_as_ranks(root / "s")
    dcp.save({"w": torch.ones(2)}, checkpoint_id=root / "s", no_dist=True)
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read("s"), {"w": torch.ones(2)})


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


async def test_hostile_metadata_of_a_rank_is_refused(root: Path) -> None:
    save_as_ranks(root / "s")
    (root / "s" / "__2.metadata").write_bytes(pickle.dumps(Bomb()))
    async with CheckpointEngine(root) as engine:
        with pytest.raises(UntrustedCheckpointError, match="system"):
            await engine.read("s")


# --- living beside ours


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


async def test_saves_beside_it_leave_it_alone(root: Path) -> None:
    save_as_ranks(root / "step-00000001")
    before = _files(root / "step-00000001")
    async with CheckpointEngine(root) as engine:
        for _ in range(2):
            await (await engine.save({"w": torch.ones(2)})).upload_completion
        assert [info.step async for info in engine.checkpoints()] == [1, 2, 3]
    assert _files(root / "step-00000001") == before


async def test_it_is_not_replaced_unless_asked_for(root: Path) -> None:
    save_as_ranks(root / "best")
    before = _files(root / "best")
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CheckpointExistsError):
            await engine.save({"w": torch.ones(2)}, checkpoint_id="best")
    assert _files(root / "best") == before


async def test_a_replacement_is_what_everybody_reads(root: Path) -> None:
    save_as_ranks(root / "best")
    async with CheckpointEngine(root) as engine:
        response = await engine.save({"w": torch.ones(2)}, checkpoint_id="best", replace=True)
        await response.upload_completion
        assert_same(await engine.read("best"), {"w": torch.ones(2)})
    assert set(FileSystemReader(root / "best").read_metadata().state_dict_metadata) == {"w"}
    target = {"w": torch.zeros(2)}
    dcp.load(target, checkpoint_id=root / "best", no_dist=True)
    assert_same(target, {"w": torch.ones(2)})


async def test_what_is_removed_does_not_bring_an_older_one_back(root: Path) -> None:
    save_as_ranks(root / "best")
    storage = LocalStorage(root)
    try:
        async with CheckpointEngine(storage) as engine:
            response = await engine.save({"w": torch.ones(2)}, checkpoint_id="best", replace=True)
            await response.upload_completion
            await storage.remove("best")
            assert await engine.latest() is None
            save_as_ranks(root / "other")
            await storage.remove("other")
            assert await engine.latest() is None
    finally:
        await storage.close()


async def test_a_save_that_was_killed_in_its_directory_is_swept_and_it_is_not(root: Path) -> None:
    save_as_ranks(root / "best")
    before = _files(root / "best")
    uid = "0123456789abcdef"
    for name in (f"__0_0-{uid}.distcp", f"manifest-{uid}.json", f".metadata-{uid}.tmp", f".lease-{uid}"):
        (root / "best" / name).write_bytes(b"x")
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"w": torch.ones(2)}, checkpoint_id="other")).upload_completion
        assert_same(await engine.read("best"), WHOLE)
    assert _files(root / "best") == before


async def test_a_copy_in_another_place_is_read(root: Path) -> None:
    save_as_ranks(root / "s")
    shutil.move(root / "s", root / "t")
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read("t"), WHOLE)
