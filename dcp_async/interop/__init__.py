"""Parts of torch.distributed.checkpoint plug into ours, and ours into stock's calls."""

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
    trust_of,
)
from .from_torch_save import torch_save_to_dcp
from .reader import FileSystemReader
from .rewriting import rewrite, write_torch_save
from .stagers import plain, stage, unstaged
from .stock_load import load_through
from .stock_save import save_through
from .torch_save import dcp_to_torch_save
from .writer import FileSystemWriter

__all__ = [
    "FileSystemReader",
    "FileSystemWriter",
    "SaveTarget",
    "check_checkpointer_type",
    "check_planner",
    "check_stager",
    "dcp_to_torch_save",
    "load_calls",
    "load_directory",
    "load_through",
    "plain",
    "ranks",
    "rewrite",
    "save_calls",
    "save_target",
    "save_through",
    "stage",
    "torch_save_to_dcp",
    "trust_of",
    "unstaged",
    "write_torch_save",
]
