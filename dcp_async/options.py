"""How much an engine does at once and how long it waits, and what a load makes of dtypes.

Other options live beside what they steer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much goes on at once."""

    pending_saves: int = 1
    """Uploads in flight; a further ``save()`` waits for the oldest. Each costs a state's memory, unless a
    budget says less."""
    io_concurrency: int = 2
    """Reads or writes in flight per save or load. Two keep a disk busy; more only fill its queue."""

    def __post_init__(self) -> None:
        for name in ("pending_saves", "io_concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"Limits({name}=...) is at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long to wait, in seconds."""

    coordination: float = 300.0
    """For a rank, or on NFS for a lease, that shows no sign of life."""
    storage: float = 600.0
    """For one call to the storage; then the save fails and the thread is replaced."""
    exit_grace: float = 20.0
    """For uploads in flight when the process wants to end."""

    def __post_init__(self) -> None:
        for name in ("coordination", "storage", "exit_grace"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Timeouts({name}=...) is more than 0, not {getattr(self, name)}")


Dtypes = Literal["exact", "convert"]
"""Whether a load puts a tensor into one of another dtype."""
