"""CheckpointEngine: save, load, read, and what the root holds. How it opens and ends is in lifetime.py.

Enters: calls from any loop and any thread. Leaves: responses, reports, errors of the tree in errors.py. The
engine's coroutines run on a loop thread of its own, because a training step blocks the loop that it runs on.
Invariant: a save that raises leaves no checkpoint, and a load that fails its checks leaves the state as it
was. Each verb is a generator (see _concurrency/verbs.py), so that dcp_async.sync offers the same ones to
trainers without a loop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, get_args

import torch
from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import Ended, Verb, drive
from .._foreign import ENDINGS
from ..catalog import Catalog, reference
from ..coordination import Coordination
from ..errors import EngineStateError
from ..events import Observer
from ..info import JSON, CheckpointInfo, CheckpointRef, LoadReport
from ..load import LoadOptions, LoadServices
from ..options import Dtypes, Limits, Timeouts
from ..planning import PlanningOptions
from ..response import AsyncSaveResponse, Place, ResponseWriter
from ..save import SaveRequest, save_error
from ..staging import Stager, StagingOptions
from ..state import LeafRules, capture
from ..storage import LimitedStorage, LocalStorage, Storage
from ..trust import Trust
from .admission import SaveArguments, brief, checkpoint_name
from .lifetime import Lifetime
from .loads import LoadRunner
from .release import check_torch
from .saves import SaveRunner

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointEngine:
    """Saves and loads checkpoints under one root without getting in the way of training.

    ``async with CheckpointEngine(root) as engine`` opens it and, on leaving, drains: normally and after an
    error completely, after a cancellation for ``exit_grace`` seconds. It may be used from several loops and
    threads.
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
        """
        Args:
            root: a directory (``~`` is the home directory), made by the first save, or a Storage, which stays
                the caller's to close.
            staging: how the state is copied, or a Stager to share, which stays the caller's to close.
            planning: DCP's planner, and whether plans are reused.
            coordination: which processes save together.
            limits: how much goes on at once.
            timeouts: how long to wait.
            trust: which pickled leaves a load accepts (a save refuses the others), and whether links out of
                the root are followed.
            observer: is told each event, on the engine's thread.
        """
        owns_storage = isinstance(root, (str, os.PathLike))
        if not owns_storage and not hasattr(root, "begin"):
            raise TypeError(f"root={root!r} must be a directory's path (str or PathLike) or a Storage")
        storage: Storage
        if isinstance(root, (str, os.PathLike)):
            storage = LocalStorage(
                root,
                io_concurrency=limits.io_concurrency,
                timeout=timeouts.storage,
                lease_max_age=2 * timeouts.coordination,
                follow_links=trust.follow_links,
            )
        else:
            storage = LimitedStorage(root, timeouts.storage)
        self._life = Lifetime(
            storage=storage,
            owns_storage=owns_storage,
            stager=staging if isinstance(staging, Stager) else Stager(staging),
            owns_stager=not isinstance(staging, Stager),
            coordination=coordination,
            configuration=_configuration(limits, staging, planning, coordination),
            limits=limits,
            timeouts=timeouts,
        )
        self._planning = planning
        self._replicas = coordination.replicas
        self._trust = trust
        self._leaf_rules = LeafRules(trust)
        self._observer = observer

    def __repr__(self) -> str:
        return f"<CheckpointEngine {self._life.storage!r} {self._life.state}, {len(self.pending)} pending>"

    def __del__(self) -> None:
        life = self.__dict__.get("_life")  # a constructor may have failed
        if life is not None:
            life.dropped(repr(self))

    async def _run(self, name: str, verb: Verb[T]) -> T:
        return await drive(name, verb, self._life.inside)

    # -- lifetime

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
        await self._run("close", self._life.leaving(exc_type))

    async def wait(self) -> None:
        """Wait until no save is in flight. Raises the SaveError of a save whose failure nobody has looked
        at."""
        await self._run("wait", self._life.waiting())

    async def close(self) -> None:
        """Wait for the saves in flight, then release what the engine made. Closing twice does nothing.

        Raises: the SaveError of a save whose failure nobody has looked at.
        Cancellation: drains for ``exit_grace`` seconds more, then aborts.
        """
        await self._run("close", self._life.closing())

    async def abort(self) -> None:
        """Cancel the saves in flight, leave nothing of them behind, release what the engine made."""
        await self._run("abort", self._life.aborting())

    def _opening(self) -> Verb[None]:
        check_torch()
        with self._life.storage_errors("open"):
            yield from self._life.opening(self._connected)

    async def _connected(self) -> None:
        life = self._life
        metadata_of = _MetadataOf(life)
        self._catalog = metadata_of.catalog = Catalog(
            life.storage, life.threads, metadata_of, timeout=life.timeouts.storage
        )
        life.book.seen_steps(await self._catalog.steps())
        self._runner = SaveRunner(life, self._planning, self._replicas, self._observer, metadata_of)
        services = LoadServices(
            threads=life.threads,
            part_bytes=life.stager.options.part_bytes,
            io_concurrency=life.limits.io_concurrency,
            timeout=life.timeouts.storage,
            trust=self._trust,
        )
        self._loader = LoadRunner(life, self._catalog, services)

    # -- save

    @property
    def pending(self) -> tuple[AsyncSaveResponse, ...]:
        """Saves in flight, oldest first."""
        return tuple(writer.response for writer in self._life.book.pending())

    async def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        checkpoint_id: str | None = None,
        notes: Mapping[str, JSON] | None = None,
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
            replace: whether an existing checkpoint of this name may be replaced; it stays readable until the
                new one is durable.
        Raises: SaveError (CheckpointExistsError, StateMutatedError), and then no checkpoint of this name will
            appear; EngineStateError; ValueError for a name, step or notes that can't be.
        Cancellation: cancels the save.
        Ranks: all must call it, in the same order.
        """
        return await self._run("save", self._saving(state, step, checkpoint_id, notes, replace))

    def _saving(
        self,
        state: Mapping[str, Any],
        step: int | None,
        checkpoint_id: str | None,
        notes: Mapping[str, JSON] | None,
        replace: bool,
    ) -> Verb[AsyncSaveResponse]:
        try:
            return (yield from self._admitting(state, step, checkpoint_id, notes, replace))
        except BaseException as error:
            self._life.lose(brief(step if checkpoint_id is None else checkpoint_id), error)
            raise

    def _admitting(
        self,
        state: Mapping[str, Any],
        step: int | None,
        checkpoint_id: str | None,
        notes: Mapping[str, JSON] | None,
        replace: bool,
    ) -> Verb[AsyncSaveResponse]:
        self._life.check_open()
        try:
            asked = SaveArguments(step, checkpoint_id, notes, replace)
        except (TypeError, ValueError) as error:
            self._runner.refuse_arguments(error)
            raise
        book, place = self._life.book, Place()
        request: SaveRequest | None = None
        try:
            while asked.replace and asked.name and (earlier := book.in_flight(asked.name)) is not None:
                yield Ended(earlier.upload.future)  # two of one name must land in order
            while (room := book.take_place(place)) is not None:
                yield Ended(room)
                self._life.check_open()
            request = yield from self._capture(state, asked, place)
            response = request.response
            if self._life.stager.options.overlap:
                request.allow_commit()
                self._runner.start(request)
            else:
                self._runner.start(request)
                yield response.staging_completion
                request.allow_commit()
            yield from self._life.finishing(request.writer)
        except BaseException:
            if request is None or not request.has_started:
                book.give_back(place)
            else:
                request.response.cancel()
                request.writer.returned()
            raise
        return response

    def _capture(self, state: Mapping[str, Any], asked: SaveArguments, place: Place) -> Verb[SaveRequest]:
        """Admission and capture, in the caller's thread and in one piece."""
        started = time.monotonic()
        ordinal, step = self._life.book.admit(asked.step, asked.checkpoint_id)
        name = checkpoint_name(step, asked.checkpoint_id)
        runner, requests = self._runner, list[SaveRequest]()
        writer = ResponseWriter(
            checkpoint_id=name,
            step=step,
            cancel=lambda: runner.cancel(requests[0]),  # does not keep the engine
            on_own_thread=self._life.on_own_thread,
            place=place,
        )
        response = writer.response
        plan = self._runner.plan if self._planning.cache else None
        try:
            if not asked.replace and self._life.book.in_flight(name) is not None:
                raise FileExistsError(name)
            ranks = self._life.coordinator
            previous = plan.structure if plan else None
            with ranks.activity.watched():
                captured = capture(
                    state, previous, rank=ranks.rank, world_size=ranks.world_size, rules=self._leaf_rules
                )
            events = self._life.stager.prepare(captured)
            if self._life.stager.options.overlap:
                self._life.hooks.watch(captured.optimizers, writer.staging.future, lambda: captured.tensors)
        except ENDINGS as error:
            self._runner.refuse_at_once(ordinal, name, error)
            raise
        except BaseException as error:  # the trainer's own code, which may raise anything
            rank, verdict = self._life.coordinator.rank, {}
            with contextlib.suppress(EngineStateError):  # closed meanwhile: the others are told by that
                verdict = yield self._life.submit(self._runner.refuse(ordinal, name, error))
            raise save_error(error, "capture", response, rank=rank, verdict=verdict) from error
        requests.append(
            SaveRequest(
                writer=writer,
                ordinal=ordinal,
                captured=captured,
                plan=None if captured.is_new else plan,
                events=events,
                notes=asked.notes,
                replace=asked.replace,
                started=started,
            )
        )
        return requests[0]

    # -- load

    async def load(
        self,
        state: Mapping[str, Any],
        source: CheckpointRef = "latest",
        *,
        strict: bool = True,
        atomic: bool = False,
        dtypes: Dtypes = "exact",
    ) -> LoadReport:
        """Fill ``state`` from a checkpoint, verified; a failure before the first byte leaves it as it was.

        Args:
            state: what ``save`` was given. Tensors are filled in place, Statefuls get ``load_state_dict``,
                other leaves are replaced.
            source: "latest" (which passes over corrupt checkpoints), a name, a step, or a CheckpointInfo; a
                name may be a path, a step any kind of integer.
            strict: whether every name must fit. If not, what fits is loaded and the report lists the rest.
            atomic: read and verify everything before the first target is touched; costs the state's memory
                once more.
            dtypes: "exact" refuses a tensor that was saved with another dtype; "convert" converts it as
                ``Tensor.copy_`` does, where torch can (not from complex to real, nor from float to int).
        Raises: CheckpointNotFoundError, CorruptCheckpointError, IncompatibleStateError,
        UntrustedCheckpointError, EngineStateError.
        Cancellation: waits for the reads in progress; targets may be partly filled.
        """
        return await self._run("load", self._loading(state, source, strict, atomic, dtypes))

    def _loading(
        self, state: Mapping[str, Any], source: CheckpointRef, strict: bool, atomic: bool, dtypes: Dtypes
    ) -> Verb[LoadReport]:
        self._life.check_open()
        if dtypes not in get_args(Dtypes):
            raise ValueError(f"dtypes is 'exact' or 'convert', not {dtypes!r}")
        ref = reference(source)
        for writer in self._life.book.pending():  # what is being staged must not change under the copy
            yield Ended(writer.staging.future)
        yield from self._after_saves_of(ref)
        how = LoadOptions(strict=strict, atomic=atomic, dtypes=dtypes)
        return (yield from self._loader.loading(state, ref, how))

    async def read(
        self,
        source: CheckpointRef = "latest",
        *,
        keys: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, Any]:
        """A checkpoint as fresh tensors and leaves, in exactly the structure that was saved; needs no model.

        Of stock's checkpoints, whose `.metadata` tells less: keys are text, tensors row-major.

        Args:
            source: as for ``load``.
            keys: names (``"model"``, ``"optim.state"``) to read; everything at and below them.
            device: where the tensors go.
        Raises: CheckpointNotFoundError, CorruptCheckpointError, UntrustedCheckpointError; LoadError for a key
        that it does not hold.
        """
        return await self._run("read", self._reading(source, keys, device))

    def _reading(
        self, source: CheckpointRef, keys: Sequence[str] | None, device: torch.device | str
    ) -> Verb[dict[str, Any]]:
        self._life.check_open()
        wanted = [keys] if isinstance(keys, str) else keys
        ref = reference(source)
        yield from self._after_saves_of(ref)
        return (yield from self._loader.reading(ref, wanted, device))

    # -- catalog

    async def latest(self) -> CheckpointInfo | None:
        """The newest whole checkpoint: by step, else by digits in the name, else by time. None if there is
        none.

        Raises: UntrustedCheckpointError if the newest is behind a link that is not followed; StorageError if
            it leads to nothing; LoadError if a newer release wrote it.
        Ranks: all must call it; the coordinator looks.
        """
        return await self._run("latest", self._finding_latest())

    def _finding_latest(self) -> Verb[CheckpointInfo | None]:
        self._life.check_open()
        yield from self._after_saves_of("latest")
        return (yield from self._loader.finding_latest())

    def _after_saves_of(self, source: str | int) -> Verb[None]:
        """Wait for the earlier saves of this engine that ``source`` may mean, as if ``save`` had been all of
        them; one that fails is none. A cancelled wait leaves them alone."""
        for writer in self._life.book.pending():
            if source == "latest" or source in (writer.response.checkpoint_id, writer.response.step):
                yield Ended(writer.upload.future)
        self._life.check_open()

    async def checkpoints(self) -> AsyncIterator[CheckpointInfo]:
        """Committed, whole checkpoints, ascending; what is not whole is left out, with a warning.

        Raises: as ``latest``.
        """
        for name in await self._run("checkpoints", self._listing()):
            info = await self._run("checkpoints", self._describing(name))
            if info is not None:
                yield info

    def _listing(self) -> Verb[list[str]]:
        self._life.check_open()
        yield from self._after_saves_of("latest")
        return (yield from self._loader.ask(self._catalog.names()))

    def _describing(self, name: str) -> Verb[CheckpointInfo | None]:
        self._life.check_open()
        return (yield from self._loader.ask(self._catalog.info(name)))


class _MetadataOf:
    """Decodes the metadata of a checkpoint for its CheckpointInfo, which may outlive the engine and must not
    keep it."""

    catalog: Catalog

    def __init__(self, life: Lifetime) -> None:
        self._life = life

    async def __call__(self, name: str) -> Metadata:
        return await self._life.submit(self.catalog.metadata(name)).wait()


def _configuration(
    limits: Limits,
    staging: Stager | StagingOptions,
    planning: PlanningOptions,
    coordination: Coordination,
) -> str:
    """What ranks have to configure alike, since they wait for each other."""
    options = staging.options if isinstance(staging, Stager) else staging
    planner = getattr(planning.save, "__qualname__", type(planning.save).__qualname__)
    return (
        f"pending_saves={limits.pending_saves} overlap={options.overlap} planner={planner} "
        f"replicas={coordination.replicas}"
    )
