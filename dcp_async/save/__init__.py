"""One save: ranks agree on a plan, parts flow to the storage, one commit publishes them."""

from __future__ import annotations

from .commit import CommitOutcome
from .failures import cancelled_error, forget_locals, save_error
from .pipeline import SavePipeline
from .replica_check import Mode, ReplicaCheck
from .request import Cancellation, SaveRequest
from .services import Carryover, SaveServices

__all__ = [
    "Cancellation",
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
