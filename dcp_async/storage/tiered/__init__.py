"""Two storages as one: checkpoints are committed near, and replicated far in the background."""

from __future__ import annotations

from .copying import CopyChunk, CopyPlan
from .replication import Outcome, Replicator
from .storage import TieredStorage

__all__ = [
    "CopyChunk",
    "CopyPlan",
    "Outcome",
    "Replicator",
    "TieredStorage",
]
