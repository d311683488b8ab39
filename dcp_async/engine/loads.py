"""The verbs that read: each chooses a checkpoint, falls back from a corrupt one, waits for saves it may mean.

Enters: what callers pass to ``load``, ``read``, ``latest`` and ``checkpoints``. Leaves: a report, objects,
descriptions, or an error of the tree. The state's own code runs in the caller's thread, everything else on
the engine's loop. Invariant: a load that touched targets and failed says so, and what an older checkpoint
does not fill after that is an error.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

import torch

from .._concurrency import Verb, Wait, cancellation_point, run_blocking
from .._foreign import ENDINGS, is_foreign, words
from ..catalog import UnfitMetadataError, reference
from ..coordination import Coordinator, RemoteFailure
from ..errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompatibleStateError,
    LoadError,
    StorageError,
)
from ..info import CheckpointInfo, CheckpointRef, LoadReport
from ..load import (
    Agreement,
    Attempt,
    DeviceWrites,
    Loaded,
    LoadOptions,
    LoadServices,
    Rename,
    Selection,
    Together,
    load_into,
    read_fresh,
)
from ..options import Dtypes
from ..staging import CaptureInProgressError, Event
from ..state import Asked, CaptureError, Restorer, Schema, Targets, capture_targets, wishes_of
from .lifetime import Lifetime

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HOST = ("cpu", "meta")
"""Kinds of devices that nothing is queued on."""

Trial = Callable[[str, bool], Verb[T]]
"""Loads a checkpoint by name; told whether an earlier one touched the targets."""


class Loads:
    """The loads of one engine. Owns nothing."""

    def __init__(self, life: Lifetime) -> None:
        self._life = life

    def loading(
        self,
        state: Mapping[str, Any],
        source: CheckpointRef,
        *,
        keys: Sequence[str] | None,
        rename: Rename | None,
        strict: bool,
        atomic: bool,
        dtypes: Dtypes,
    ) -> Verb[LoadReport]:
        """``CheckpointEngine.load``. Ranks: all must call it."""
        self._life.check_open()
        if dtypes not in get_args(Dtypes):
            raise ValueError(f"dtypes is 'exact' or 'convert', not {dtypes!r}")
        ref, selection = reference(source), Selection(keys, rename)
        for writer in self._life.book.pending():  # what is being staged must not change under the copy
            yield Wait(writer.staging.future)  # its failure is told by its own handles
        yield from self._after_saves_of(ref)
        how = LoadOptions(selection=selection, strict=strict, atomic=atomic, dtypes=dtypes)
        # numbered after the waits: a rank that waits for a save of its own has not begun the load
        started, agreement = time.monotonic(), self._agreement()
        ordinal = self._life.book.next_ordinal()
        try:
            info, loaded, skipped = yield from self._loading(agreement, ordinal, state, ref, how)
        except (CheckpointError, MemoryError) as error:
            told = self._told(error)
            common = yield from self._ask(agreement.concluded(ordinal, told))
            self._life.resources.loop.call_soon(agreement.leave, ordinal, error)
            if common is error:
                raise
            raise common from error
        except BaseException as error:  # a cancellation as well: the other ranks wait for this one
            self._life.resources.loop.call_soon(agreement.leave, ordinal, error)
            raise
        return LoadReport(
            checkpoint_id=info.checkpoint_id,
            step=info.step,
            missing=loaded.missing,
            unexpected=loaded.unexpected,
            mismatched=loaded.mismatched,
            skipped=skipped,
            nbytes=loaded.nbytes,
            seconds=time.monotonic() - started,
        )

    def _loading(
        self,
        agreement: Agreement,
        ordinal: int,
        state: Mapping[str, Any],
        source: str | int,
        how: LoadOptions,
    ) -> Verb[tuple[CheckpointInfo, Loaded, tuple[str, ...]]]:
        """What was loaded, and the names of newer checkpoints that are not whole."""
        numbers, asked = itertools.count(), Asked()
        names = yield from self._ask(agreement.resolve(ordinal, source))
        (info, targets, loaded), skipped = yield from self._try_each(
            names,
            lambda name, touched: self._load_one(
                agreement.attempt(ordinal, next(numbers), name), state, asked, how, refill=touched
            ),
            falls_back=source == "latest",
        )
        self._restore(state, targets, loaded, info, how)
        if self._life.resources.coordinator.world_size > 1:
            # handing back ran the trainer's code, which may have cancelled this task: once this rank has said
            # that it has its state, the others go on
            yield cancellation_point()
            yield from self._ask(agreement.restored(ordinal, info.checkpoint_id))
        return info, loaded, skipped

    def _told(self, error: CheckpointError | MemoryError) -> CheckpointError | MemoryError:
        """What the other ranks are told of ``error``."""
        coordinator = self._life.resources.coordinator
        if not isinstance(error, MemoryError) or coordinator.world_size == 1:
            return error
        # nobody's fault here, but one rank's among several: they all raise the same
        told = LoadError(f"rank {coordinator.rank}: {words(error)}")
        told.__cause__ = error
        return told

    def _restore(
        self,
        state: Mapping[str, Any],
        targets: Targets,
        loaded: Loaded,
        info: CheckpointInfo,
        how: LoadOptions,
    ) -> None:
        restorer = Restorer(targets, loaded.read, strict=how.strict, exact=how.dtypes == "exact")
        try:
            with self._life.resources.coordinator.activity.watched():
                if loaded.writes is not None:
                    loaded.writes.hand_out()
                restorer.restore(state)
        except ENDINGS:
            raise
        except BaseException as error:  # the trainer's own code, which may raise anything
            raise LoadError(
                f"checkpoint {info.checkpoint_id!r} was read, but the state refused it, its tensors "
                f"overwritten already: {restorer.at}: {words(error)}",
                checkpoint_id=info.checkpoint_id,
            ) from error

    def _load_one(
        self, attempt: Attempt, state: Mapping[str, Any], asked: Asked, how: LoadOptions, *, refill: bool
    ) -> Verb[tuple[CheckpointInfo, Targets, Loaded]]:
        try:
            return (yield from self._tried(attempt, state, asked, how, refill=refill))
        except BaseException as error:
            # what is open is closed by the step that fails; a cancellation may come between two of them
            self._life.resources.loop.call_soon(attempt.leave, error)
            raise

    def _tried(
        self, attempt: Attempt, state: Mapping[str, Any], asked: Asked, how: LoadOptions, *, refill: bool
    ) -> Verb[tuple[CheckpointInfo, Targets, Loaded]]:
        contents = yield from self._ask(attempt.open())
        chosen = yield from self._look(attempt, lambda: how.selection.of(contents))
        part = yield from self._look(attempt, lambda: chosen.of_state(state))
        schema, coordinator = Schema(chosen.contents), self._life.resources.coordinator
        rank, world_size = coordinator.rank, coordinator.world_size
        while world_size > 1:  # what one gives may hold more of them
            wishes = yield from self._look(attempt, lambda: wishes_of(part, schema, asked, rank=rank))
            agreed = yield from self._ask(attempt.agree(wishes))
            if not agreed:
                break
            asked.agreed.update(agreed)
        services = self._services()

        def look() -> tuple[Targets, DeviceWrites | None, list[Event]]:
            targets = capture_targets(part, schema, asked, rank=rank, world_size=world_size)
            chosen.narrow(targets)
            memory, stager = targets.memory(), services.stager
            # after the state's own code, which may queue work on a device
            writes = _writes(services, stager.backend.devices(memory), targets.device)
            return targets, writes, stager.queued_for(memory)

        targets, writes, queued = yield from self._look(attempt, look)

        async def load(ranks: Together) -> Loaded:
            with _load_errors(contents.info.checkpoint_id, lambda: refill or ranks.are_ready):
                for event in queued:  # else it would land in what is loaded, or read half of it
                    await run_blocking(services.threads, services.timeout, event.synchronize)
                return await load_into(
                    chosen.contents, targets, services, how, refill=refill, ranks=ranks, writes=writes
                )

        return contents.info, targets, (yield from self._ask(attempt.load(load)))

    def _look(self, attempt: Attempt, look: Callable[[], T]) -> Verb[T]:
        """What ``look`` finds in the trainer's objects; where it fails, all ranks go no further."""
        try:
            with _capture_errors(self._life.resources.coordinator):
                return look()
        except BaseException as error:
            common = yield from self._ask(attempt.give_up(error))
            if common is error:
                raise
            raise common from error

    def reading(
        self, source: CheckpointRef, keys: Sequence[str] | None, device: torch.device | str
    ) -> Verb[dict[str, Any]]:
        """``CheckpointEngine.read``. Each rank reads by itself."""
        self._life.check_open()
        # a text is a sequence of its characters, and none of them would be a key
        wanted = [keys] if isinstance(keys, str) else keys
        ref = reference(source)
        yield from self._after_saves_of(ref)
        names = yield from self._ask(self._life.resources.catalog.resolve(ref))
        services = self._services()
        # here, since the engine's own thread sits on device 0 whatever the caller has chosen
        with _device_errors(device):
            place = torch.device(device)
            if place.type not in _HOST:
                place = services.stager.backend.resolve(place)

        def read(name: str, touched: bool) -> Verb[dict[str, Any]]:
            with _device_errors(device):
                writes = _writes(services, (), place)
            value = yield from self._ask(self._read_one(name, services, wanted, place, writes))
            if writes is not None:
                with _device_errors(device):
                    writes.hand_out()
            return value

        value, _ = yield from self._try_each(names, read, falls_back=ref == "latest")
        return value

    async def _read_one(
        self,
        name: str,
        services: LoadServices,
        keys: Sequence[str] | None,
        device: torch.device,
        writes: DeviceWrites | None,
    ) -> dict[str, Any]:
        contents = await self._life.resources.catalog.open(name)
        try:
            with _load_errors(name, lambda: False):
                return await read_fresh(contents, services, keys=keys, device=device, writes=writes)
        finally:
            await contents.close()

    def _try_each(
        self, names: Sequence[str], trial: Trial[T], *, falls_back: bool
    ) -> Verb[tuple[T, tuple[str, ...]]]:
        """The first checkpoint that is whole, and the names of newer ones that are not."""
        first: LoadError | None = None
        gone: CheckpointNotFoundError | None = None
        touched = False
        skipped: list[str] = []
        passed_over = ""
        for name in names:
            if passed_over:  # said of one that is followed by another: what is raised need not be
                logger.warning("%s; trying the next older one", passed_over)
                passed_over = ""
            try:
                value = yield from trial(name, touched)
            except (CorruptCheckpointError, UnfitMetadataError) as error:
                if not falls_back:
                    raise
                first = first or error  # of all that are corrupt the newest is what the user asked for
                touched = touched or _has_touched(error)
                skipped.append(name)
                passed_over = str(error)
            except CheckpointNotFoundError as error:  # removed since it was chosen, as old ones are
                if not falls_back:
                    raise
                gone = error
                logger.info("%s any more; trying the next older one", error)
            except (LoadError, StorageError) as error:
                # targets that an earlier checkpoint has touched are what the caller must hear of, whatever
                # ends the search
                if not touched:
                    raise
                raise _overwritten(
                    skipped[0], f"{first}; and the next older one can't be loaded ({error})"
                ) from error
            else:
                return value, tuple(skipped)
        if first is None:
            assert gone is not None
            raise gone
        if touched and not _has_touched(first):
            raise _overwritten(skipped[0], f"{first}; and the older ones are corrupt as well") from first
        raise first

    def finding_latest(self) -> Verb[CheckpointInfo | None]:
        """``CheckpointEngine.latest``. Ranks: all must call it."""
        self._life.check_open()
        yield from self._after_saves_of("latest")
        return (yield from self._ask(self._agreement().latest(self._life.book.next_ordinal())))

    def listing(self) -> Verb[list[str]]:
        """Names of committed checkpoints, ascending."""
        self._life.check_open()
        yield from self._after_saves_of("latest")
        return (yield from self._ask(self._life.resources.catalog.names()))

    def describing(self, name: str) -> Verb[CheckpointInfo | None]:
        """What ``name`` is; None, and a warning, if it is not whole."""
        self._life.check_open()
        return (yield from self._ask(self._life.resources.catalog.info(name)))

    def _after_saves_of(self, source: str | int) -> Verb[None]:
        """Wait for the earlier saves of this engine that ``source`` may mean, as if ``save`` had been all of
        them; one that fails is none. A cancelled wait leaves them alone."""
        for writer in self._life.book.pending():
            if source == "latest" or source in (writer.response.checkpoint_id, writer.response.step):
                yield Wait(writer.upload.future)
        self._life.check_open()  # it may have been closed meanwhile

    def _ask(self, coro: Coroutine[Any, Any, T]) -> Verb[T]:
        """Run ``coro`` on the engine's loop."""
        with self._life.storage_errors("read"):
            value: T = yield self._life.submit(coro).join()
        return value

    def _agreement(self) -> Agreement:
        have = self._life.resources
        return Agreement(have.catalog, have.coordinator, timeout=have.timeout)

    def _services(self) -> LoadServices:
        have = self._life.resources
        return LoadServices(
            threads=have.threads,
            stager=have.stager,
            io_concurrency=have.io_concurrency,
            timeout=have.timeout,
            trust=have.setup.trust,
        )


