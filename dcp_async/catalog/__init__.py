"""Which checkpoints exist and are whole, what an opened one holds, which may go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazily
from .reference import is_path, reference

if TYPE_CHECKING:
    from .catalog import Catalog
    from .contents import Contents
    from .copy_plans import copy_plan_of
    from .decoding import UnfitMetadataError
    from .listing import Listed, survey
    from .opened import Opened
    from .path_opener import PathOpener
    from .pruning import Pruned, Pruner
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
    from .torch_save_source import archive_errors
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "catalog": "Catalog",
            "contents": "Contents",
            "copy_plans": "copy_plan_of",
            "decoding": "UnfitMetadataError",
            "listing": "Listed survey",
            "opened": "Opened",
            "path_opener": "PathOpener",
            "pruning": "Pruned Pruner",
            "retention": (
                "CheckpointRecord KeepBest KeepEvery KeepLatest Retention RetentionPlan plan_retention"
            ),
            "safetensors_source": "is_model_file",
            "torch_save_source": "archive_errors",
        },
    )

__all__ = [
    "Catalog",
    "CheckpointRecord",
    "Contents",
    "KeepBest",
    "KeepEvery",
    "KeepLatest",
    "Listed",
    "Opened",
    "PathOpener",
    "Pruned",
    "Pruner",
    "Retention",
    "RetentionPlan",
    "UnfitMetadataError",
    "archive_errors",
    "copy_plan_of",
    "is_model_file",
    "is_path",
    "plan_retention",
    "reference",
    "survey",
]
