"""Admits verbs, runs them and ends them; alone knows saves, loads and an engine's lifetime together."""

from __future__ import annotations

from .attaching import Attachable
from .checkpoint import STREAM_BYTES, Checkpoint, CheckpointVerbs, open_checkpoint, reader_at
from .dcp_calls import CallOptions, DcpCalls, Directory
from .engine import CheckpointEngine
from .exit_guard import ExitGuard, fail_unless_seen
from .removals import After
from .verbs import EngineVerbs
from .verification import verify, verifying

__all__ = [
    "STREAM_BYTES",
    "After",
    "Attachable",
    "CallOptions",
    "Checkpoint",
    "CheckpointEngine",
    "CheckpointVerbs",
    "DcpCalls",
    "Directory",
    "EngineVerbs",
    "ExitGuard",
    "fail_unless_seen",
    "open_checkpoint",
    "reader_at",
    "verify",
    "verifying",
]
