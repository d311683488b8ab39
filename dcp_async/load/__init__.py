"""One load: names are matched, ranges read and verified, and their bytes placed where they belong."""

from __future__ import annotations

from .device_writes import DeviceWrites
from .operations import Loaded, LoadOptions, load_into, read_fresh
from .pipeline import LoadServices
from .planned import read_planned
from .rank_agreement import Agreement, Attempt, Together
from .selection import Rename, Selection

__all__ = [
    "Agreement",
    "Attempt",
    "DeviceWrites",
    "LoadOptions",
    "LoadServices",
    "Loaded",
    "Rename",
    "Selection",
    "Together",
    "load_into",
    "read_fresh",
    "read_planned",
]
