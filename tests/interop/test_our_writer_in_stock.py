"""Stock's save calls with our writer in them: what is written, who reads it, and what a failure leaves."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint._checkpointer import _Checkpointer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.planner import WriteItem

from dcp_async import CheckpointEngine, CheckpointExistsError, SaveError
from dcp_async.formats import PLAIN_DTYPES
from dcp_async.interop import FileSystemReader, FileSystemWriter
from tests.interop.stock_states import leaf_state, nested_state, ramp, strided_state
from tests.support.doubles import assert_same, blank
from tests.support.stock import CachingPlanner, no_cached_plans

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)


def save(state: dict[str, Any], path: Path, **options: Any) -> Any:
    return dcp.save(state, storage_writer=FileSystemWriter(path), no_dist=True, **options)


def stock_load(state: dict[str, Any], path: Path, **options: Any) -> dict[str, Any]:
    target: dict[str, Any] = blank(state)
    dcp.load(target, checkpoint_id=path, no_dist=True, **options)
    return target


def small(value: float = 1.0) -> dict[str, Any]:
    return {"model": {"weight": torch.full((40, 30), value), "bias": torch.arange(5.0) * value}, "epoch": 3}


def dtype_state() -> dict[str, Any]:
    kinds = sorted(PLAIN_DTYPES - {torch.bool}, key=str)  # which has two values only
    return {str(dtype): ramp((6, 4), torch.uint8).view(dtype) for dtype in kinds if dtype.itemsize <= 4} | {
        str(dtype): ramp((6, 8), torch.uint8).view(dtype) for dtype in kinds if dtype.itemsize == 8
    }


@pytest.mark.parametrize("make", [nested_state, strided_state, leaf_state, dtype_state])
async def test_stock_and_the_engine_read_what_stock_writes_through_our_writer(
    tmp_path: Path, make: Callable[[], dict[str, Any]]
) -> None:
    state = make()
    save(state, tmp_path / "step-7")
    assert_same(stock_load(state, tmp_path / "step-7"), state)
    async with CheckpointEngine(tmp_path) as engine:
        target = blank(state)
        report = await engine.load(target)
        assert_same(target, state)
        info = await engine.latest()
    assert info is not None
    assert (report.step, info.producer, info.num_files) == (7, "dcp_async", 1)


async def test_what_is_written_in_several_parts_is_whole(tmp_path: Path, monkeypatch: Any) -> None:
    # tensors that begin, end and reach through parts, rooms in between
    state: dict[str, Any] = {
        f"t{index}": torch.arange(index * 9000, dtype=torch.int32).reshape(-1, 3) for index in range(1, 12)
    }
    state |= {f"leaf{index}": "x" * index * 5000 for index in range(12)}
    state["strided"] = torch.arange(60_000.0).reshape(200, 300).t()
    monkeypatch.setattr("dcp_async.interop.one_save._PART_BYTES", 64 << 10)
    save(state, tmp_path / "a")
    async with CheckpointEngine(tmp_path) as engine:
        assert_same(await engine.read("a"), state)  # each block's checksum is verified
    assert_same(stock_load(state, tmp_path / "a"), state)


def test_stocks_caller_is_told_where_items_lie(tmp_path: Path) -> None:
    metadata = save(small(), tmp_path / "a")
    (file,) = (name for name in os.listdir(tmp_path / "a") if name.endswith(".distcp"))
    assert {place.relative_path for place in metadata.storage_data.values()} == {file}
    assert metadata.storage_meta.checkpoint_id == os.fspath(tmp_path / "a")


async def test_int_keys_and_empty_dicts_come_as_stocks_planner_names_them(tmp_path: Path) -> None:
    state = {"milestones": {1: torch.ones(3), 2: 5}, "empty": {}, "list": [torch.zeros(2)]}
    dcp.save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    save(state, tmp_path / "ours")
    async with CheckpointEngine(tmp_path) as engine:
        assert_same(await engine.read("ours"), await engine.read("stock"))
    assert_same(stock_load(state, tmp_path / "ours"), stock_load(state, tmp_path / "stock"))


def test_a_state_without_anything_is_saved(tmp_path: Path) -> None:
    save({"a": {}}, tmp_path / "a")
    target: dict[str, Any] = {"a": {}}
    dcp.load(target, storage_reader=FileSystemReader(tmp_path / "a"), no_dist=True)
    assert target == {"a": {}}


async def test_an_unflattened_state_is_saved(tmp_path: Path) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    save(small(), tmp_path / "a", planner=planner)
    async with CheckpointEngine(tmp_path) as engine:
        assert_same(await engine.read("a"), small())
    top: dict[str, Any] = {"epoch": 0}
    planning = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(top, storage_reader=FileSystemReader(tmp_path / "a"), planner=planning, no_dist=True)
    assert top == {"epoch": 3}


# --- overwriting


async def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save(small(value), tmp_path / "a")
        assert_same(stock_load(small(), tmp_path / "a"), small(value))
    assert len(os.listdir(tmp_path / "a")) == 3  # of the first nothing is left
    async with CheckpointEngine(tmp_path) as engine:
        await engine.save(small(3.0), checkpoint_id="a", replace=True)
    assert_same(stock_load(small(), tmp_path / "a"), small(3.0))
    save(small(4.0), tmp_path / "a")
    assert_same(stock_load(small(), tmp_path / "a"), small(4.0))


def test_stocks_checkpoint_is_replaced(tmp_path: Path) -> None:
    dcp.save(small(), checkpoint_id=tmp_path / "a", no_dist=True)
    save(small(2.0), tmp_path / "a")
    assert_same(stock_load(small(), tmp_path / "a"), small(2.0))


def test_without_overwrite_nothing_is_replaced(tmp_path: Path) -> None:
    save(small(), tmp_path / "a")
    with pytest.raises(CheckpointException) as caught:
        dcp.save(small(2.0), storage_writer=FileSystemWriter(tmp_path / "a", overwrite=False), no_dist=True)
    assert isinstance(caught.value.failures[0][0], CheckpointExistsError)
    assert_same(stock_load(small(), tmp_path / "a"), small())
    assert len(os.listdir(tmp_path / "a")) == 3


# --- failures


class FailingPlanner(DefaultSavePlanner):
    """Its last item can't be had, when it is asked for the second time if ``late``."""

    def __init__(self, *, late: bool = False) -> None:
        super().__init__()
        self._wanted = 2 if late else 1
        self._asked = 0

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.index.fqn == "model.weight":
            self._asked += 1
            if self._asked == self._wanted:
                raise RuntimeError("nothing there")
        value: Any = super().resolve_data(write_item)
        return value.clone() if isinstance(value, torch.Tensor) else value  # which nobody keeps


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_thread_that_raises_fails_the_save_and_leaves_what_was_there(
    tmp_path: Path, exists: bool, late: bool
) -> None:
    if exists:
        save(small(), tmp_path / "a")
    future = dcp.async_save(
        small(2.0),
        storage_writer=FileSystemWriter(tmp_path / "a"),
        planner=FailingPlanner(late=late),
        no_dist=True,
    )
    with pytest.raises(CheckpointException, match="nothing there") as caught:
        future.result()  # type: ignore[union-attr]
    assert isinstance(caught.value.failures[0][0], SaveError)
    if exists:
        assert_same(stock_load(small(), tmp_path / "a"), small())
        assert len(os.listdir(tmp_path / "a")) == 3
    else:
        assert not (tmp_path / "a").exists()


