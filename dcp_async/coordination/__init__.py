"""Every rank sends, one decides, all hear: keyed messages on the process group's store, no collectives."""

from __future__ import annotations

from .coordinator import Coordination, Coordinator, make_coordinator
from .failures import PhaseFailure, RemoteError, RemoteFailure, name_ranks
from .messages import SyncCalled

__all__ = [
    "Coordination",
    "Coordinator",
    "PhaseFailure",
    "RemoteError",
    "RemoteFailure",
    "SyncCalled",
    "make_coordinator",
    "name_ranks",
]
