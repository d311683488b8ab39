"""For trainers without an event loop: the verbs of the engine and DCP's functions, blocking.

    import dcp_async.sync as dcp

Enters and leaves: what dcp_async.engine and dcp_async.functional take and give. Invariant: no logic of its
own; each method waits, in the caller's thread, for the verb that its asynchronous twin awaits.
"""

from __future__ import annotations

import concurrent.futures
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from ._concurrency import Verb, drive_blocking
from .engine import STREAM_BYTES, CheckpointVerbs, EngineVerbs, reader_at, verifying
from .functional import CheckpointerVerbs, Staged
from .info import JSON, CheckpointInfo, CheckpointRef, LoadReport, VerifyReport
from .interop import (
    check_checkpointer_type,
    check_stager,
    load_calls,
    load_directory,
    ranks,
    save_calls,
    save_target,
)
from .load import Index
from .options import Dtypes, Limits, Timeouts
from .response import AsyncSaveResponse
from .trust import Trust

__all__ = [
    "Checkpoint",
    "CheckpointEngine",
    "Checkpointer",
    "async_save",
    "load",
    "load_state_dict",
    "open_checkpoint",
    "save",
    "save_state_dict",
    "verify",
]

T = TypeVar("T")


class CheckpointEngine(EngineVerbs):
    """``with CheckpointEngine(root) as engine``: see ``dcp_async.CheckpointEngine``, whose arguments it
    takes.

    Handles of a response are waited for with ``.result(timeout)``.
    """

    def __repr__(self) -> str:
        return f"<sync {super().__repr__()}>"

    def _run(self, name: str, verb: Verb[T]) -> T:
        return drive_blocking(name, verb, self._life.inside)

    def open(self) -> Self:
        """Start the engine's threads and look at what the root holds."""
        self._run("open", self._opening())
        return self

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._run("close", self._life.leaving(exc_type))

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        checkpoint_id: str | None = None,
        notes: Mapping[str, JSON] | None = None,
        replace: bool = False,
    ) -> AsyncSaveResponse:
        """Save ``state`` as it is now; the upload goes on by itself. An interrupt while it waits cancels the
        save."""
        return self._run("save", self._saves.saving(state, step, checkpoint_id, notes, replace))

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Do ahead of time what the first save of ``state`` would do while training waits; writes nothing."""
        self._run("prepare", self._saves.preparing(state))

    def load(
        self,
        state: Mapping[str, Any],
        source: CheckpointRef = "latest",
        *,
        keys: str | Sequence[str] | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        strict: bool = True,
        atomic: bool = False,
        dtypes: Dtypes = "exact",
    ) -> LoadReport:
        """Fill ``state`` from a checkpoint, verified."""
        verb = self._loads.loading(
            state, source, keys=keys, rename=rename, strict=strict, atomic=atomic, dtypes=dtypes
        )
        return self._run("load", verb)

    def read(
        self,
        source: CheckpointRef = "latest",
        *,
        keys: str | Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, Any]:
        """A checkpoint as fresh tensors and leaves, in exactly the structure that was saved."""
        return self._run("read", self._reads.reading(source, keys, device))

    def verify(self, source: CheckpointRef = "latest") -> VerifyReport:
        """Read all of a checkpoint and tell what of it is damaged."""
        return self._run("verify", self._reads.verifying(source))

    def checkpoint(self, source: CheckpointRef = "latest") -> Checkpoint:
        """One checkpoint to read and load from any number of times, on one opening and one choice."""
        return Checkpoint(self._life, source, owns_life=False)

    def latest(self) -> CheckpointInfo | None:
        """The newest whole checkpoint, None if there is none."""
        return self._run("latest", self._loads.finding_latest())

    def checkpoints(self) -> Iterator[CheckpointInfo]:
        """Committed, whole checkpoints, ascending."""
        for name in self._run("checkpoints", self._loads.listing()):
            info = self._run("checkpoints", self._loads.describing(name))
            if info is not None:
                yield info

    def wait(self) -> None:
        """Wait until no save is in flight. Raises the SaveError of a save whose failure nobody has looked
        at."""
        self._run("wait", self._life.waiting())

    def close(self) -> None:
        """Wait for the saves in flight, then release what the engine made."""
        self._run("close", self._life.closing())

    def abort(self) -> None:
        """Cancel the saves in flight, leave nothing of them behind, release what the engine made."""
        self._run("abort", self._life.aborting())


class Checkpoint(CheckpointVerbs):
    """One opened checkpoint: ``with engine.checkpoint(source) as checkpoint``, or
    ``with open_checkpoint(path) as checkpoint``. See ``dcp_async.Checkpoint``."""

    def __repr__(self) -> str:
        return f"<sync {super().__repr__()}>"

    def _run(self, name: str, verb: Verb[T]) -> T:
        return drive_blocking(name, verb, self._life.inside)

    def open(self) -> Self:
        """Choose the checkpoint, open all its files and check everything but the payload."""
        self._run("open", self._opening())
        return self

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._run("close", self._closing(exc_type))

    def close(self) -> None:
        """No verb begins any more, and the files close with the last read that is under way."""
        self._run("close", self._closing())

    def read(
        self, keys: str | Sequence[str] | None = None, *, device: torch.device | str = "cpu"
    ) -> dict[str, Any]:
        """All of it, or what lies at and below ``keys``, as fresh tensors and leaves."""
        return self._run("read", self._reads.reading(self.info, keys, device))

    def tensor(self, name: str, index: Index = ..., *, device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor, or what ``index`` means of it; no more is read than that."""
        return self._run("tensor", self._reads.reading_tensor(name, index, device))

    def stream(
        self,
        keys: str | Sequence[str] | None = None,
        *,
        budget_bytes: int = STREAM_BYTES,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """The tensors at and below ``keys``, one after another, while the next ones are read."""
        stream = self._reads.streaming(keys, budget_bytes, device)
        try:
            while (following := self._run("stream", stream.following())) is not None:
                yield following
                del following  # else it would live on while the next one is read
        finally:
            self._run("stream", stream.ending())

    def load(
        self,
        state: Mapping[str, Any],
        *,
        keys: str | Sequence[str] | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        strict: bool = True,
        atomic: bool = False,
        dtypes: Dtypes = "exact",
    ) -> LoadReport:
        """Fill ``state``, or the part of it that is there by now, from this checkpoint."""
        return self._run("load", self._loading(state, keys, rename, strict, atomic, dtypes))


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    trust: Trust = Trust(),
    limits: Limits = Limits(),
    timeouts: Timeouts = Timeouts(),
) -> Checkpoint:
    """The checkpoint in the directory ``path``, without an engine, a model or a process group."""
    life, name = reader_at(path, trust=trust, limits=limits, timeouts=timeouts)
    return Checkpoint(life, name, owns_life=True)


