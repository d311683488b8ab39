"""FileSystemWriter: stock plans, our files are written and committed.

Enters: the calls that torch.distributed.checkpoint makes of a StorageWriter. Leaves: a checkpoint of ours, or
nothing. Invariant: the calls of one save come from one thread, and what they know belongs to that thread, so
that saves which share a writer know nothing of each other; only ``finish`` publishes.

    (all ranks) reset, set_up_storage_writer, prepare_local_plan
    (coordinator) prepare_global_plan: leases the directory
    (all ranks) write_data: one file each
    (coordinator) finish: `.metadata` and manifest, as an engine's commit publishes them
Source: torch/distributed/checkpoint/storage.py, state_dict_saver.py."""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from .._names import file_of
from ..formats import ItemKey
from .call_resources import local_path
from .one_save import OneSave, Share, Told
from .snapshot import snapshot


class _Current(threading.local):
    """The save that each thread is at."""

    save: OneSave | None = None


class FileSystemWriter(StorageWriter):
    """Writes what stock plans as our checkpoint: our layout, speed, checksums and commit.

    For ``torch.distributed.checkpoint.save``, ``async_save`` and what calls them. It takes the place of
    stock's writer of this name, and its arguments. ``CheckpointEngine`` loads, verifies and sweeps what it
    wrote; stock's own reader loads it. An existing checkpoint stays readable until the new one is published,
    whole, in its place. As an ``AsyncStager`` it copies the state in one piece; what it was made of may
    change when ``async_save`` returns.

    One writer may serve several saves at once, each from a thread of its own, as stock's ``async_save`` makes
    them. Nothing is kept between saves, so there is nothing to close.

    Ranks: all save to one directory, on a file system that all of them see. The coordinator publishes.
    """

    should_synchronize_after_execute = False
    # AsyncStager's protocol has this name too: without it async_save() makes a copy of its own instead
    _synchronize_after_execute = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[Any] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
    ) -> None:
        """Stock's arguments, in stock's order.

        Args:
            path: the checkpoint's directory; a save's ``checkpoint_id`` takes its place.
            single_file_per_rank: only True.
            sync_files: files are always synced.
            thread_count: writes at a time, at least two.
            per_thread_copy_ahead: has no meaning here: 128 MiB are in flight at most.
            cache_staged_state_dict: has no meaning here: nothing is kept.
            overwrite: whether a checkpoint that exists is replaced. False: CheckpointExistsError.
        Raises: TypeError, ValueError.
        """
        if not single_file_per_rank:
            raise ValueError(
                "single_file_per_rank=False: this writer writes one file per rank; use torch's "
                "FileSystemWriter for a file per item"
            )
        if _extensions:
            raise ValueError(
                "_extensions=...: this writer writes tensors as they are; use torch's FileSystemWriter for "
                "stream extensions (FileSystemReader of dcp_async.interop reads them)"
            )
        if serialization_format is not SerializationFormat.TORCH_SAVE:
            raise ValueError(
                f"serialization_format={serialization_format}: this writer writes items that torch.load "
                "reads; use torch's HuggingFaceStorageWriter for safetensors"
            )
        if thread_count < 1:
            raise ValueError(f"thread_count is at least 1, not {thread_count}")
        if not sync_files:
            warnings.warn("sync_files=False: dcp_async syncs what it publishes all the same", stacklevel=2)
        self._path = local_path(path)
        self._thread_count = thread_count
        self._overwrite = overwrite
        self._current = _Current()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({os.fspath(self._path)!r})"

    def __getstate__(self) -> dict[str, Any]:
        # to stock's process for saves; a save under way stays behind
        return {name: value for name, value in vars(self).items() if name != "_current"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._current = _Current()

    # StorageWriter.

    @property
    def checkpoint_id(self) -> str:
        """The directory that is written to."""
        return os.fspath(self._path)

    @property
    def overwrite(self) -> bool:
        """Whether a checkpoint that exists is replaced."""
        return self._overwrite

    @property
    def thread_count(self) -> int:
        """How many writes go on at a time."""
        return self._thread_count

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a directory, or may become one, that this process can write to."""
        try:
            path = local_path(checkpoint_id)
        except (TypeError, ValueError):
            return False
        # the first save makes what is not there
        existing = next((parent for parent in (path, *path.parents) if parent.exists()), path)
        return existing.is_dir() and os.access(existing, os.W_OK)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins, from this thread."""
        if checkpoint_id:
            self._path = local_path(checkpoint_id)
        self._begin()

    def _begin(self) -> OneSave:
        if self._current.save is not None:
            self._current.save.close()
        save = OneSave(self._path, io_concurrency=self._thread_count, overwrite=self._overwrite)
        self._current.save = save
        return save

    def storage_meta(self) -> StorageMeta | None:
        save = self._current.save
        directory = self._path if save is None else save.directory
        return StorageMeta(checkpoint_id=os.fspath(directory), save_id=save.token if save else None)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The rank's part in the save. Raises: ValueError for a save without collectives."""
        if not kwargs.get("use_collectives", True):
            raise ValueError(
                "use_collectives=False: without a coordinator nobody can tell whether all ranks wrote their "
                "files; leave it out, use torch's FileSystemWriter, or a CheckpointEngine, whose saves "
                "make no collectives"
            )
        save = self._current.save
        # stock calls reset() only where a checkpoint_id was given
        if save is None or save.has_begun:
            save = self._begin()
        save.is_coordinator = is_coordinator
        save.rank = kwargs.get("rank") or 0

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        save = self._save()
        return dataclasses.replace(plan, storage_data=Share("", save.token, save.rank))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Lease the directory. Raises: CheckpointExistsError, SaveError."""
        save = self._save()
        save.lead()
        # getattr, for a planner that caches may hand out a plan that another writer has marked
        return [
            dataclasses.replace(
                plan, storage_data=Share(save.uid, getattr(plan.storage_data, "token", ""), rank)
            )
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file and make it durable. Raises: SaveError."""
        written = self._save().write(plan.items, planner, plan.storage_data)
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(item.index, told.item.place[2], told) for item, told in written])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish. Raises: SaveError, CheckpointExistsError."""
        save = self._save()
        flat = [result for rank in results for result in rank]
        save.publish(
            metadata,
            {_key_of(result): result.storage_data for result in flat},
            [rank[0].storage_data.file if rank else None for rank in results],
        )
        # what the caller of save() is given
        metadata.storage_data = {result.index: _storage_info(result.storage_data) for result in flat}
        metadata.storage_meta = self.storage_meta()

    def _save(self) -> OneSave:
        save = self._current.save
        if save is None:
            raise RuntimeError(
                "set_up_storage_writer() was not called from this thread: the calls of one save come from "
                "one thread"
            )
        return save

    # AsyncStager: async_save() asks a writer that is one, and makes copies of its own otherwise.

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of ``state_dict`` in host memory."""
        return snapshot(state_dict)

    def synchronize_staging(self) -> None:
        """``stage`` has nothing left to wait for."""

    def close(self) -> None:
        """Nothing is kept between saves."""


def _key_of(result: WriteResult) -> ItemKey:
    is_tensor = result.storage_data.item.dtype is not None
    # a tensor without dimensions has offsets, too: none of them
    return result.index.fqn, (result.index.offset or torch.Size()) if is_tensor else None


def _storage_info(told: Told) -> _StorageInfo:
    file, offset, length = told.item.place
    return _StorageInfo(file_of(file, told.uid), offset, length)
