"""From live tensors to leased slots of host memory; owns the pool, the copying thread and the devices."""

from __future__ import annotations

from .buffer_pool import Lease
from .device import Event
from .side_buffer import Piece, Places, SideBuffer, refuse_changed
from .stager import MutatedTensors, StageJob, Stager, StagingOptions, num_parts, parts_between

__all__ = [
    "Event",
    "Lease",
    "MutatedTensors",
    "Piece",
    "Places",
    "SideBuffer",
    "StageJob",
    "Stager",
    "StagingOptions",
    "num_parts",
    "parts_between",
    "refuse_changed",
]
