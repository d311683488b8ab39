"""What stock ``torch.distributed.checkpoint`` gets wrong, shown by running it.

Should a test fail here, stock was mended, and the guard it names may go: test_stock_failures_saving.py and
test_stock_failures_loading.py show the right outcome with this engine. Numbers are issues of pytorch/pytorch
unless another project is named. What other suites of this repository pin down already:

    Saving
    a failed write fails the save (191391)      pipeline/test_storage_faults: a_fault_fails_the_save...,
                                                a_transient_fault_at_each_put...; faults/test_crash_points
    a failed overwrite keeps the old one        pipeline/test_admission: a_failed_replace_leaves...
    no moment without any checkpoint            pipeline/test_admission: a_replaced_checkpoint_is_readable...
    two processes without a group               faults/test_two_writers
    files of a larger old checkpoint go         pipeline/test_admission: many_replaces_keep_one_set_of_files
    saves in flight on one engine               pipeline/test_plan_reuse: saves_in_flight_of_one_plan...
    engines that share root or stager (183413)  pipeline/test_admission: two_engines_may_share_one_storage,
                                                one_stager_serves_two_engines, many_engines_race_for_one_name
    another dtype, shape, order of keys         pipeline/test_plan_reuse: each_save_holds_what_it_was_given,
                                                states_that_alternate_do_not_mix
    a late staging error                        pipeline/test_handles: a_staging_failure_fails_both_handles
    the value at the call is saved (144657)     pipeline/test_roundtrip: a_save_is_a_snapshot...;
                                                with overlap pipeline/test_overlap
    reused buffers (131270, Megatron-LM 2288)   pipeline/test_directory: no_checkpoint_contains_what_was...;
                                                pipeline/test_plan_reuse: freed_tensors_are_not_read_again
    `.metadata` names stock's classes only      pipeline/test_directory: the_metadata_holds_stock_classes_only
    two leaves of one name (137327)             pipeline/test_bad_input: a_bad_state_is_named...[two_names]
    errors that nobody awaited                  pipeline/test_lifetime: wait_raises_an_unseen_failure_once,
                                                close_raises..., an_unseen_failure_is_logged_at_once
    a call that never returns                   faults/test_stuck_storage, unit/test_concurrency
    a full disk, a file-size limit              faults/test_disk_errors
    synced before it counts                     faults/test_durability_order
    cancellation, progress: stock has neither   pipeline/test_cancellation, pipeline/test_observer

    Loading
    a flipped byte (126952, torchtitan 4011)    pipeline/test_corruption: a_flipped_byte_anywhere...
    rows that nobody saved                      test_we_read_stock: a_missing_chunk_is_noticed...
    unexpected and missing names (148252,       pipeline/test_load: strict_refuses_what_does_not_fit...,
      190389, torchtitan 4010)                  not_strict_loads_what_fits_and_lists_the_rest
    `latest` is committed (KempnerForge 102)    pipeline/test_load: an_uncommitted_directory_is_no_checkpoint;
                                                pipeline/test_directory: nothing_is_visible_before_the_commit
    a damaged `.metadata` is not "not found"    pipeline/test_bad_input: a_foreign_metadata_is_a_clear_error
    pickles that run code (189308)              pipeline/test_bad_input: a_metadata_that_names_a_forbidden...;
                                                pipeline/test_trust: leaves_run_nothing
    paths that leave the root                   pipeline/test_bad_input: paths_that_leave_the_root_are_refused
    an unknown key                              pipeline/test_roundtrip: read_of_an_unknown_key_is_an_error...
    tuples, empty containers, int keys, ties    pipeline/test_roundtrip: read_returns_the_structure...,
                                                ties_come_back_tied
    an optimizer's state made late (126881)     pipeline/test_resume: an_optimizer_takes_the_state_of...
    a failed load touches nothing               test_we_read_stock: a_stock_data_file_of_the_wrong_size...

What needs ranks, an accelerator or another storage or format is not here: deadlocks of collectives (122529,
152310), resharding, the gathering of errors, object stores, safetensors.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import io
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from tests.support.doubles import PATIENCE, assert_same, data_files, flip
from tests.support.stock import CachingPlanner, no_cached_plans


def stock_save(path: Path, state: Any, *, planner: Any = None, **options: Any) -> Metadata:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = FileSystemWriter(path, sync_files=False, **options)
    metadata: Metadata = dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    return metadata


def stock_load(path: Path, target: Any) -> Any:
    dcp.load(target, checkpoint_id=path, no_dist=True)
    return target


# --- saving ---------------------------------------------------------------------------------------


class FailsInThread(DefaultSavePlanner):
    """The disk is full, but only for the threads that the writer started."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = threading.Event()

    def resolve_data(self, write_item: WriteItem) -> Any:
        if threading.current_thread() is threading.main_thread():
            assert self.failed.wait(PATIENCE)
        else:
            self.failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().resolve_data(write_item)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_stock_commits_although_a_writer_thread_failed(root: Path) -> None:
    """191391: save() returns, and one of two tensors is nowhere."""
    state = {"a": torch.ones(100), "b": torch.ones(100)}
    stock_save(root / "s", state, planner=FailsInThread(), thread_count=2)
    metadata = pickle.loads((root / "s" / ".metadata").read_bytes())
    assert set(metadata.state_dict_metadata) == {"a", "b"}
    assert len(metadata.storage_data) == 1


