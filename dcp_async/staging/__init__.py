"""From live tensors to leased slots of host memory; owns the pool, the copying thread and the devices."""

from __future__ import annotations

from .device import CaptureInProgressError, Event, Stream
from .job import Run, StageJob
from .memory import Bounce, BufferPool, Lease
from .prepared import Prepared
from .selection import Selection
from .side_buffer import Piece, SideBuffer
from .stager import Stager, StagingOptions, num_parts, parts_between
from .watch import MutatedTensors

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
