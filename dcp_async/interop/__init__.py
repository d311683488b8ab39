"""Our files by stock's protocols: a StorageWriter and a StorageReader for torch.distributed.checkpoint."""

from __future__ import annotations

from .reader import FileSystemReader
from .writer import FileSystemWriter

__all__ = ["FileSystemReader", "FileSystemWriter"]
