"""One save: ranks agree on a plan, parts flow to the storage, one commit publishes them."""

from __future__ import annotations

from .failures import cancelled_error, forget_locals, save_error
from .pipeline import CommitOutcome, SavePipeline, SaveRequest
from .replica_check import Mode, ReplicaCheck
from .services import Carryover, SaveServices

__all__ = [
    "Carryover",
    "CommitOutcome",
    "Mode",
    "ReplicaCheck",
    "SavePipeline",
    "SaveRequest",
    "SaveServices",
    "cancelled_error",
    "forget_locals",
    "save_error",
]
