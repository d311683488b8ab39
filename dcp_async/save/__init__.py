"""One save: ranks agree on a plan, parts flow to the storage, one commit publishes them."""

from __future__ import annotations

from .attachments import Attachment, read_attachments
from .commit import CommitOutcome
from .failures import Preparing, Subject, cancelled_error, forget_locals, save_error, tell_others
from .file_writer import FileNames
from .items_pipeline import write_items
from .pipeline import SavePipeline
from .preparation import Preparation
from .public_files import File
from .publishing import make_release
from .replica_check import Mode, ReplicaCheck
from .request import Cancellation, SaveRequest
from .resolved_items import ResolvedItems, is_raw
from .services import Carryover, SaveServices

__all__ = [
    "Attachment",
    "Cancellation",
    "Carryover",
    "CommitOutcome",
    "File",
    "FileNames",
    "Mode",
    "Preparation",
    "Preparing",
    "ReplicaCheck",
    "ResolvedItems",
    "SavePipeline",
    "SaveRequest",
    "SaveServices",
    "Subject",
    "cancelled_error",
    "forget_locals",
    "is_raw",
    "make_release",
    "read_attachments",
    "save_error",
    "tell_others",
    "write_items",
]
