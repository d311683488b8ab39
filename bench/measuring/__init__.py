"""How a sample is taken: states, processes, clocks, and the machine they run on.

Importing this imports no torch: what needs it runs in the processes that `Child` and `run_ranks` start, or
is in `bench.measuring.planning`.
"""

from __future__ import annotations

from .machine import file_system, machine_facts, memory_available
from .processes import (
    ROOT,
    WRONG_BITS,
    Child,
    Group,
    WorkerError,
    progress,
    run_ranks,
    running,
    short_reason,
)
from .sizes import STATE_BYTES

__all__ = [
    "ROOT",
    "STATE_BYTES",
    "WRONG_BITS",
    "Child",
    "Group",
    "WorkerError",
    "file_system",
    "machine_facts",
    "memory_available",
    "progress",
    "run_ranks",
    "running",
    "short_reason",
]
