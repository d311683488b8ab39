"""CheckpointEngine: save, load, read, and what the root holds, for trainers with an event loop.

Enters: calls from any loop and any thread. Leaves: responses, reports, errors of the tree in errors.py. The
engine's coroutines run on a loop thread of its own, because a training step blocks the loop that it runs on.
Invariant: a save that raises leaves no checkpoint, and a load that fails its checks leaves the state as it
was. The verbs are in saves.py, loads.py and lifetime.py; dcp_async.sync offers the same ones to trainers
without a loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from .._concurrency import Verb, drive
from ..info import JSON, CheckpointInfo, CheckpointRef, LoadReport, VerifyReport
from ..options import Dtypes
from ..response import AsyncSaveResponse
from .attaching import Attachable
from .checkpoint import Checkpoint
from .removals import After
from .verbs import EngineVerbs

T = TypeVar("T")


class CheckpointEngine(EngineVerbs):
    """Saves and loads checkpoints under one root without getting in the way of training.

    ``async with CheckpointEngine(root) as engine`` opens it and, on leaving, drains: normally and after an
    error completely, after a cancellation for ``exit_grace`` seconds. It may be used from several loops and
    threads.
    """

    async def _run(self, name: str, verb: Verb[T]) -> T:
        return await drive(name, verb, self._life.inside)

    async def open(self) -> Self:
        """Start the engine's threads and look at what the root holds.

        Raises: StorageError for a root that can't be one; EngineStateError if it was opened before, if other
        ranks run, or with a torch that is too new to be read back.
        """
        await self._run("open", self._opening())
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._run("close", self._leaving(exc_type))

    async def wait(self) -> None:
        """Wait until no save is in flight. Raises the SaveError of a save whose failure nobody has looked
        at."""
        await self._run("wait", self._life.waiting())

    async def close(self) -> None:
        """Wait for the saves in flight, then release what the engine made. Closing twice does nothing.

        Raises: the SaveError of a save whose failure nobody has looked at.
        Cancellation: drains for ``exit_grace`` seconds more, then aborts.
        """
        await self._run("close", self._closing())

    async def abort(self) -> None:
        """Cancel the saves in flight, leave nothing of them behind, release what the engine made."""
        await self._run("abort", self._aborting())

    async def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        checkpoint_id: str | None = None,
        notes: Mapping[str, JSON] | None = None,
        files: Attachable | None = None,
        replace: bool = False,
    ) -> AsyncSaveResponse:
        """Save ``state`` as it is now; when this returns, the state may be mutated and the upload goes on by
        itself.

        With ``StagingOptions(overlap=True)`` it returns once the state is captured; then wait for
        ``response.staging_completion`` before mutating it, or have the optimizer in the state.

        Args:
            state: names -> Statefuls, tensors, containers of them, or picklable leaves.
            step: its step; without one (and without a ``checkpoint_id``), 1 + the highest step so far.
            checkpoint_id: its name, by default ``step-00000100``.
            notes: JSON to keep with it.
            files: small files to keep with it: name -> bytes, or the path to read them from, before this
                returns. They are committed with it, checksummed, and lie in its directory under their names
                for other programs. At most 64 MiB in all.
            replace: whether an existing checkpoint of this name may be replaced; it stays readable until the
                new one is durable.
        Raises: SaveError (CheckpointExistsError, StateMutatedError), and then no checkpoint of this name will
            appear; EngineStateError; ValueError for a name, step, notes or files that can't be.
        Cancellation: cancels the save.
        Ranks: all must call it, in the same order. ``files`` of one rank or of several are kept; under one
            name all that have it must have the same bytes.
        """
        verb = self._saves.saving(state, step, checkpoint_id, notes, replace, files=files)
        return await self._run("save", verb)

    async def prepare(self, state: Mapping[str, Any]) -> None:
        """Do ahead of time what the first save of ``state`` would do while training waits: plan, make the
        memory that staging needs, pin it if ``state`` lies on an accelerator. Writes nothing.

        A convenience for the start of a run: without it the first save takes longer, and nothing else. It may
        be called again when the state has grown; saves in flight go on beside it. Its bytes are copied once
        and dropped, so the state must not change before this has returned.

        Args:
            state: what ``save`` will be given; each ``state_dict()`` is called once.
        Raises: SaveError, as ``save`` does before it writes, with ``checkpoint_id`` "prepare()";
            EngineStateError. Memory that can't be pinned is no error: it is logged, and saves work.
        Cancellation: ends it; what was made by then stays for the saves to come.
        Ranks: all must call it, in the same order as ``save`` and ``load``.
        """
        await self._run("prepare", self._saves.preparing(state))

    async def load(
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
        """Fill ``state`` from a checkpoint, verified; a failure before the first byte leaves it as it was.

        Args:
            state: what ``save`` was given. Tensors are filled in place, Statefuls get ``load_state_dict``,
                other leaves are replaced.
            source: "latest" (which passes over corrupt checkpoints), a name, a step (any kind of integer), a
                CheckpointInfo; or a path, absolute or with a slash in it: a checkpoint's wherever it lies, or
                that of safetensors files, as Hugging Face's models are; a relative one is the coordinator's.
            keys: names of the state, or patterns of them (``"model.layers.*"``): all at and below what they
                match is loaded, nothing else is touched, and strictness is about them alone. A ``*`` reaches
                over dots. Modules are loaded in part; any other object with a ``load_state_dict()`` takes its
                state whole.
            rename: names as they were saved -> names of the state. A mapping of names or patterns, of which
                the first that matches counts (``{"module.*": "*"}``, each ``*`` on the right is what the
                wildcard of its number matched), or a function, called for each name.
            strict: whether every name must fit. If not, what fits is loaded and the report lists the rest.
            atomic: read and verify everything before the first target is touched; costs the state's memory
                once more.
            dtypes: "exact" refuses a tensor that was saved with another dtype; "convert" converts it as
                ``Tensor.copy_`` does, where torch can (not from complex to real, nor from float to int).
            dequantize: the dtype to make plain values in of what a model's files hold quantised in blocks,
                FP8 (with ``_scale_inv``) or MXFP4 (``_blocks`` with ``_scales``). Scales are no names then.
                None: all as it is stored.
        Raises: CheckpointNotFoundError, CorruptCheckpointError, IncompatibleStateError,
        UntrustedCheckpointError, EngineStateError.
        Cancellation: waits for the reads in progress; targets may be partly filled.
        """
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
        return await self._run("load", verb)

    async def read(
        self,
        source: CheckpointRef = "latest",
        *,
        keys: str | Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        dequantize: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """A checkpoint as fresh tensors and leaves, in exactly the structure that was saved; needs no model.

        Of stock's checkpoints, whose `.metadata` tells less: keys are text, tensors row-major.

        Args:
            source: as for ``load``.
            keys: names (``"model"``, ``"optim.state"``) or patterns of names (``"model.*.weight"``) to read;
                everything at and below them.
            device: where the tensors go.
            dequantize: as for ``load``.
        Raises: CheckpointNotFoundError, CorruptCheckpointError, UntrustedCheckpointError; LoadError for a key
        that it does not hold.
        """
        return await self._run("read", self._reads.reading(source, keys, device, dequantize))

    async def verify(self, source: CheckpointRef = "latest") -> VerifyReport:
        """Read all of a checkpoint, ours or stock's, and tell what of it is damaged: which bytes of which
        file, and which tensors have bytes there. Needs no model; nothing is unpickled but `.metadata`.

        Args:
            source: as for ``load``; "latest" is the newest that is committed, whatever state it is in.
        Raises: CheckpointNotFoundError; CorruptCheckpointError if `.metadata` can't be read at all;
            StorageError if the medium can't be asked. What is damaged is no error: see ``VerifyReport.ok``.
        Ranks: each verifies by itself; one is enough.
        """
        return await self._run("verify", self._reads.verifying(source))

    async def remove(self, source: CheckpointRef, *, after: After = None) -> None:
        """Remove a checkpoint, once the newer one that ``after`` stands for is durable.

        Whoever has it open reads on. To go on training meanwhile, do not await it but make it a task; an
        engine that closes waits for it.

        Args:
            source: its name, its step, or what was told of it; of a link the link is removed.
            after: what ``save`` gave for a newer one, or its ``upload_completion``, done or not.
        Raises: SaveError (of the kind that ``after`` raises) if the newer save failed: then nothing was
            removed; CheckpointNotFoundError; StorageError; EngineStateError; ValueError for "latest" and
            for a path.
        Cancellation: nothing is removed, unless that has begun.
        Ranks: all must call it, in the same order; the coordinator removes.
        """
        await self._run("remove", self._removals.removing(source, after))

    def checkpoint(
        self, source: CheckpointRef = "latest", *, dequantize: torch.dtype | None = None
    ) -> Checkpoint:
        """One checkpoint to read and load from any number of times, on one opening and one choice:
        ``async with engine.checkpoint() as checkpoint``.

        Args:
            source: as for ``load``; chosen when it is opened.
            dequantize: as for ``load``.
        Ranks: all must open it; see ``Checkpoint``.
        """
        return Checkpoint(self._life, source, owns_life=False, dequantize=dequantize)

    async def latest(self) -> CheckpointInfo | None:
        """The newest whole checkpoint: by step; where none was given, by the digits at the ends of names that
        are alike but for these, else by time. None if there is none.

        Raises: UntrustedCheckpointError if the newest is behind a link that is not followed; StorageError if
            it leads to nothing; LoadError if a newer release wrote it.
        Ranks: all must call it; the coordinator looks.
        """
        return await self._run("latest", self._loads.finding_latest())

    async def checkpoints(self) -> AsyncIterator[CheckpointInfo]:
        """Committed, whole checkpoints, ascending; what is not whole is left out, with a warning.

        Raises: as ``latest``.
        """
        # one by one: a caller that has found what it looks for reads no further
        for name in await self._run("checkpoints", self._loads.listing()):
            info = await self._run("checkpoints", self._loads.describing(name))
            if info is not None:
                yield info
