"""CheckpointEngine for trainers without an event loop: the verbs of the async one, blocking.

Enters and leaves: what dcp_async.engine takes and gives. Invariant: no logic of its own; each method waits,
in the caller's thread, for the verb that its asynchronous twin awaits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from .._concurrency import Verb, drive_blocking
from ..engine import STREAM_BYTES, After, Attachable, CheckpointVerbs, EngineVerbs, reader_at, verifying
from ..info import JSON, CheckpointInfo, CheckpointRef, LoadReport, VerifyReport
from ..load import Index
from ..options import Dtypes, Limits, Timeouts
from ..response import AsyncSaveResponse
from ..trust import Trust

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
        self._run("close", self._leaving(exc_type))

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        checkpoint_id: str | None = None,
        notes: Mapping[str, JSON] | None = None,
        files: Attachable | None = None,
        replace: bool = False,
    ) -> AsyncSaveResponse:
        """Save ``state`` as it is now; the upload goes on by itself. An interrupt while it waits cancels the
        save."""
        verb = self._saves.saving(state, step, checkpoint_id, notes, replace, files=files)
        return self._run("save", verb)

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
        dequantize: torch.dtype | None = None,
    ) -> LoadReport:
        """Fill ``state`` from a checkpoint, verified."""
        verb = self._loads.loading(
            state,
            source,
            keys=keys,
            rename=rename,
            strict=strict,
            atomic=atomic,
            dtypes=dtypes,
            dequantize=dequantize,
        )
        return self._run("load", verb)

    def read(
        self,
        source: CheckpointRef = "latest",
        *,
        keys: str | Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        dequantize: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """A checkpoint as fresh tensors and leaves, in exactly the structure that was saved."""
        return self._run("read", self._reads.reading(source, keys, device, dequantize))

    def verify(self, source: CheckpointRef = "latest") -> VerifyReport:
        """Read all of a checkpoint and tell what of it is damaged."""
        return self._run("verify", self._reads.verifying(source))

    def remove(self, source: CheckpointRef, *, after: After = None) -> None:
        """Remove a checkpoint, once the newer one that ``after`` stands for is durable."""
        self._run("remove", self._removals.removing(source, after))

    def checkpoint(
        self, source: CheckpointRef = "latest", *, dequantize: torch.dtype | None = None
    ) -> Checkpoint:
        """One checkpoint to read and load from any number of times, on one opening and one choice."""
        return Checkpoint(self._life, source, owns_life=False, dequantize=dequantize)

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
        self._run("close", self._closing())

    def abort(self) -> None:
        """Cancel the saves in flight, leave nothing of them behind, release what the engine made."""
        self._run("abort", self._aborting())


class Checkpoint(CheckpointVerbs):
    """One opened checkpoint: ``with engine.checkpoint(source) as checkpoint``, or
    ``with open_checkpoint(path) as checkpoint``. See ``dcp_async.Checkpoint``."""

    def __repr__(self) -> str:
        return f"<sync {super().__repr__()}>"

    def _run(self, name: str, verb: Verb[T]) -> T:
        return drive_blocking(name, verb, self._life.inside)

    def open(self) -> Self:
        """Choose the checkpoint, open all its files and check everything but the payload."""
        self._run("open", self._opening())
        return self

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._run("close", self._closing(exc_type))

    def close(self) -> None:
        """No verb begins any more, and the files close with the last read that is under way."""
        self._run("close", self._closing())

    def read(
        self, keys: str | Sequence[str] | None = None, *, device: torch.device | str = "cpu"
    ) -> dict[str, Any]:
        """All of it, or what lies at and below ``keys``, as fresh tensors and leaves."""
        return self._run("read", self._reads.reading(self.info, keys, device))

    def tensor(self, name: str, index: Index = ..., *, device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor, or what ``index`` means of it; no more is read than that."""
        return self._run("tensor", self._reads.reading_tensor(name, index, device))

    def file(self, name: str) -> bytes:
        """The bytes of a file that was attached with ``save(files=...)``, verified."""
        return self._run("file", self._reads.reading_file(name))

    def stream(
        self,
        keys: str | Sequence[str] | None = None,
        *,
        budget_bytes: int = STREAM_BYTES,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """The tensors at and below ``keys``, one after another, while the next ones are read."""
        stream = self._reads.streaming(keys, budget_bytes, device)
        try:
            while (following := self._run("stream", stream.following())) is not None:
                yield following
                del following  # else it would live on while the next one is read
        finally:
            self._run("stream", stream.ending())

    def load(
        self,
        state: Mapping[str, Any],
        *,
        keys: str | Sequence[str] | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        strict: bool = True,
        atomic: bool = False,
        dtypes: Dtypes = "exact",
    ) -> LoadReport:
        """Fill ``state``, or the part of it that is there by now, from this checkpoint."""
        return self._run("load", self._loading(state, keys, rename, strict, atomic, dtypes))


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    dequantize: torch.dtype | None = None,
    trust: Trust = Trust(),
    limits: Limits = Limits(),
    timeouts: Timeouts = Timeouts(),
) -> Checkpoint:
    """The checkpoint in the directory ``path``, without an engine, a model or a process group."""
    life, name = reader_at(path, trust=trust, limits=limits, timeouts=timeouts)
    return Checkpoint(life, name, owns_life=True, dequantize=dequantize)


def verify(
    path: str | os.PathLike[str],
    *,
    trust: Trust = Trust(),
    limits: Limits = Limits(),
    timeouts: Timeouts = Timeouts(),
) -> VerifyReport:
    """Read all of the checkpoint in the directory ``path`` and tell what of it is damaged."""
    life, name = reader_at(path, trust=trust, limits=limits, timeouts=timeouts)
    return drive_blocking("verify", verifying(life, name), life.inside)
