"""Checkpoint: one checkpoint, chosen and opened once, to read and load from as often as wanted.

Enters: an engine and what names a checkpoint, or a path alone. Leaves: what the checkpoint holds, whole
or in part, verified. Invariant: all that is read through one opening is of one state of one checkpoint,
whatever replaces or removes it meanwhile. The verbs are in loads.py and reads.py; dcp_async.sync has the
blocking twin.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import Verb, Wait, drive
from ..catalog import Opened
from ..coordination import Coordination
from ..errors import CheckpointNotFoundError, EngineStateError
from ..formats import DISTCP, leaf_names, plain_dtype
from ..info import CheckpointInfo, CheckpointRef, LoadReport
from ..load import Index
from ..options import Dtypes, Limits, Timeouts
from ..planning import PlanningOptions
from ..staging import StagingOptions
from ..storage import root_and_name
from ..trust import Trust
from .lifetime import Lifetime
from .load_context import LoadContext
from .loads import Loads
from .reads import Reads
from .resources import make_setup

T = TypeVar("T")

STREAM_BYTES = 64 << 20
"""What a stream may hold in memory unless it is told otherwise."""


def reader_at(
    path: str | os.PathLike[str], *, trust: Trust, limits: Limits, timeouts: Timeouts
) -> tuple[Lifetime, str]:
    """Threads of its own to read what lies beside ``path``, a checkpoint's directory, and its name there."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"a checkpoint is opened by the path of its directory, not by {path!r}")
    root, name = root_and_name(path)
    setup = make_setup(
        root,
        StagingOptions(),
        planning=PlanningOptions(),
        # that of saves, of which a reader makes none: what is read tells its own
        format=DISTCP,
        # whatever process group there is, the other ranks know nothing of this opening
        coordination=Coordination(mode="local"),
        limits=limits,
        timeouts=timeouts,
        trust=trust,
        observer=None,
        is_reader=True,
    )
    return Lifetime(setup), name


async def let_go(life: Lifetime, opened: Opened) -> None:
    """Close ``opened``, or have its last reader close it."""
    life.opened.discard(opened)
    await opened.close()


