"""DCP's functions as coroutines: ``save``, ``load`` and ``async_save`` with DCP's keywords and meanings.

    from dcp_async import functional as dcp
    metadata = await dcp.save(state_dict, checkpoint_id="checkpoints/step-100")

Enters and leaves: what ``torch.distributed.checkpoint``'s functions of these names take and give. Each call
makes what it needs and releases it; a Checkpointer keeps it for the next. Invariant: no logic of its own (see
engine/dcp_calls.py); dcp_async.sync has the blocking twins.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import warnings
from collections.abc import Awaitable, Mapping
from types import TracebackType
from typing import Any, Self, TypeAlias

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as _stock
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from ._concurrency import drive
from .coordination import Coordination
from .engine import CallOptions, DcpCalls
from .interop import (
    check_checkpointer_type,
    check_planner,
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
from .options import Limits
from .response import AsyncSaveResponse
from .trust import Trust

__all__ = ["Checkpointer", "async_save", "load", "load_state_dict", "save", "save_state_dict"]


def __getattr__(name: str) -> Any:
    # planners, writers, readers, submodules: a script that has changed its import goes on with stock's
    if name.startswith("_") or not hasattr(_stock, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_stock, name)


Path: TypeAlias = "str | os.PathLike[str]"
Staged: TypeAlias = "concurrent.futures.Future[Mapping[str, Any]] | torch.futures.Future[Mapping[str, Any]]"
"""A state dict that somebody is still staging."""


async def save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: Path | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    trust: Trust = Trust(),
) -> Metadata:
    """Save ``state_dict`` into one directory; when this returns, it is durable on all ranks.

    Args:
        state_dict: names -> Statefuls, tensors, containers of them, or picklable leaves.
        checkpoint_id: the checkpoint's own directory, or its URL; one that holds a checkpoint is replaced,
            and stays readable until the new one is durable.
        storage_writer: a FileSystemWriter, torch's or that of ``dcp_async.interop``, is asked for its path
            and options, and the engine writes. Any other StorageWriter writes by itself, on a thread of ours,
            from a copy of the whole state; ``trust`` has no say in what it writes.
        planner: of DCP's; one that overrides a method decides on what is written.
        process_group: the ranks that save together, by default all.
        no_dist: save this process's state alone.
        use_collectives: has no meaning here: no collective is made.
        trust: leaves that it does not admit are refused, since a load would refuse them.
    Returns: DCP's Metadata, as stock's reader finds it.
    Raises: SaveError, and then the directory is as it was; TypeError, ValueError; EngineStateError.
    Cancellation: cancels the save.
    Ranks: all must call it, in the same order.
    """
    coordination = ranks(process_group, no_dist=no_dist, use_collectives=use_collectives)
    return await _saved(state_dict, checkpoint_id, storage_writer, planner, coordination, trust)


async def _saved(
    state_dict: Mapping[str, Any],
    checkpoint_id: Path | None,
    writer: StorageWriter | None,
    planner: SavePlanner | None,
    coordination: Coordination,
    trust: Trust,
) -> Metadata:
    target = save_target(checkpoint_id, writer)
    if target is not None:
        calls = save_calls(target, planner, coordination, trust)
        verb = calls.saving(state_dict, target.directory, overwrite=target.overwrite)
        return await drive("save", verb, calls.inside)
    assert writer is not None
    response = await save_through(
        writer,
        dict(state_dict),
        planner=planner,
        coordination=coordination,
        checkpoint_id=checkpoint_id,
        blocking=True,
    )
    return await (await response.upload_completion).metadata()


async def async_save(
    state_dict: Mapping[str, Any] | Awaitable[Mapping[str, Any]] | Staged,
    *,
    checkpoint_id: Path | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType | None = None,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    trust: Trust = Trust(),
) -> AsyncSaveResponse:
    """Save ``state_dict`` as it is now; once this returns it may be mutated, while the upload goes on.

    ``await response.upload_completion`` until it is durable; ``response.upload_completion.future`` is a
    ``concurrent.futures.Future`` for code that asks for one. Another save of the same directory waits for it.
    An upload that nobody waits for is finished before the process ends, and what makes it fail is logged.

    Args:
        state_dict: as for ``save``; or an awaitable or a future of it, which is awaited first.
        async_checkpointer_type: has no meaning here: saves run on threads of their own.
        async_stager: stages the state before it is saved; the engine, which stages by itself, copies once
            more what it gives.
        checkpoint_id, storage_writer, planner, process_group, no_dist, use_collectives, trust: see ``save``.
    Raises: as ``save``, if it fails before the state may be mutated; later failures are those of the handles.
    Cancellation: cancels the save.
    Ranks: all must call it, in the same order.
    """
    coordination = ranks(process_group, no_dist=no_dist, use_collectives=use_collectives)
    check_checkpointer_type(async_checkpointer_type)
    check_stager(async_stager)
    target = save_target(checkpoint_id, storage_writer)
    state = await _resolved(state_dict)
    if target is not None:
        calls = save_calls(target, planner, coordination, trust)
        if async_stager is not None:
            state = await _resolved(stage(async_stager, state))
        verb = calls.async_saving(state, target.directory, overwrite=target.overwrite)
        return await drive("async_save", verb, calls.inside)
    assert storage_writer is not None
    return await save_through(
        storage_writer,
        plain(state),
        planner=planner,
        coordination=coordination,
        checkpoint_id=checkpoint_id,
        stager=async_stager,
        blocking=False,
    )


async def _resolved(state: Any) -> Mapping[str, Any]:
    """A state dict that may still be in the making."""
    if isinstance(state, torch.futures.Future):
        made: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def settle(done: torch.futures.Future[Any]) -> None:
            try:
                made.set_result(done.value())
            except BaseException as error:  # whatever the code behind it raised
                made.set_exception(error)

        # torch's future can't be awaited, and its wait() would block the loop
        state.add_done_callback(settle)
        state = made
    if isinstance(state, concurrent.futures.Future):
        state = asyncio.wrap_future(state)
    try:
        resolved: Mapping[str, Any] = await state if isinstance(state, Awaitable) else state
    except Exception as error:  # of whoever stages; all ranks hear of it
        return unstaged(error)
    return resolved


async def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: Path | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    trust: Trust = Trust(),
    dequantize: torch.dtype | None = None,
) -> None:
    """Fill ``state_dict`` in place from one directory, ours or stock's, verified.

    As with DCP, the checkpoint may hold more than ``state_dict`` names, a name that it lacks is an error, and
    dtypes are converted. All of that is checked before the first tensor is touched.

    Args:
        state_dict: tensors are filled in place, Statefuls get ``load_state_dict``, other leaves are replaced.
        checkpoint_id: the checkpoint's own directory, or its URL.
        storage_reader: a FileSystemReader, torch's or that of ``dcp_async.interop``, is asked for its path.
            Any other StorageReader reads by itself, on a thread of ours; ``trust`` has no say in that.
        planner: of DCP's; decides on what is read and where it goes (``DefaultLoadPlanner(
            allow_partial_load=True)``).
        process_group: the ranks that load together, by default all.
        no_dist: load into this process alone.
        trust: which pickled leaves are accepted.
        dequantize: the dtype to make plain values in of what a model's files hold quantised in blocks, in
            place of a QuantizedHuggingFaceStorageReader; see ``CheckpointEngine.load``.
    Raises: LoadError (CheckpointNotFoundError, CorruptCheckpointError, IncompatibleStateError,
        UntrustedCheckpointError); TypeError, ValueError; EngineStateError.
    Cancellation: waits for the reads in progress; tensors may be partly filled.
    Ranks: all must call it, in the same order.
    """
    coordination = ranks(process_group, no_dist=no_dist)
    await _loaded(state_dict, checkpoint_id, storage_reader, planner, coordination, trust, dequantize)


async def _loaded(
    state_dict: dict[str, Any],
    checkpoint_id: Path | None,
    reader: StorageReader | None,
    planner: LoadPlanner | None,
    coordination: Coordination,
    trust: Trust,
    dequantize: torch.dtype | None = None,
) -> None:
    directory = load_directory(checkpoint_id, reader, dequantize)
    if directory is not None:
        calls = load_calls(planner, coordination, trust_of(reader, trust))
        await drive("load", calls.loading(state_dict, directory, dequantize), calls.inside)
        return
    assert reader is not None
    await load_through(
        reader, state_dict, planner=planner, coordination=coordination, checkpoint_id=checkpoint_id
    )


async def save_state_dict(
    state_dict: Mapping[str, Any],
    # by position too, in stock's order: that is how old scripts call it
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """Deprecated, as DCP's: use ``save``; ``Checkpointer`` takes a ``coordinator_rank``."""
    warnings.warn("save_state_dict is deprecated: use save", DeprecationWarning, stacklevel=2)
    coordination = ranks(process_group, no_dist=no_dist, coordinator_rank=coordinator_rank)
    return await _saved(state_dict, None, storage_writer, planner, coordination, Trust())


