"""The blocking twins of the engine and of DCP's functions: ``import dcp_async.sync as dcp``."""

from __future__ import annotations

from typing import Any

import torch.distributed.checkpoint as _stock

from .conversions import dcp_to_torch_save, torch_save_to_dcp
from .engine import Checkpoint, CheckpointEngine, open_checkpoint, verify
from .functional import Checkpointer, async_save, load, load_state_dict, save, save_state_dict

__all__ = [
    "Checkpoint",
    "CheckpointEngine",
    "Checkpointer",
    "async_save",
    "dcp_to_torch_save",
    "load",
    "load_state_dict",
    "open_checkpoint",
    "save",
    "save_state_dict",
    "torch_save_to_dcp",
    "verify",
]


def __getattr__(name: str) -> Any:
    # planners, writers, readers, submodules: a script that has changed its import goes on with stock's
    if name.startswith("_") or not hasattr(_stock, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_stock, name)
