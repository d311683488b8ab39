"""When to save: policies, the step that all ranks save at, and the signals that ask for one."""

from __future__ import annotations

from .policies import Adaptive, Every, OnSignal, SaveCost, SavePolicy
from .preemption import Preemption
from .schedule import SaveSchedule

__all__ = [
    "Adaptive",
    "Every",
    "OnSignal",
    "Preemption",
    "SaveCost",
    "SavePolicy",
    "SaveSchedule",
]
