"""Runs one load: chooses the checkpoint, falls back from a corrupt one, hands what was read to the state.

Enters: a state, a reference, how. Leaves: a LoadReport, or an error of the tree. The twin of save_runner.py,
as verbs: the state's own code runs in the caller's thread, everything else on the engine's loop. Invariant: a
load that touched targets and failed says so, and what an older checkpoint does not fill after that is an
error.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from .._concurrency import Verb
from .._foreign import ENDINGS, is_foreign, words
from ..catalog import Catalog, Contents, UnfitMetadataError
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
from ..load import Agreement, Attempt, Loaded, LoadOptions, LoadServices, Together, load_into, read_fresh
from ..state import Asked, CaptureError, Restorer, Schema, Targets, capture_targets, wishes_of
from .lifetime import Lifetime

logger = logging.getLogger(__name__)

T = TypeVar("T")

Trial = Callable[[str, bool], Verb[T]]
"""Loads a checkpoint by name; told whether an earlier one touched the targets."""


class LoadRunner:
    """The loads of one engine. Owns nothing."""

    def __init__(self, life: Lifetime, catalog: Catalog, services: LoadServices) -> None:
        self._life = life
        self._catalog = catalog
        self._services = services
        self._agreement = Agreement(catalog, life.coordinator, timeout=life.timeouts.storage)

    def ask(self, coro: Coroutine[Any, Any, T]) -> Verb[T]:
        """Run ``coro`` on the engine's loop."""
        with self._life.storage_errors("read"):
            value: T = yield self._life.submit(coro)
        return value

    def finding_latest(self) -> Verb[CheckpointInfo | None]:
        """The newest whole checkpoint. Ranks: all must call it."""
        return (yield from self.ask(self._agreement.latest(self._life.book.next_ordinal())))

    def loading(self, state: Mapping[str, Any], source: CheckpointRef, how: LoadOptions) -> Verb[LoadReport]:
        """Fill ``state``. Ranks: all must call it."""
        started = time.monotonic()
        book, coordinator = self._life.book, self._life.coordinator
        ordinal, numbers, asked = book.next_ordinal(), itertools.count(), Asked()
        try:
            names = yield from self.ask(self._agreement.resolve(ordinal, source))
            (info, targets, loaded), skipped = yield from self._try_each(
                names,
                lambda name, touched: self._load_one(
                    self._agreement.attempt(ordinal, next(numbers), name), state, asked, how, refill=touched
                ),
                falls_back=source == "latest",
            )
            self._restore(state, targets, loaded, info, how)
            if coordinator.world_size > 1:
                yield from self.ask(self._agreement.restored(ordinal, info.checkpoint_id))
        except (CheckpointError, MemoryError) as error:
            told = error
            if isinstance(error, MemoryError) and coordinator.world_size > 1:
                # nobody's fault here, but one rank's among several: they all raise the same
                told = LoadError(f"rank {coordinator.rank}: {words(error)}")
                told.__cause__ = error
            common = yield from self.ask(self._agreement.concluded(ordinal, told))
            self._life.loop.call_soon(self._agreement.leave, ordinal, error)
            if common is error:
                raise
            raise common from error
        except BaseException as error:  # a cancellation as well: the other ranks wait for this one
            self._life.loop.call_soon(self._agreement.leave, ordinal, error)
            raise
        return LoadReport(
            checkpoint_id=info.checkpoint_id,
            step=info.step,
            missing=(*loaded.match.missing, *loaded.match.kept),
            unexpected=tuple(loaded.match.unexpected),
            mismatched=tuple(loaded.match.mismatched),
            skipped=skipped,
            nbytes=loaded.nbytes,
            seconds=time.monotonic() - started,
        )

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
            with self._life.coordinator.activity.watched():
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
        contents = yield from self.ask(attempt.open())
        schema, coordinator = Schema(contents), self._life.coordinator
        rank, world_size = coordinator.rank, coordinator.world_size
        while world_size > 1:  # what one gives may hold more of them
            wishes = yield from self._look(attempt, lambda: wishes_of(state, schema, asked, rank=rank))
            agreed = yield from self.ask(attempt.agree(wishes))
            if not agreed:
                break
            asked.agreed.update(agreed)
        targets = yield from self._look(
            attempt, lambda: capture_targets(state, schema, asked, rank=rank, world_size=world_size)
        )

        async def load(contents: Contents, ranks: Together) -> Loaded:
            with _load_errors(contents.info.checkpoint_id, lambda: refill or ranks.are_ready):
                return await load_into(contents, targets, self._services, how, refill=refill, ranks=ranks)

        return contents.info, targets, (yield from self.ask(attempt.load(load)))

    def _look(self, attempt: Attempt, look: Callable[[], T]) -> Verb[T]:
        """What ``look`` finds in the trainer's objects; where it fails, all ranks go no further."""
        try:
            with _capture_errors(self._life.coordinator):
                return look()
        except BaseException as error:
            common = yield from self.ask(attempt.give_up(error))
            if common is error:
                raise
            raise common from error

    def reading(
        self, source: CheckpointRef, keys: Sequence[str] | None, device: torch.device | str
    ) -> Verb[dict[str, Any]]:
        """A checkpoint as fresh objects. Each rank reads by itself."""
        names = yield from self.ask(self._catalog.resolve(source))
        value, _ = yield from self._try_each(
            names, lambda name, _: self.ask(self._read_one(name, keys, device)), falls_back=source == "latest"
        )
        return value

    async def _read_one(
        self, name: str, keys: Sequence[str] | None, device: torch.device | str
    ) -> dict[str, Any]:
        contents = await self._catalog.open(name)
        try:
            with _load_errors(name, lambda: False):
                return await read_fresh(contents, self._services, keys=keys, device=device)
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
        for name in names:
            try:
                value = yield from trial(name, touched)
            except (CorruptCheckpointError, UnfitMetadataError) as error:
                if not falls_back:
                    raise
                first = first or error
                touched = touched or _has_touched(error)
                skipped.append(name)
                logger.warning("%s; trying the next older one", error)
            except CheckpointNotFoundError as error:  # removed since it was chosen, as old ones are
                if not falls_back:
                    raise
                gone = error
                logger.info("%s any more; trying the next older one", error)
            except (LoadError, StorageError) as error:
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


def _overwritten(name: str, what: str) -> CorruptCheckpointError:
    message = f"{what}. The state holds bytes of a corrupt checkpoint"
    return CorruptCheckpointError(message, checkpoint_id=name, partially_loaded=True)
