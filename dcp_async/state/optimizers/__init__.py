"""Optimizers: their states by canonical names, saved, and given back exactly."""

from __future__ import annotations

from .app_state import AppState, check_before_touch, restore_app, snapshot_of_app
from .optimizer_load import is_custom, load_optimizer
from .optimizer_state import parameter_sizes
from .stepping import stepped_by

__all__ = [
    "AppState",
    "check_before_touch",
    "is_custom",
    "load_optimizer",
    "parameter_sizes",
    "restore_app",
    "snapshot_of_app",
    "stepped_by",
]