class CheckpointVerbs:
    """Base of both twins. Owns what it opened, and its Lifetime if it was made with one of its own."""

    def __init__(
        self,
        life: Lifetime,
        source: CheckpointRef,
        *,
        owns_life: bool,
        dequantize: torch.dtype | None = None,
    ) -> None:
        self._dequantize = plain_dtype(dequantize)
        self._life = life
        self._source = source
        self._owns_life = owns_life
        self._opened: Opened | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "new" if self._opened is None else "open"
        name = self._source if self._opened is None else self.info.checkpoint_id
        return f"<Checkpoint {name!r} in {self._life.setup.storage!r} {state}>"

    def __del__(self) -> None:
        # not by attribute: a constructor that raised has set none of them
        opened, life = self.__dict__.get("_opened"), self.__dict__.get("_life")
        if life is None or opened is None or self._is_closed or sys.is_finalizing():
            return
        if self._owns_life:
            life.dropped(repr(self))
        # an engine that was closed has closed its checkpoints
        elif life.state == "open":
            warnings.warn(
                f"{self!r} was dropped while it was open; use `with`, or close()",
                ResourceWarning,
                stacklevel=2,
            )
            life.resources.loop.submit(let_go(life, opened))

    def _opening(self) -> Verb[None]:
        if self._opened is not None or self._is_closed:
            raise EngineStateError("this checkpoint was opened before; make a new one to open it again")
        if self._owns_life:
            with self._life.storage_errors("open"):
                yield from self._life.opening()

        def keep(opened: Opened) -> None:
            self._opened = opened

        try:
            loads = Loads(LoadContext(self._life))
            yield from loads.opening(self._source, keep, is_name=self._owns_life, dequantize=self._dequantize)
        except CheckpointNotFoundError as error:
            yield from self._closing(type(error))
            if not self._owns_life:
                raise
            # by its path, since that is all that was given
            raise CheckpointNotFoundError(
                f"there is no checkpoint {self._source!r} in {self._life.setup.storage!r}; give the "
                "directory of one checkpoint, which has a .metadata, not that of a run",
                checkpoint_id=error.checkpoint_id,
            ) from error
        except BaseException as error:
            yield from self._closing(type(error))
            raise

    def _closing(self, exc_type: type[BaseException] | None = None) -> Verb[None]:
        # before anything is waited for: no verb may begin on files that are about to close
        opened, self._is_closed = self._opened, True
        if self._owns_life:
            yield from self._life.leaving(exc_type)
        elif opened is not None and self._life.state == "open":
            # shielded: who has closed a checkpoint may remove its files, also in a scope that was cancelled
            yield Wait(self._life.submit(let_go(self._life, opened)).future, shielded=True)

    def _in_use(self) -> Opened:
        if self._is_closed:
            raise EngineStateError("this checkpoint is closed; make a new one to read more of it")
        return self._known()

    def _known(self) -> Opened:
        """What was opened, which tells what it holds after its files were closed as well."""
        if self._opened is None:
            raise EngineStateError("this checkpoint is not open: use `with`, or open()")
        return self._opened

    @property
    def _loads(self) -> Loads:
        return Loads(LoadContext(self._life, self._in_use()))

    @property
    def _reads(self) -> Reads:
        return Reads(LoadContext(self._life, self._in_use()))

    def _loading(
        self,
        state: Mapping[str, Any],
        keys: str | Sequence[str] | None,
        rename: Mapping[str, str] | Callable[[str], str] | None,
        strict: bool,
        atomic: bool,
        dtypes: Dtypes,
    ) -> Verb[LoadReport]:
        return self._loads.loading(
            state, self.info, keys=keys, rename=rename, strict=strict, atomic=atomic, dtypes=dtypes
        )

    @property
    def info(self) -> CheckpointInfo:
        """What it is: name, step, time, notes."""
        return self._known().contents.info

    @property
    def metadata(self) -> Metadata:
        """DCP's ``Metadata`` of it: names, shapes, dtypes, chunks. Not to be changed."""
        return self._known().contents.metadata

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its tensors and leaves, in the order of the state that was saved."""
        return tuple(leaf_names(self._known().contents.structure))

    @property
    def files(self) -> Mapping[str, int]:
        """What was attached with ``save(files=...)``: name -> length in bytes."""
        return self.info.files


class Checkpoint(CheckpointVerbs):
    """One opened checkpoint: ``async with engine.checkpoint(source) as checkpoint``, or
    ``async with open_checkpoint(path) as checkpoint``.

    Which one it is was decided when it was opened, and its files stay readable until it is closed, though it
    be replaced or removed meanwhile. It may be used from several loops, tasks and threads.
    """

    async def _run(self, name: str, verb: Verb[T]) -> T:
        return await drive(name, verb, self._life.inside)

    async def open(self) -> Self:
        """Choose the checkpoint, open all its files and check everything but the payload.

        Raises: as ``CheckpointEngine.load`` before it reads; EngineStateError if it was opened before.
        Ranks: all of the engine's must call it, as ``load``; with ``open_checkpoint`` each is by itself.
        """
        await self._run("open", self._opening())
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._run("close", self._closing(exc_type))

    async def close(self) -> None:
        """No verb begins any more, and the files close with the last read that is under way. Closing twice
        does nothing; an engine that closes closes its checkpoints."""
        await self._run("close", self._closing())

    async def read(
        self, keys: str | Sequence[str] | None = None, *, device: torch.device | str = "cpu"
    ) -> dict[str, Any]:
        """All of it, or what lies at and below ``keys``, as fresh tensors and leaves in the structure that
        was saved. See ``CheckpointEngine.read``."""
        return await self._run("read", self._reads.reading(self.info, keys, device))

    async def tensor(
        self, name: str, index: Index = ..., *, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """One tensor, or what ``index`` means of it: ``await checkpoint.tensor("model.w", (slice(0, 8),))``.

        No more is read than that, and the blocks of 64 KiB around it that have checksums; gaps between rows
        that are smaller than a block are read through. Of a tensor that stock wrote, and of one that is more
        than its bytes (sparse, quantized), the chunks that it meets are read whole.

        Args:
            name: a tensor's full name.
            index: whole numbers, slices with steps of at least 1, an ellipsis.
        Raises: LoadError for a name that is no tensor; IndexError, TypeError, ValueError for an index that
            can't be; CorruptCheckpointError, UntrustedCheckpointError.
        """
        return await self._run("tensor", self._reads.reading_tensor(name, index, device))

    async def file(self, name: str) -> bytes:
        """The bytes of a file that was attached with ``save(files=...)``, verified: what was saved, whatever
        has become of the copy that lies in the directory under this name.

        Args:
            name: one of ``files``.
        Raises: LoadError for a name that was not attached; CorruptCheckpointError.
        """
        return await self._run("file", self._reads.reading_file(name))

    async def stream(
        self,
        keys: str | Sequence[str] | None = None,
        *,
        budget_bytes: int = STREAM_BYTES,
        device: torch.device | str = "cpu",
    ) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """The tensors at and below ``keys``, one after another in the order in which they lie in its
        files, while the next ones are read.

        Args:
            keys: names or patterns of names, as for ``read``; leaves that are no tensors are left out.
            budget_bytes: what is in memory at most of tensors that were read ahead, and of what reading them
                takes. A tensor that takes more is read alone. Those that the caller keeps are the caller's.
            device: where they go; the slots that bytes pass through on their way there come on top.
        Raises: LoadError for a key that means no tensor; CorruptCheckpointError, UntrustedCheckpointError.
        Cancellation: waits for the reads in progress.
        """
        stream = self._reads.streaming(keys, budget_bytes, device)
        try:
            while (following := await self._run("stream", stream.following())) is not None:
                yield following
                del following  # else it would live on while the next one is read
        finally:
            # a caller may leave the loop at any tensor, and the next ones are being read by then
            await self._run("stream", stream.ending())

    async def load(
        self,
        state: Mapping[str, Any],
        *,
        keys: str | Sequence[str] | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        strict: bool = True,
        atomic: bool = False,
        dtypes: Dtypes = "exact",
    ) -> LoadReport:
        """Fill ``state``, or the part of it that is there by now, from this checkpoint; any number of times.
        See ``CheckpointEngine.load``.

        Ranks: all of the engine's must call it; with ``open_checkpoint`` each loads by itself.
        """
        return await self._run("load", self._loading(state, keys, rename, strict, atomic, dtypes))


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    dequantize: torch.dtype | None = None,
    trust: Trust = Trust(),
    limits: Limits = Limits(),
    timeouts: Timeouts = Timeouts(),
) -> Checkpoint:
    """The checkpoint in the directory ``path``, ours or stock's, without an engine, a model or a process
    group: ``async with open_checkpoint("checkpoints/run1/step-00000100") as checkpoint``.

    A directory of safetensors files (a model of Hugging Face's, with or without an index, or what torch's
    HuggingFaceStorageWriter wrote) and one such file are opened as well. Nothing of them is unpickled, no
    checksum vouches for them, and their names are flat: ``load(state, rename={"*": "model.*"})``.

    Any other file is taken for one of ``torch.save`` that holds a dict of names. Its pickle is read under
    ``trust`` and its tensors where they lie in it; those that are more than bytes (sparse, quantized) are
    read when it is opened. Its CRC-32s are compared by ``verify`` alone.

    Args:
        path: the checkpoint's own directory, or its URL (``memory://name/step-00000100``), or a
            ``.safetensors`` or ``.pt`` file; of its siblings none is looked at.
        dequantize: the dtype to make plain values in of what a model's files hold quantised in blocks; see
            ``CheckpointEngine.load``.
        trust: which pickled leaves are accepted.
        limits: how many reads go on at once.
        timeouts: how long one of them may take.
    """
    life, name = reader_at(path, trust=trust, limits=limits, timeouts=timeouts)
    return Checkpoint(life, name, owns_life=True, dequantize=dequantize)
