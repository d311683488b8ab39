"""Admits verbs, runs them and ends them; alone knows saves, loads and an engine's lifetime together."""

from __future__ import annotations

from .checkpoint import STREAM_BYTES, Checkpoint, CheckpointVerbs, open_checkpoint, reader_at
from .engine import CheckpointEngine
from .verbs import EngineVerbs
from .verification import verify, verifying

__all__ = [
    "STREAM_BYTES",
    "Checkpoint",
    "CheckpointEngine",
    "CheckpointVerbs",
    "EngineVerbs",
    "open_checkpoint",
    "reader_at",
    "verify",
    "verifying",
]
