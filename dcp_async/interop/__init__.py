"""Our files by stock's protocols: a StorageWriter and a StorageReader for torch.distributed.checkpoint."""

from __future__ import annotations

from .arguments import (
    SaveTarget,
    check_checkpointer_type,
    check_planner,
    check_stager,
    load_calls,
    load_directory,
    ranks,
    save_calls,
    save_target,
)
from .reader import FileSystemReader
from .writer import FileSystemWriter

__all__ = [
    "FileSystemReader",
    "FileSystemWriter",
    "SaveTarget",
    "check_checkpointer_type",
    "check_planner",
    "check_stager",
    "load_calls",
    "load_directory",
    "ranks",
    "save_calls",
    "save_target",
]
