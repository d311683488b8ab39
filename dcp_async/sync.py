"""The same engine for trainers without an event loop: the same verbs, blocking.

Enters and leaves: what dcp_async.engine takes and gives. Invariant: no logic of its own; each method waits,
in the caller's thread, for the verb that its asynchronous twin awaits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from . import engine
from ._concurrency import Verb, drive_blocking
from .coordination import Coordination
from .events import Observer
from .info import JSON, CheckpointInfo, CheckpointRef, LoadReport
from .options import Dtypes, Limits, Timeouts
from .planning import PlanningOptions
from .response import AsyncSaveResponse
from .staging import Stager, StagingOptions
from .storage import Storage
from .trust import Trust

T = TypeVar("T")


class CheckpointEngine:
    """``with CheckpointEngine(root) as engine``: see ``dcp_async.CheckpointEngine``, whose arguments it
    takes.

    Handles of a response are waited for with ``.result(timeout)``.
    """

    def __init__(
        self,
        root: Storage | str | os.PathLike[str],
        *,
        staging: Stager | StagingOptions = StagingOptions(),
        planning: PlanningOptions = PlanningOptions(),
        coordination: Coordination = Coordination(),
        limits: Limits = Limits(),
        timeouts: Timeouts = Timeouts(),
        trust: Trust = Trust(),
        observer: Observer | None = None,
    ) -> None:
        self._engine = engine.CheckpointEngine(
            root,
            staging=staging,
            planning=planning,
            coordination=coordination,
            limits=limits,
            timeouts=timeouts,
            trust=trust,
            observer=observer,
        )

    def __repr__(self) -> str:
        return f"<sync {self._engine!r}>"

    def _run(self, name: str, verb: Verb[T]) -> T:
        return drive_blocking(name, verb, self._engine._life.inside)

    def open(self) -> Self:
        """Start the engine's threads and look at what the root holds."""
        self._run("open", self._engine._opening())
        return self

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._run("close", self._engine._life.leaving(exc_type))

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        checkpoint_id: str | None = None,
        notes: Mapping[str, JSON] | None = None,
        replace: bool = False,
    ) -> AsyncSaveResponse:
        """Save ``state`` as it is now; the upload goes on by itself. An interrupt while it waits cancels the
        save."""
        return self._run("save", self._engine._saving(state, step, checkpoint_id, notes, replace))

    def load(
        self,
        state: Mapping[str, Any],
        source: CheckpointRef = "latest",
        *,
        strict: bool = True,
        atomic: bool = False,
        dtypes: Dtypes = "exact",
    ) -> LoadReport:
        """Fill ``state`` from a checkpoint, verified."""
        return self._run("load", self._engine._loading(state, source, strict, atomic, dtypes))

    def read(
        self,
        source: CheckpointRef = "latest",
        *,
        keys: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, Any]:
        """A checkpoint as fresh tensors and leaves, in exactly the structure that was saved."""
        return self._run("read", self._engine._reading(source, keys, device))

    def latest(self) -> CheckpointInfo | None:
        """The newest whole checkpoint, None if there is none."""
        return self._run("latest", self._engine._finding_latest())

    def checkpoints(self) -> Iterator[CheckpointInfo]:
        """Committed, whole checkpoints, ascending."""
        for name in self._run("checkpoints", self._engine._listing()):
            info = self._run("checkpoints", self._engine._describing(name))
            if info is not None:
                yield info

    @property
    def pending(self) -> tuple[AsyncSaveResponse, ...]:
        """Saves in flight, oldest first."""
        return self._engine.pending

    def wait(self) -> None:
        """Wait until no save is in flight. Raises the SaveError of a save whose failure nobody has looked
        at."""
        self._run("wait", self._engine._life.waiting())

    def close(self) -> None:
        """Wait for the saves in flight, then release what the engine made."""
        self._run("close", self._engine._life.closing())

    def abort(self) -> None:
        """Cancel the saves in flight, leave nothing of them behind, release what the engine made."""
        self._run("abort", self._engine._life.aborting())