class FailsAtSecond(DefaultSavePlanner):
    calls = 0

    def resolve_data(self, write_item: WriteItem) -> Any:
        self.calls += 1
        if self.calls == 2:
            raise OSError(errno.EIO, "Input/output error")
        return super().resolve_data(write_item)


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning")
def test_stock_mixes_old_and_new_after_a_failed_overwrite(root: Path) -> None:
    stock_save(root / "s", {"a": torch.zeros(100), "b": torch.zeros(100)}, single_file_per_rank=False)
    with pytest.raises(CheckpointException):
        stock_save(
            root / "s",
            {"a": torch.ones(100), "b": torch.ones(100)},
            planner=FailsAtSecond(),
            single_file_per_rank=False,
        )
    (root / "s" / "__0_1.distcp").stat()  # the second file was opened, the first one was replaced
    mixed = stock_load(root / "s", {"a": torch.full((100,), 7.0)})
    assert_same(mixed["a"], torch.ones(100))


class Waits(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__()
        self.arrived, self.released = threading.Event(), threading.Event()

    def resolve_data(self, write_item: WriteItem) -> Any:
        self.arrived.set()
        assert self.released.wait(PATIENCE)
        return super().resolve_data(write_item)


def test_stock_loses_the_first_of_two_saves_that_share_a_writer(root: Path) -> None:
    """The writer's path flips under the save that is running: both succeed, one is no checkpoint."""
    root.mkdir()
    writer, planner = FileSystemWriter(root / "unused", sync_files=False), Waits()
    options: dict[str, Any] = {"storage_writer": writer, "no_dist": True}
    first = dcp.async_save({"w": torch.ones(9)}, checkpoint_id=root / "1", planner=planner, **options)
    try:
        assert planner.arrived.wait(PATIENCE)
        second = dcp.async_save({"w": torch.ones(9) * 2}, checkpoint_id=root / "2", **options)
        assert isinstance(second, concurrent.futures.Future)
        second.result(PATIENCE)
    finally:
        planner.released.set()
    assert isinstance(first, concurrent.futures.Future)
    first.result(PATIENCE)
    assert [path.parent.name for path in root.glob("*/.metadata")] == ["2"]


@pytest.fixture
def _no_cached_plans() -> Iterator[None]:
    with no_cached_plans():
        yield


@pytest.mark.usefixtures("_no_cached_plans")
def test_stock_describes_another_dtype_after_a_cached_plan(root: Path) -> None:
    stock_save(root / "1", {"w": torch.ones(8)}, planner=CachingPlanner())
    stock_save(root / "2", {"w": torch.ones(8, dtype=torch.bfloat16)}, planner=CachingPlanner())
    metadata = pickle.loads((root / "2" / ".metadata").read_bytes())
    assert metadata.state_dict_metadata["w"].properties.dtype is torch.float32


@pytest.mark.usefixtures("_no_cached_plans")
def test_stock_returns_one_metadata_for_two_checkpoints(root: Path) -> None:
    first = stock_save(root / "1", {"w": torch.ones(8)}, planner=CachingPlanner())
    second = stock_save(root / "2", {"w": torch.ones(8)}, planner=CachingPlanner())
    assert first is second


class FailsEarly:
    """A stager whose future is done, with an error, before it is handed over."""

    _synchronize_after_execute = False
    should_synchronize_after_execute = False

    def stage(self, state: Any) -> Any:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_exception(MemoryError("no room to stage"))
        return future

    def synchronize_staging(self) -> None: ...

    def close(self) -> None: ...


def test_stock_reports_success_of_a_staging_that_failed_early(root: Path) -> None:
    root.mkdir()
    response: Any = dcp.async_save(
        {"w": torch.ones(3)}, checkpoint_id=root / "s", async_stager=FailsEarly(), no_dist=True
    )
    assert response.staging_completion.result(PATIENCE) is None
    assert response.upload_completion.exception(PATIENCE) is not None


def test_stock_returns_another_type_with_another_stager(root: Path) -> None:
    root.mkdir()
    plain: Any = dcp.async_save({"w": torch.ones(3)}, checkpoint_id=root / "1", no_dist=True)
    staged: Any = dcp.async_save(
        {"w": torch.ones(3)}, checkpoint_id=root / "2", async_stager=FailsEarly(), no_dist=True
    )
    assert type(plain) is not type(staged)
    plain.result(PATIENCE)
    staged.upload_completion.exception(PATIENCE)


def test_stock_writes_tied_weights_twice(root: Path) -> None:
    tied = torch.zeros(100_000)
    stock_save(root / "s", {"embed": tied, "head": tied})
    assert sum(file.stat().st_size for file in data_files(root / "s")) >= 2 * tied.nbytes


# --- loading --------------------------------------------------------------------------------------


def test_stock_loads_a_flipped_byte(root: Path) -> None:
    """126952: the CRC-32 is written, and the reader is built not to look at it."""
    saved = torch.arange(1000, dtype=torch.int32)
    stock_save(root / "s", {"w": saved})
    (file,) = data_files(root / "s")
    flip(file, file.read_bytes().index(saved.numpy().tobytes()) + 400)
    target = stock_load(root / "s", {"w": torch.zeros(1000, dtype=torch.int32)})
    assert int((target["w"] != saved).sum()) == 1


def test_stock_casts_without_a_word(root: Path) -> None:
    stock_save(root / "s", {"w": torch.tensor([1e30])})
    target = stock_load(root / "s", {"w": torch.zeros(1, dtype=torch.float16)})
    assert torch.isinf(target["w"]).all()


def test_stock_passes_over_names_that_nobody_takes(root: Path) -> None:
    """148252; 126881 calls it a silent failure to load: what the state has not made yet is not loaded."""
    stock_save(root / "s", {"loader": {"epoch": 3, "made_later": {"position": 7}}})
    target = stock_load(root / "s", {"loader": {"epoch": 0}})
    assert target == {"loader": {"epoch": 3}}


def test_stock_reads_nothing_for_an_unknown_key(root: Path) -> None:
    stock_save(root / "s", {"model": {"w": torch.ones(3)}})
    assert _load_state_dict_from_keys("modle", checkpoint_id=root / "s") == {}


def test_stock_forgets_the_structure(root: Path) -> None:
    """153842: int keys become text."""
    stock_save(root / "s", {"d": {1: torch.ones(2)}, "empty": {}, "n": 1})
    assert_same(
        _load_state_dict_from_keys(None, checkpoint_id=root / "s"), {"d": {"1": torch.ones(2)}, "n": 1}
    )


def test_stock_leaves_targets_half_loaded(root: Path) -> None:
    stock_save(root / "s", {"a": torch.ones(99), "b": torch.ones(99)}, single_file_per_rank=False)
    os.truncate(root / "s" / "__0_1.distcp", 100)
    target = {"a": torch.zeros(99), "b": torch.zeros(99)}
    with pytest.raises(CheckpointException):
        stock_load(root / "s", target)
    assert_same(target, {"a": torch.ones(99), "b": torch.zeros(99)})


def test_stock_runs_what_metadata_names(root: Path, tmp_path: Path) -> None:
    """189308: a raw pickle.load, before anything is checked."""
    mark = tmp_path / "exploded"
    (root / "s").mkdir(parents=True)
    stream = io.BytesIO()
    pickle.dump(Bomb(mark), stream)
    (root / "s" / ".metadata").write_bytes(stream.getvalue())
    with pytest.raises(CheckpointException):
        stock_load(root / "s", {"w": torch.zeros(3)})
    assert mark.exists()


class Bomb:
    """Runs a shell command where it is unpickled carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def test_stock_cannot_load_under_a_users_mmap_option(root: Path) -> None:
    from torch.utils.serialization import config

    stock_save(root / "s", {"w": torch.ones(3)})
    with pytest.raises(CheckpointException), config.patch("load.mmap", True):  # type: ignore[attr-defined]  # made late
        stock_load(root / "s", {"w": torch.zeros(3)})


class Rows(DefaultSavePlanner):
    """Saves the upper half of a matrix, as rank 0 of two would."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        (item,) = plan.items
        assert item.tensor_data is not None
        data = dataclasses.replace(item.tensor_data, size=torch.Size([6, 2]))
        self.plan = dataclasses.replace(
            plan, items=[dataclasses.replace(item, type=WriteItemType.SHARD, tensor_data=data)]
        )
        return self.plan


def test_stock_leaves_rows_as_they_were_where_a_rank_is_missing(root: Path) -> None:
    """With use_collectives=False each rank writes metadata of its own, and nobody asks for all of them."""
    writer = FileSystemWriter(root / "s", sync_files=False)
    root.mkdir()
    dcp.save(
        {"w": torch.ones(3, 2)}, storage_writer=writer, planner=Rows(), no_dist=True, use_collectives=False
    )
    assert (root / "s" / "__0.metadata").exists()
    target = stock_load(root / "s", {"w": torch.zeros(6, 2)})
    assert target["w"].sum(dim=1).tolist() == [2, 2, 2, 0, 0, 0]