def test_a_disk_that_is_full_fails_the_save(tmp_path: Path, monkeypatch: Any) -> None:
    def full(fd: int, *args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(CheckpointException, match="No space left"):
        save(small(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_save_that_nobody_ends_is_undone_with_its_thread(tmp_path: Path) -> None:
    """As when another rank fails: stock makes no further call."""
    writer = FileSystemWriter(tmp_path / "a")
    planner = DefaultSavePlanner()
    planner.set_up_planner({"x": torch.ones(3)}, None, True)

    def until_written() -> None:
        writer.reset()
        writer.set_up_storage_writer(True, rank=0, use_collectives=True)
        plans, _ = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
        (plan,) = writer.prepare_global_plan(plans)
        writer.write_data(planner.finish_plan(plan), planner)
        assert any(name.endswith(".distcp") for name in os.listdir(tmp_path / "a"))

    thread = threading.Thread(target=until_written)
    thread.start()
    thread.join()
    for ending in threading.enumerate():
        if ending.name == "dcp_async-interop-end":
            ending.join()
    assert not (tmp_path / "a").exists()


def test_a_save_that_nobody_ended_is_undone_by_the_next(tmp_path: Path) -> None:
    writer = FileSystemWriter(tmp_path / "a")
    planner = DefaultSavePlanner()
    planner.set_up_planner({"x": torch.ones(3)}, None, True)
    writer.set_up_storage_writer(True, rank=0, use_collectives=True)
    plans, _ = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    writer.prepare_global_plan(plans)
    assert (tmp_path / "a").exists()
    dcp.save(small(), checkpoint_id=tmp_path / "b", storage_writer=writer, no_dist=True)
    assert os.listdir(tmp_path) == ["b"]


class ReshapingPlanner(DefaultSavePlanner):
    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        value = super().transform_object(write_item, object)
        return value.reshape(-1) if isinstance(value, torch.Tensor) else value


def test_a_planner_that_contradicts_its_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match=r"model\.weight: the planner resolved it to a tensor of"):
        save(small(), tmp_path / "a", planner=ReshapingPlanner())
    assert not (tmp_path / "a").exists()


def test_a_save_without_collectives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a coordinator nobody can tell"):
        save(small(), tmp_path / "a", use_collectives=False)


# --- planners


class HalvingPlanner(DefaultSavePlanner):
    """What stock's planners may do: the data is another than the state's, and made when it is asked for."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        value = super().transform_object(write_item, object)
        return value.bfloat16() if isinstance(value, torch.Tensor) else value


async def test_a_planner_that_makes_its_data_is_asked_for_it(tmp_path: Path) -> None:
    save(small(1.5), tmp_path / "a", planner=HalvingPlanner())
    assert_same(stock_load(small(), tmp_path / "a"), small(1.5))
    async with CheckpointEngine(tmp_path) as engine:
        weight = (await engine.read("a"))["model"]["weight"]
    assert weight.dtype is torch.bfloat16  # what is told of it is what was written


async def test_a_cached_plan_never_describes_what_was_not_written(tmp_path: Path) -> None:
    with no_cached_plans():
        for number, dtype in enumerate((torch.float32, torch.float32, torch.bfloat16)):
            state = {"x": torch.full((5, 6), float(number), dtype=dtype)}
            save(state, tmp_path / str(number), planner=CachingPlanner())
            async with CheckpointEngine(tmp_path) as engine:
                assert_same(await engine.read(str(number)), state)


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning")
@pytest.mark.parametrize("first", ["ours", "stock"])
def test_a_cached_plan_serves_another_writer(tmp_path: Path, first: str) -> None:
    writers: dict[str, Callable[[Path], Any]] = {"ours": FileSystemWriter, "stock": dcp.FileSystemWriter}
    names = [first, *(name for name in writers if name != first), first]
    with no_cached_plans():
        for number, name in enumerate(names):
            path = tmp_path / str(number)
            state = small(float(number))
            dcp.save(state, storage_writer=writers[name](path), planner=CachingPlanner(), no_dist=True)
            assert_same(stock_load(state, path), state)


# --- async_save, Checkpointer


def test_saves_that_share_a_writer_know_nothing_of_each_other(tmp_path: Path) -> None:
    writer = FileSystemWriter(tmp_path / "unused")
    saves: list[Any] = [
        dcp.async_save(small(value), checkpoint_id=tmp_path / str(value), storage_writer=writer, no_dist=True)
        for value in (1.0, 2.0, 3.0)
    ]
    for future in saves:
        future.result()
    for value in (1.0, 2.0, 3.0):
        assert_same(stock_load(small(), tmp_path / str(value)), small(value))
    assert not (tmp_path / "unused").exists()


def test_async_save_has_the_writer_copy_the_state(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    class Recording(FileSystemWriter):
        def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            asked.append(state_dict)
            return super().stage(state_dict)

    future: Any = dcp.async_save(small(), storage_writer=Recording(tmp_path / "a"), no_dist=True)
    future.result()
    assert [list(state) for state in asked] == [["model", "epoch"]]


def test_the_state_may_change_once_async_save_has_returned(tmp_path: Path) -> None:
    state = nested_state()
    state["tied"] = [state["model"]["weight"], {"a", "b"}, (torch.ones(3), 4)]
    before = nested_state()
    future: Any = dcp.async_save(state, storage_writer=FileSystemWriter(tmp_path / "a"), no_dist=True)
    state["model"]["weight"].zero_()
    state["optim"]["state"][0]["step"].zero_()
    state["tied"][1].clear()
    future.result()
    loaded = stock_load(before, tmp_path / "a")
    assert_same(loaded, before)


def test_stocks_checkpointer_saves_and_loads_through_ours(tmp_path: Path) -> None:
    checkpointer = _Checkpointer(
        FileSystemWriter(tmp_path / "a"), FileSystemReader(tmp_path / "a"), no_dist=True
    )
    for value in (1.0, 2.0):
        checkpointer.async_save(small(value)).result()
        target = blank(small())
        checkpointer.load(target)
        assert_same(target, small(value))


def test_a_writer_travels_to_another_process(tmp_path: Path) -> None:
    writer = pickle.loads(pickle.dumps(FileSystemWriter(tmp_path / "a", overwrite=False)))
    dcp.save(small(), storage_writer=writer, no_dist=True)
    assert_same(stock_load(small(), tmp_path / "a"), small())


# --- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"single_file_per_rank": False}, "one file per rank"),
        ({"_extensions": [object()]}, "stream extensions"),
        ({"serialization_format": SerializationFormat.SAFETENSORS}, "HuggingFaceStorageWriter"),
        ({"thread_count": 0}, "at least 1"),
        ({"path": "s3://bucket/run"}, "is an address"),
        ({"path": ""}, "names no directory"),
        ({"path": "/"}, "names no directory"),
    ],
)
def test_what_has_no_meaning_here_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FileSystemWriter(**{"path": "a", **options})


def test_that_files_are_synced_all_the_same_is_said() -> None:
    with pytest.warns(UserWarning, match="dcp_async syncs what it publishes"):
        FileSystemWriter("a", sync_files=False)


def test_where_it_can_write_is_said_by_the_writer(tmp_path: Path) -> None:
    assert FileSystemWriter.validate_checkpoint_id(tmp_path / "new" / "a")
    assert not FileSystemWriter.validate_checkpoint_id("s3://bucket/a")
    (tmp_path / "file").touch()
    assert not FileSystemWriter.validate_checkpoint_id(tmp_path / "file" / "a")


def test_calls_in_another_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="was not called from this thread"):
        FileSystemWriter(tmp_path / "a").prepare_local_plan(None)  # type: ignore[arg-type]
