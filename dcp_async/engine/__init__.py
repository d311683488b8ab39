"""Admits verbs, runs them and ends them; alone knows saves, loads and an engine's lifetime together."""

from __future__ import annotations

from .engine import CheckpointEngine
from .verbs import EngineVerbs

__all__ = [
    "CheckpointEngine",
    "EngineVerbs",
]
