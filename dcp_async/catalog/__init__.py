"""Which checkpoints exist and are whole, what an opened one holds, which may go."""

from __future__ import annotations

from .catalog import Catalog
from .contents import Contents
from .decoding import UnfitMetadataError
from .opened import Opened
from .opening import last_number
from .path_opener import PathOpener
from .reference import is_path, reference
from .retention import (
    CheckpointRecord,
    KeepBest,
    KeepEvery,
    KeepLatest,
    Retention,
    RetentionPlan,
    plan_retention,
)
from .safetensors_source import is_model_file

__all__ = [
    "Catalog",
    "CheckpointRecord",
    "Contents",
    "KeepBest",
    "KeepEvery",
    "KeepLatest",
    "Opened",
    "PathOpener",
    "Retention",
    "RetentionPlan",
    "UnfitMetadataError",
    "is_model_file",
    "is_path",
    "last_number",
    "plan_retention",
    "reference",
]