def _writes(
    services: LoadServices, devices: Iterable[torch.device], fresh: torch.device
) -> DeviceWrites | None:
    """What writes to ``devices``, and to ``fresh``, where tensors are made; None where all is host memory. In
    the caller's thread."""
    wanted = {device for device in (*devices, fresh) if device.type not in _HOST}
    if not wanted:
        return None
    try:
        return DeviceWrites(services.stager, wanted, services.threads, services.timeout)
    except CaptureInProgressError as error:
        raise LoadError(f"nothing can be loaded while a graph is captured: {error}") from error


def _has_touched(error: LoadError) -> bool:
    return isinstance(error, CorruptCheckpointError) and error.partially_loaded


@contextlib.contextmanager
def _capture_errors(coordinator: Coordinator) -> Iterator[None]:
    """What the trainer's objects raise while they are asked and looked at becomes an
    IncompatibleStateError."""
    try:
        with coordinator.activity.watched():
            yield
    except CaptureError as error:
        raise IncompatibleStateError(f"the state can't be loaded into: {error}") from error
    except BaseException as error:
        if not is_foreign(error):
            raise
        what = words(error)  # of the trainer's objects, which are looked at
        raise IncompatibleStateError(f"the state can't be loaded into: {what}; nothing was loaded") from error


@contextlib.contextmanager
def _load_errors(name: str, touched: Callable[[], bool]) -> Iterator[None]:
    """What the trainer's objects raise while a load looks at them becomes a LoadError."""
    try:
        yield
    except BaseException as error:
        if not is_foreign(error) or isinstance(error, (OSError, MemoryError, RemoteFailure)):
            raise  # the storage's, nobody's, or another rank's
        state = "targets are partly overwritten" if touched() else "nothing was loaded"
        raise LoadError(f"checkpoint {name!r}: {words(error)}; {state}", checkpoint_id=name) from error


@contextlib.contextmanager
def _device_errors(device: torch.device | str) -> Iterator[None]:
    """What ``device`` raises where tensors are to be made becomes a LoadError."""
    try:
        yield
    except BaseException as error:
        if not is_foreign(error):
            raise
        raise LoadError(f"no tensors can be made on {device}: {words(error)}; nothing was loaded") from error


def _overwritten(name: str, what: str) -> CorruptCheckpointError:
    message = f"{what}. The state holds bytes of a corrupt checkpoint"
    return CorruptCheckpointError(message, checkpoint_id=name, partially_loaded=True)
