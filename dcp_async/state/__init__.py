"""A trainer's objects as flat lists of tensors and leaves, and back; calls user code, does no I/O."""

from __future__ import annotations

from .asking import UNASKED
from .capture import Captured, KnownStructure, Structure, capture, meta_error
from .checkpointable import empty_like, global_size
from .containers import PLAIN_TENSORS, CaptureError
from .flat_state import Extent, FlatState
from .leaves import LeafRules
from .mutation import layers_of, version_of, versions_of, wrappers_in
from .optimizers import AppState, check_before_touch
from .partial import narrow, part_of_state
from .planned_state import PlannedState
from .resolved import ResolvedItem, captured_items
from .restore import ReadBack, Restorer
from .schema import Asked, Schema, wishes_of
from .sharding import is_known_to_autograd, is_sharded
from .stateful import FromRank, PerRank, RNGState
from .targets import OptimizerState, Region, Targets, Whole, capture_targets
from .wrapped import is_wrapper, joined, pairs, part_of

__all__ = [
    "PLAIN_TENSORS",
    "UNASKED",
    "AppState",
    "Asked",
    "CaptureError",
    "Captured",
    "Extent",
    "FlatState",
    "FromRank",
    "KnownStructure",
    "LeafRules",
    "OptimizerState",
    "PerRank",
    "PlannedState",
    "RNGState",
    "ReadBack",
    "Region",
    "ResolvedItem",
    "Restorer",
    "Schema",
    "Structure",
    "Targets",
    "Whole",
    "capture",
    "capture_targets",
    "captured_items",
    "check_before_touch",
    "empty_like",
    "global_size",
    "is_known_to_autograd",
    "is_sharded",
    "is_wrapper",
    "joined",
    "layers_of",
    "meta_error",
    "narrow",
    "pairs",
    "part_of",
    "part_of_state",
    "version_of",
    "versions_of",
    "wishes_of",
    "wrappers_in",
]
