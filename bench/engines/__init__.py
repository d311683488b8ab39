"""Who is measured: the engines' names, what a run must know of each, and how each is called.

Importing this imports no engine and no torch: `make` imports the one that a process measures, and reports are
made where neither is installed.
"""

from __future__ import annotations

from .adapter import Engine, Pending
from .factory import make
from .files import drop_cache, sync, warm_cache
from .roster import (
    CORE,
    ENGINES,
    ON_DEVICES,
    OTHERS,
    OURS,
    PREPARED,
    RAW,
    STOCK,
    TRAINER_CORE,
    TRAINER_OTHERS,
    groups_that_fit,
    memory_needed,
)

__all__ = [
    "CORE",
    "ENGINES",
    "ON_DEVICES",
    "OTHERS",
    "OURS",
    "PREPARED",
    "RAW",
    "STOCK",
    "TRAINER_CORE",
    "TRAINER_OTHERS",
    "Engine",
    "Pending",
    "drop_cache",
    "groups_that_fit",
    "make",
    "memory_needed",
    "sync",
    "warm_cache",
]
