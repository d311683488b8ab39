"""CheckpointEngine for trainers without an event loop: the verbs of the async one, blocking.

Enters and leaves: what dcp_async.engine takes and gives. Invariant: no logic of its own; each method waits,
in the caller's thread, for the verb that its asynchronous twin awaits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from ._concurrency import Verb, drive_blocking
from .engine import EngineVerbs
from .info import JSON, CheckpointInfo, CheckpointRef, LoadReport
from .options import Dtypes
from .response import AsyncSaveResponse

__all__ = ["CheckpointEngine"]

T = TypeVar("T")


class CheckpointEngine(EngineVerbs):
    """``with CheckpointEngine(root) as engine``: see ``dcp_async.CheckpointEngine``, whose arguments it
    takes.

    Handles of a response are waited for with ``.result(timeout)``.
    """

    def __repr__(self) -> str:
        return f"<sync {super().__repr__()}>"

    def _run(self, name: str, verb: Verb[T]) -> T:
        return drive_blocking(name, verb, self._life.inside)

    def open(self) -> Self:
        """Start the engine's threads and look at what the root holds."""
        self._run("open", self._opening())
        return self

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._run("close", self._life.leaving(exc_type))

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
        return self._run("save", self._saves.saving(state, step, checkpoint_id, notes, replace))

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Do ahead of time what the first save of ``state`` would do while training waits; writes nothing."""
        self._run("prepare", self._saves.preparing(state))

    def load(
        self,
        state: Mapping[str, Any],
        source: CheckpointRef = "latest",
        *,
        keys: str | Sequence[str] | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        strict: bool = True,
        atomic: bool = False,
        dtypes: Dtypes = "exact",
    ) -> LoadReport:
        """Fill ``state`` from a checkpoint, verified."""
        verb = self._loads.loading(
            state, source, keys=keys, rename=rename, strict=strict, atomic=atomic, dtypes=dtypes
        )
        return self._run("load", verb)

    def read(
        self,
        source: CheckpointRef = "latest",
        *,
        keys: str | Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, Any]:
        """A checkpoint as fresh tensors and leaves, in exactly the structure that was saved."""
        return self._run("read", self._loads.reading(source, keys, device))

    def latest(self) -> CheckpointInfo | None:
        """The newest whole checkpoint, None if there is none."""
        return self._run("latest", self._loads.finding_latest())

    def checkpoints(self) -> Iterator[CheckpointInfo]:
        """Committed, whole checkpoints, ascending."""
        for name in self._run("checkpoints", self._loads.listing()):
            info = self._run("checkpoints", self._loads.describing(name))
            if info is not None:
                yield info

    def wait(self) -> None:
        """Wait until no save is in flight. Raises the SaveError of a save whose failure nobody has looked
        at."""
        self._run("wait", self._life.waiting())

    def close(self) -> None:
        """Wait for the saves in flight, then release what the engine made."""
        self._run("close", self._life.closing())

    def abort(self) -> None:
        """Cancel the saves in flight, leave nothing of them behind, release what the engine made."""
        self._run("abort", self._life.aborting())
