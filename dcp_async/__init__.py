"""Checkpoints for PyTorch that never get in the way of training: torch.distributed.checkpoint, asyncio-first.

The path of a tensor:

    save   capture() -> plan -> stage -> write -> digest -> commit
    load   plan -> read -> place -> restore()

    async with CheckpointEngine("checkpoints/run1") as engine:
        await engine.save({"model": model, "optim": optim}, step=step)    # safe to mutate from here; upload
        goes on

Files are DCP's: stock ``torch.distributed.checkpoint.load`` reads them, and this package reads stock's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazily

if TYPE_CHECKING:
    from .catalog import KeepBest, KeepEvery, KeepLatest, Retention, RetentionPlan, plan_retention
    from .coordination import Coordination
    from .engine import Checkpoint, CheckpointEngine, open_checkpoint, verify
    from .errors import (
        CheckpointError,
        CheckpointExistsError,
        CheckpointNotFoundError,
        CorruptCheckpointError,
        EngineStateError,
        IncompatibleStateError,
        LoadError,
        PreemptionError,
        ReplicationError,
        SaveCancelled,
        SaveError,
        StateMutatedError,
        StorageError,
        UntrustedCheckpointError,
    )
    from .events import Event, Observer, SaveCommitted, SaveFailed, SaveProgress, SaveStaged, SaveStarted
    from .info import JSON, CheckpointInfo, CheckpointRef, DamagedRange, LoadReport, VerifyReport
    from .options import Dtypes, Limits, Timeouts
    from .planning import PlanningOptions
    from .response import AsyncSaveResponse, CheckpointHandle
    from .schedule import Adaptive, Every, OnSignal, Preemption, SaveCost, SavePolicy
    from .staging import Stager, StagingOptions
    from .state import AppState, FromRank, PerRank, RNGState
    from .trust import Trust
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "catalog": "KeepBest KeepEvery KeepLatest Retention RetentionPlan plan_retention",
            "coordination": "Coordination",
            "engine": "Checkpoint CheckpointEngine open_checkpoint verify",
            "errors": (
                "CheckpointError CheckpointExistsError CheckpointNotFoundError CorruptCheckpointError "
                "EngineStateError IncompatibleStateError LoadError PreemptionError ReplicationError "
                "SaveCancelled SaveError StateMutatedError StorageError UntrustedCheckpointError"
            ),
            "events": "Event Observer SaveCommitted SaveFailed SaveProgress SaveStaged SaveStarted",
            "info": "JSON CheckpointInfo CheckpointRef DamagedRange LoadReport VerifyReport",
            "options": "Dtypes Limits Timeouts",
            "planning": "PlanningOptions",
            "response": "AsyncSaveResponse CheckpointHandle",
            "schedule": "Adaptive Every OnSignal Preemption SaveCost SavePolicy",
            "staging": "Stager StagingOptions",
            "state": "AppState FromRank PerRank RNGState",
            "trust": "Trust",
            "formats": "",
            "storage": "",
        },
    )

__version__ = "0.1.0.dev0"

__all__ = [
    "JSON",
    "Adaptive",
    "AppState",
    "AsyncSaveResponse",
    "Checkpoint",
    "CheckpointEngine",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointHandle",
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "CheckpointRef",
    "Coordination",
    "CorruptCheckpointError",
    "DamagedRange",
    "Dtypes",
    "EngineStateError",
    "Event",
    "Every",
    "FromRank",
    "IncompatibleStateError",
    "KeepBest",
    "KeepEvery",
    "KeepLatest",
    "Limits",
    "LoadError",
    "LoadReport",
    "Observer",
    "OnSignal",
    "PerRank",
    "PlanningOptions",
    "Preemption",
    "PreemptionError",
    "RNGState",
    "ReplicationError",
    "Retention",
    "RetentionPlan",
    "SaveCancelled",
    "SaveCommitted",
    "SaveCost",
    "SaveError",
    "SaveFailed",
    "SavePolicy",
    "SaveProgress",
    "SaveStaged",
    "SaveStarted",
    "Stager",
    "StagingOptions",
    "StateMutatedError",
    "StorageError",
    "Timeouts",
    "Trust",
    "UntrustedCheckpointError",
    "VerifyReport",
    "open_checkpoint",
    "plan_retention",
    "verify",
]
