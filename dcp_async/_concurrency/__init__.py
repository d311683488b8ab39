"""The loop thread, threads for blocking calls, bounded pipes, and verbs as generators."""

from __future__ import annotations

from .flow import Pipe, first_failure, for_each, run_unless
from .gc_pause import collection_paused
from .loop_thread import Job, LoopThread
from .signal_safe import SignalSafeFuture
from .threads import BlockingThreads, StuckThreadError, on_work_thread, run_blocking, settle
from .verbs import Inside, Verb, drive, drive_blocking, run_coroutine
from .waiting import Wait, cancellation_point

__all__ = [
    "BlockingThreads",
    "Inside",
    "Job",
    "LoopThread",
    "Pipe",
    "SignalSafeFuture",
    "StuckThreadError",
    "Verb",
    "Wait",
    "cancellation_point",
    "collection_paused",
    "drive",
    "drive_blocking",
    "first_failure",
    "for_each",
    "on_work_thread",
    "run_blocking",
    "run_coroutine",
    "run_unless",
    "settle",
]
