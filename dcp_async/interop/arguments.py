"""What DCP's functions are called with, in the engine's words: which directory, which ranks, which planner.

Enters: arguments of ``torch.distributed.checkpoint``'s save and load. Leaves: a Directory and options, or an
error that says what to write instead. Pure. Invariant: a FileSystemWriter
or FileSystemReader is only asked for its path and its options, since the engine does its work; every other
part does its own.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader as StockReader,
)
from torch.distributed.checkpoint.filesystem import (
    FileSystemWriter as StockWriter,
)
from torch.distributed.checkpoint.filesystem import (
    SerializationFormat,
)
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from ..coordination import Coordination
from ..engine import CallOptions, DcpCalls, Directory
from ..options import Limits
from ..trust import Trust
from .reader import FileSystemReader
from .writer import FileSystemWriter


@dataclass(frozen=True, slots=True)
class SaveTarget:
    """Where and how the engine saves for DCP's caller."""

    directory: Directory
    overwrite: bool
    limits: Limits


def save_target(
    checkpoint_id: str | os.PathLike[str] | None, storage_writer: StorageWriter | None
) -> SaveTarget | None:
    """Where the engine is to save, and how; None if ``storage_writer`` is one that writes by itself. Raises
    TypeError, ValueError."""
    path, overwrite, writes = checkpoint_id, True, 1
    if storage_writer is not None:
        if not isinstance(storage_writer, StorageWriter):
            raise TypeError(
                f"storage_writer={storage_writer!r} is no StorageWriter; for a directory pass "
                "checkpoint_id='path', or FileSystemWriter('path')"
            )
        # not of a subclass: what that overrides the engine would not call
        if type(storage_writer) is FileSystemWriter:
            path = storage_writer.checkpoint_id if checkpoint_id is None else checkpoint_id
            overwrite, writes = storage_writer.overwrite, storage_writer.thread_count
        elif type(storage_writer) is StockWriter and _is_plain(storage_writer):
            path = storage_writer.path if checkpoint_id is None else checkpoint_id
            overwrite, writes = storage_writer.overwrite, storage_writer.thread_count
        else:
            return None
    # stock's default of one thread is no wish for a slow save
    limits = Limits(io_concurrency=max(writes, Limits().io_concurrency))
    return SaveTarget(_directory(path, "storage_writer"), overwrite, limits)


def load_directory(
    checkpoint_id: str | os.PathLike[str] | None,
    storage_reader: StorageReader | None,
    dequantize: torch.dtype | None = None,
) -> Directory | None:
    """Which checkpoint the engine is to load; None if ``storage_reader`` is one that reads by itself. Raises
    TypeError, ValueError."""
    path = checkpoint_id
    if storage_reader is not None:
        if not isinstance(storage_reader, StorageReader):
            raise TypeError(
                f"storage_reader={storage_reader!r} is no StorageReader; for a directory pass "
                "checkpoint_id='path', or FileSystemReader('path')"
            )
        if type(storage_reader) not in (FileSystemReader, StockReader):
            if dequantize is not None:
                raise ValueError(
                    f"a {type(storage_reader).__name__} reads by itself, and dequantize= is for what the "
                    "engine reads: pass checkpoint_id='path' alone"
                )
            return None
        if checkpoint_id is None:
            path = storage_reader.checkpoint_id  # type: ignore[attr-defined]  # both have it
    return _directory(path, "storage_reader")


def trust_of(storage_reader: StorageReader | None, trust: Trust) -> Trust:
    """What a load trusts: that which a reader of ours was made with, unless the caller says more."""
    # the functions have a default, so that nobody can tell whether it was passed
    if type(storage_reader) is FileSystemReader and trust == Trust():
        return storage_reader.trust
    return trust


def _is_plain(writer: Any) -> bool:
    """Whether what the engine writes is what ``writer`` was made to write."""
    return (
        writer.single_file_per_rank
        and writer.serialization_format is SerializationFormat.TORCH_SAVE
        and not writer.transforms.extensions
    )


def _directory(path: str | os.PathLike[str] | None, other: str) -> Directory:
    if path is None:
        raise ValueError(
            f"nothing says where the checkpoint is: pass checkpoint_id='path/to/step-100', or {other}=..."
        )
    return Directory.at(path)


def ranks(
    process_group: dist.ProcessGroup | None,
    *,
    no_dist: bool,
    coordinator_rank: int = 0,
    use_collectives: bool = True,
) -> Coordination:
    """Which processes save or load together."""
    if not use_collectives:
        warnings.warn(
            "use_collectives=False: no collective is made here in any case, and the ranks write one "
            ".metadata together; leave it out",
            stacklevel=4,
        )
    if no_dist:
        return Coordination(mode="local")
    return Coordination(process_group=process_group, coordinator_rank=coordinator_rank)


def save_calls(
    target: SaveTarget, planner: SavePlanner | None, coordination: Coordination, trust: Trust
) -> DcpCalls:
    """What one save's calls run on. Raises TypeError."""
    check_planner(planner, SavePlanner)
    return DcpCalls(
        CallOptions(coordination=coordination, save_planner=planner, trust=trust, limits=target.limits),
        keeps=False,
    )


def load_calls(planner: LoadPlanner | None, coordination: Coordination, trust: Trust) -> DcpCalls:
    """What one load's calls run on. Raises TypeError."""
    check_planner(planner, LoadPlanner)
    return DcpCalls(CallOptions(coordination=coordination, load_planner=planner, trust=trust), keeps=False)


def check_planner(planner: object, kind: type[SavePlanner] | type[LoadPlanner]) -> None:
    """Raises TypeError unless ``planner`` is None or an instance of ``kind``."""
    if planner is not None and not isinstance(planner, kind):
        hint = "; pass an instance, not the class" if isinstance(planner, type) else ""
        raise TypeError(f"planner={planner!r} is no {kind.__name__}{hint}")


def check_stager(stager: object) -> None:
    """Raises TypeError unless ``stager`` is None or an AsyncStager."""
    # stock's is a protocol, whose methods alone count
    if stager is not None and not callable(getattr(stager, "stage", None)):
        raise TypeError(f"async_stager={stager!r} is no AsyncStager: it has no stage(state_dict)")


def check_checkpointer_type(kind: AsyncCheckpointerType | None) -> None:
    """Says what becomes of a save that is to run in a process of its own. Raises TypeError."""
    if kind is not None and not isinstance(kind, AsyncCheckpointerType):
        raise TypeError(f"async_checkpointer_type={kind!r} is no AsyncCheckpointerType")
    if kind is AsyncCheckpointerType.PROCESS:
        warnings.warn(
            "async_checkpointer_type=PROCESS: saves run on threads that hardly need the GIL, and no process "
            "is started; leave it out",
            stacklevel=3,
        )
