"""One load: names are matched, ranges read and verified, and their bytes placed where they belong."""

from __future__ import annotations

from .device_writes import DeviceWrites
from .fresh_reads import (
    batches,
    check_index,
    fill_box,
    read_box,
    read_fresh,
    read_names,
    read_outline,
    tensor_names,
)
from .indexing import Index
from .operations import Loaded, LoadOptions, load_into
from .pipeline import LoadServices
from .planned import read_planned
from .planned_load import PlannedLoad
from .rank_agreement import Agreement, Attempt, Together
from .selection import Rename, Selection
from .spans import host_memory

__all__ = [
    "Agreement",
    "Attempt",
    "DeviceWrites",
    "Index",
    "LoadOptions",
    "LoadServices",
    "Loaded",
    "PlannedLoad",
    "Rename",
    "Selection",
    "Together",
    "batches",
    "check_index",
    "fill_box",
    "host_memory",
    "load_into",
    "read_box",
    "read_fresh",
    "read_names",
    "read_outline",
    "read_planned",
    "tensor_names",
]
