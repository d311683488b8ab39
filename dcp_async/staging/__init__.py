"""From live tensors to leased slots of host memory; owns the pool, the copying thread and the devices."""

from __future__ import annotations

from .bounce import Bounce
from .buffer_pool import BufferPool, Lease
from .device import CaptureInProgressError, Event, Stream
from .job import Run, StageJob
from .mutation_watch import MutatedTensors
from .prepared import Prepared
from .selection import Selection
from .side_buffer import Piece, SideBuffer
from .stager import Stager, StagingOptions, num_parts, parts_between

__all__ = [
    "Bounce",
    "BufferPool",
    "CaptureInProgressError",
    "Event",
    "Lease",
    "MutatedTensors",
    "Piece",
    "Prepared",
    "Run",
    "Selection",
    "SideBuffer",
    "StageJob",
    "Stager",
    "StagingOptions",
    "Stream",
    "num_parts",
    "parts_between",
]