def verify(
    path: str | os.PathLike[str],
    *,
    trust: Trust = Trust(),
    limits: Limits = Limits(),
    timeouts: Timeouts = Timeouts(),
) -> VerifyReport:
    """Read all of the checkpoint in the directory ``path`` and tell what of it is damaged."""
    life, name = reader_at(path, trust=trust, limits=limits, timeouts=timeouts)
    return drive_blocking("verify", verifying(life, name), life.inside)


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
    target = save_target(checkpoint_id, storage_writer)
    calls = save_calls(target, planner, coordination, trust)
    verb = calls.saving(state_dict, target.directory, overwrite=target.overwrite)
    return drive_blocking("save", verb, calls.inside)


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
    calls = save_calls(target, planner, coordination, trust)
    state = _resolved(state_dict)
    if async_stager is not None:
        staged = async_stager.stage(dict(state))
        if isinstance(staged, Mapping):
            async_stager.synchronize_staging()
        state = _resolved(staged)
    verb = calls.async_saving(state, target.directory, overwrite=target.overwrite)
    return drive_blocking("async_save", verb, calls.inside)


def _resolved(state: Any) -> Mapping[str, Any]:
    """A state dict that may still be in the making."""
    if isinstance(state, torch.futures.Future):
        state = state.wait()
    elif isinstance(state, concurrent.futures.Future):
        state = state.result()
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
) -> None:
    """Fill ``state_dict`` in place from one directory. See ``dcp_async.functional.load``."""
    coordination = ranks(process_group, no_dist=no_dist)
    directory = load_directory(checkpoint_id, storage_reader)
    calls = load_calls(planner, coordination, trust)
    drive_blocking("load", calls.loading(state_dict, directory), calls.inside)


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
    target = save_target(None, storage_writer)
    calls = save_calls(target, planner, coordination, Trust())
    verb = calls.saving(state_dict, target.directory, overwrite=target.overwrite)
    return drive_blocking("save", verb, calls.inside)


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
    directory = load_directory(None, storage_reader)
    calls = load_calls(planner, coordination, Trust())
    drive_blocking("load", calls.loading(state_dict, directory), calls.inside)


class Checkpointer(CheckpointerVerbs):
    """``with Checkpointer(writer, reader) as checkpointer``: see ``dcp_async.functional.Checkpointer``."""

    def save(self, state_dict: Mapping[str, Any]) -> Metadata:
        """See ``save``."""
        return drive_blocking("save", self._saving(state_dict), self._calls.inside)

    def async_save(self, state_dict: Mapping[str, Any] | Staged) -> AsyncSaveResponse:
        """See ``async_save``."""
        return drive_blocking("async_save", self._async_saving(_resolved(state_dict)), self._calls.inside)

    def load(self, state_dict: dict[str, Any]) -> None:
        """See ``load``."""
        drive_blocking("load", self._loading(state_dict), self._calls.inside)

    def close(self) -> None:
        """Wait for the saves in flight, then release what was made."""
        drive_blocking("close", self._calls.closing(), self._calls.inside)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        drive_blocking("close", self._calls.closing(exc_type), self._calls.inside)