async def load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Deprecated, as DCP's: use ``load``; ``Checkpointer`` takes a ``coordinator_rank``."""
    warnings.warn("load_state_dict is deprecated: use load", DeprecationWarning, stacklevel=2)
    coordination = ranks(process_group, no_dist=no_dist, coordinator_rank=coordinator_rank)
    await _loaded(state_dict, None, storage_reader, planner, coordination, Trust())


class CheckpointerVerbs:
    """Base of both twins. Owns threads and memory from its first call until it is closed."""

    def __init__(
        self,
        storage_writer: StorageWriter,
        storage_reader: StorageReader,
        *,
        process_group: dist.ProcessGroup | None = None,
        coordinator_rank: int = 0,
        no_dist: bool = False,
        load_planner: LoadPlanner | None = None,
        save_planner: SavePlanner | None = None,
        trust: Trust = Trust(),
    ) -> None:
        """
        Args:
            storage_writer: says where and how to save, see ``save``.
            storage_reader: says where to load from, see ``load``.
            process_group: the ranks that save and load together, by default all.
            coordinator_rank: which of them leads.
            no_dist: save and load this process's state alone.
            load_planner, save_planner: of DCP's, used for each load and each save.
            trust: which pickled leaves are accepted.
        """
        check_planner(save_planner, SavePlanner)
        check_planner(load_planner, LoadPlanner)
        self._writer, self._reader = storage_writer, storage_reader
        self._save_planner, self._load_planner = save_planner, load_planner
        self._target = save_target(None, storage_writer)
        """Where the engine saves; None if the writer does it."""
        self._directory = load_directory(None, storage_reader)
        self._coordination = ranks(process_group, no_dist=no_dist, coordinator_rank=coordinator_rank)
        limits = Limits() if self._target is None else self._target.limits
        self._calls = DcpCalls(
            CallOptions(
                coordination=self._coordination,
                save_planner=save_planner,
                load_planner=load_planner,
                trust=trust_of(storage_reader, trust),
                limits=limits,
            ),
            keeps=True,
        )

    def __repr__(self) -> str:
        where = self._writer if self._target is None else str(self._target.directory)
        return f"<Checkpointer {where!r}>"

    async def _through(self, state_dict: Mapping[str, Any], *, blocking: bool) -> AsyncSaveResponse:
        """A save by a writer that writes by itself."""
        # nothing that close() releases is used here, so that nobody else would tell a closed one
        self._calls.check_open()
        return await save_through(
            self._writer,
            plain(state_dict),
            planner=self._save_planner,
            coordination=self._coordination,
            blocking=blocking,
        )

    async def _save_through(self, state_dict: Mapping[str, Any]) -> Metadata:
        response = await self._through(state_dict, blocking=True)
        return await (await response.upload_completion).metadata()

    async def _load_through(self, state_dict: dict[str, Any]) -> None:
        self._calls.check_open()
        planner, coordination = self._load_planner, self._coordination
        await load_through(self._reader, state_dict, planner=planner, coordination=coordination)


