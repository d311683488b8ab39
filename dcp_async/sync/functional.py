"""DCP's functions, blocking: the twins of dcp_async.functional.

Enters and leaves: what ``torch.distributed.checkpoint``'s functions of these names take and give. Invariant:
no logic of its own; each waits, in the caller's thread, for what its asynchronous twin awaits.
"""

from __future__ import annotations

import concurrent.futures
import os
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from .._concurrency import drive_blocking, run_coroutine
from ..coordination import Coordination
from ..functional import CheckpointerVerbs, Staged
from ..interop import (
    check_checkpointer_type,
    check_stager,
    load_calls,
    load_directory,
    load_through,
    plain,
    ranks,
    save_calls,
    save_target,
    save_through,
    stage,
    trust_of,
    unstaged,
)
from ..response import AsyncSaveResponse
from ..trust import Trust


def save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    trust: Trust = Trust(),
) -> Metadata:
    """Save ``state_dict`` into one directory. See ``dcp_async.functional.save``."""
    coordination = ranks(process_group, no_dist=no_dist, use_collectives=use_collectives)
    return _saved(state_dict, checkpoint_id, storage_writer, planner, coordination, trust)


def _saved(
    state_dict: Mapping[str, Any],
    checkpoint_id: str | os.PathLike[str] | None,
    writer: StorageWriter | None,
    planner: SavePlanner | None,
    coordination: Coordination,
    trust: Trust,
) -> Metadata:
    target = save_target(checkpoint_id, writer)
    if target is not None:
        calls = save_calls(target, planner, coordination, trust)
        verb = calls.saving(state_dict, target.directory, overwrite=target.overwrite)
        return drive_blocking("save", verb, calls.inside)
    assert writer is not None
    response = run_coroutine(
        save_through,
        writer,
        dict(state_dict),
        planner=planner,
        coordination=coordination,
        checkpoint_id=checkpoint_id,
        blocking=True,
    )
    return run_coroutine(response.upload_completion.result().metadata)


def async_save(
    state_dict: Mapping[str, Any] | Staged,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType | None = None,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    trust: Trust = Trust(),
) -> AsyncSaveResponse:
    """Save ``state_dict`` as it is now. See ``dcp_async.functional.async_save``."""
    coordination = ranks(process_group, no_dist=no_dist, use_collectives=use_collectives)
    check_checkpointer_type(async_checkpointer_type)
    check_stager(async_stager)
    target = save_target(checkpoint_id, storage_writer)
    state = _resolved(state_dict)
    if target is None:
        assert storage_writer is not None
        return run_coroutine(
            save_through,
            storage_writer,
            plain(state),
            planner=planner,
            coordination=coordination,
            checkpoint_id=checkpoint_id,
            stager=async_stager,
            blocking=False,
        )
    calls = save_calls(target, planner, coordination, trust)
    if async_stager is not None:
        state = _resolved(stage(async_stager, state))
    verb = calls.async_saving(state, target.directory, overwrite=target.overwrite)
    return drive_blocking("async_save", verb, calls.inside)


def _resolved(state: Any) -> Mapping[str, Any]:
    """A state dict that may still be in the making."""
    try:
        if isinstance(state, torch.futures.Future):
            state = state.wait()
        elif isinstance(state, concurrent.futures.Future):
            state = state.result()
    except Exception as error:  # of whoever stages; all ranks hear of it
        state = unstaged(error)
    resolved: Mapping[str, Any] = state
    return resolved


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    trust: Trust = Trust(),
    dequantize: torch.dtype | None = None,
) -> None:
    """Fill ``state_dict`` in place from one directory. See ``dcp_async.functional.load``."""
    coordination = ranks(process_group, no_dist=no_dist)
    _loaded(state_dict, checkpoint_id, storage_reader, planner, coordination, trust, dequantize)


def _loaded(
    state_dict: dict[str, Any],
    checkpoint_id: str | os.PathLike[str] | None,
    reader: StorageReader | None,
    planner: LoadPlanner | None,
    coordination: Coordination,
    trust: Trust,
    dequantize: torch.dtype | None = None,
) -> None:
    directory = load_directory(checkpoint_id, reader, dequantize)
    if directory is not None:
        calls = load_calls(planner, coordination, trust_of(reader, trust))
        drive_blocking("load", calls.loading(state_dict, directory, dequantize), calls.inside)
        return
    assert reader is not None
    run_coroutine(
        load_through,
        reader,
        state_dict,
        planner=planner,
        coordination=coordination,
        checkpoint_id=checkpoint_id,
    )


def save_state_dict(
    state_dict: Mapping[str, Any],
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """Deprecated, as DCP's: ``save`` with ``storage_writer``."""
    warnings.warn("save_state_dict is deprecated: use save", DeprecationWarning, stacklevel=2)
    coordination = ranks(process_group, no_dist=no_dist, coordinator_rank=coordinator_rank)
    return _saved(state_dict, None, storage_writer, planner, coordination, Trust())


def load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Deprecated, as DCP's: ``load`` with ``storage_reader``."""
    warnings.warn("load_state_dict is deprecated: use load", DeprecationWarning, stacklevel=2)
    coordination = ranks(process_group, no_dist=no_dist, coordinator_rank=coordinator_rank)
    _loaded(state_dict, None, storage_reader, planner, coordination, Trust())


class Checkpointer(CheckpointerVerbs):
    """``with Checkpointer(writer, reader) as checkpointer``: see ``dcp_async.functional.Checkpointer``."""

    def save(self, state_dict: Mapping[str, Any]) -> Metadata:
        """See ``save``."""
        if self._target is None:
            return run_coroutine(self._save_through, state_dict)
        target = self._target
        verb = self._calls.saving(state_dict, target.directory, overwrite=target.overwrite)
        return drive_blocking("save", verb, self._calls.inside)

    def async_save(self, state_dict: Mapping[str, Any] | Staged) -> AsyncSaveResponse:
        """See ``async_save``."""
        state = _resolved(state_dict)
        if self._target is None:
            return run_coroutine(self._through, state, blocking=False)
        target = self._target
        verb = self._calls.async_saving(state, target.directory, overwrite=target.overwrite)
        return drive_blocking("async_save", verb, self._calls.inside)

    def load(self, state_dict: dict[str, Any]) -> None:
        """See ``load``."""
        if self._directory is None:
            run_coroutine(self._load_through, state_dict)
        else:
            drive_blocking("load", self._calls.loading(state_dict, self._directory), self._calls.inside)

    def close(self) -> None:
        """Wait for the saves in flight, then release what was made."""
        drive_blocking("close", self._calls.closing(), self._calls.inside)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        drive_blocking("close", self._calls.closing(exc_type), self._calls.inside)
