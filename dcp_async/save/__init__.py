"""One save: ranks agree on a plan, parts flow to the storage, one commit publishes them."""

from __future__ import annotations

from .commit import CommitOutcome
from .failures import Preparing, Subject, cancelled_error, forget_locals, save_error
from .pipeline import SavePipeline
from .preparation import Preparation
from .replica_check import Mode, ReplicaCheck
from .request import Cancellation, SaveRequest
from .services import Carryover, SaveServices

__all__ = [
    "Cancellation",
    "Carryover",
    "CommitOutcome",
    "Mode",
    "Preparation",
    "Preparing",
    "ReplicaCheck",
    "SavePipeline",
    "SaveRequest",
    "SaveServices",
    "Subject",
    "cancelled_error",
    "forget_locals",
    "save_error",
]