class Checkpointer(CheckpointerVerbs):
    """A writer, a reader and options, for any number of saves and loads: ``async with Checkpointer(...)``.

    Unlike the functions it keeps its threads, its memory and the ranks' connection between calls, so that a
    second save is planned and staged faster; ``close`` releases them.
    """

    async def save(self, state_dict: Mapping[str, Any]) -> Metadata:
        """See ``dcp_async.functional.save``."""
        if self._target is None:
            return await self._save_through(state_dict)
        target = self._target
        verb = self._calls.saving(state_dict, target.directory, overwrite=target.overwrite)
        return await drive("save", verb, self._calls.inside)

    async def async_save(
        self, state_dict: Mapping[str, Any] | Awaitable[Mapping[str, Any]] | Staged
    ) -> AsyncSaveResponse:
        """See ``dcp_async.functional.async_save``."""
        state = await _resolved(state_dict)
        if self._target is None:
            return await self._through(state, blocking=False)
        target = self._target
        verb = self._calls.async_saving(state, target.directory, overwrite=target.overwrite)
        return await drive("async_save", verb, self._calls.inside)

    async def load(self, state_dict: dict[str, Any]) -> None:
        """See ``dcp_async.functional.load``."""
        if self._directory is None:
            await self._load_through(state_dict)
        else:
            await drive("load", self._calls.loading(state_dict, self._directory), self._calls.inside)

    async def close(self) -> None:
        """Wait for the saves in flight, then release what was made. Closing twice does nothing.

        Raises: the SaveError of a save whose failure nobody has looked at.
        """
        await drive("close", self._calls.closing(), self._calls.inside)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await drive("close", self._calls.closing(exc_type), self._calls.inside)
