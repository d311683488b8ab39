"""The verbs that load, open and list: each waits for saves that it may mean, and chooses a checkpoint.

Enters: what callers pass to ``load``, ``checkpoint``, ``latest`` and ``checkpoints``. Leaves: a report, an
opened checkpoint, descriptions, or an error of the tree. The state's own code runs in the caller's thread,
everything else on the engine's loop. Invariant: a load that touched targets and failed says so, and what an
older checkpoint does not fill after that is an error.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner

from .._concurrency import Verb, Wait, cancellation_point, run_blocking
from .._foreign import ENDINGS, is_foreign, words
from ..catalog import Contents, Opened, reference
from ..coordination import Coordinator
from ..errors import CheckpointError, IncompatibleStateError, LoadError
from ..info import CheckpointInfo, CheckpointRef, LoadReport
from ..load import (
    Agreement,
    Attempt,
    DeviceWrites,
    Loaded,
    LoadOptions,
    PlannedLoad,
    Rename,
    Selection,
    Together,
    load_into,
)
from ..options import Dtypes
from ..planning import load_planner
from ..staging import Event
from ..state import Asked, CaptureError, PlannedState, Restorer, Schema, Targets, capture_targets, wishes_of
from .fallback import first_whole
from .load_context import LoadContext, load_errors, writes_to

T = TypeVar("T")


class Loads:
    """The loads of one engine, or of one opened checkpoint. Owns nothing."""

    def __init__(self, context: LoadContext) -> None:
        self._context = context
        self._life = context.life

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
        dequantize: torch.dtype | None = None,
        is_partial: bool = False,
    ) -> Verb[LoadReport]:
        """``CheckpointEngine.load``. Ranks: all must call it.

        ``is_partial``: the checkpoint may hold more than the state asks for.
        """
        self._life.check_open()
        if dtypes not in get_args(Dtypes):
            raise ValueError(f"dtypes is 'exact' or 'convert', not {dtypes!r}")
        is_default = self._life.setup.planning.load is DefaultLoadPlanner
        if not is_default and (atomic or keys is not None or rename is not None):
            raise ValueError(
                "atomic=True, keys= and rename= can't be had with PlanningOptions(load=...): a planner "
                "decides on what is read, and writes by itself"
            )
        ref, selection = reference(source), Selection(keys, rename, dequantize)
        for writer in self._life.book.pending():  # what is being staged must not change under the copy
            yield Wait(writer.staging.future)  # its failure is told by its own handles
        yield from self._context.after_saves_of(ref)
        how = LoadOptions(
            selection=selection, strict=strict, atomic=atomic, dtypes=dtypes, is_partial=is_partial
        )
        # numbered after the waits: a rank that waits for a save of its own has not begun the load
        started, agreement = time.monotonic(), self._context.agreement()
        ordinal = self._life.book.next_ordinal()
        info, loaded, skipped = yield from self._in_common(
            agreement, ordinal, self._loading(agreement, ordinal, state, ref, how)
        )
        return LoadReport(
            checkpoint_id=info.checkpoint_id,
            step=info.step,
            missing=loaded.missing,
            unexpected=loaded.unexpected,
            mismatched=loaded.mismatched,
            skipped=tuple(skipped),
            skip_reasons=skipped,
            nbytes=loaded.nbytes,
            seconds=time.monotonic() - started,
        )

    def _in_common(self, agreement: Agreement, ordinal: int, verb: Verb[T]) -> Verb[T]:
        """What ``verb`` gives; where it fails here, it fails on all ranks alike."""
        try:
            return (yield from verb)
        except (CheckpointError, MemoryError) as error:
            told = self._told(error)
            common = yield from self._context.ask(agreement.concluded(ordinal, told))
            self._life.resources.loop.call_soon(agreement.leave, ordinal, error)
            if common is error:
                raise
            raise common from error
        except BaseException as error:  # a cancellation as well: the other ranks wait for this one
            self._life.resources.loop.call_soon(agreement.leave, ordinal, error)
            raise

    def _loading(
        self,
        agreement: Agreement,
        ordinal: int,
        state: Mapping[str, Any],
        source: str | int,
        how: LoadOptions,
    ) -> Verb[tuple[CheckpointInfo, Loaded, Mapping[str, str]]]:
        """What was loaded; and of newer checkpoints that are not whole, by name, what is wrong with
        them."""
        looks, numbers, asked = itertools.count(), itertools.count(), Asked()
        (info, restorer, loaded), skipped = yield from first_whole(
            lambda: self._context.ask(agreement.resolve(ordinal, source, next(looks))),
            lambda name, touched: self._load_one(
                agreement.attempt(ordinal, next(numbers), name), state, asked, how, refill=touched
            ),
            falls_back=source == "latest",
        )
        self._restore(state, restorer, loaded, info)
        if self._life.resources.coordinator.world_size > 1:
            # handing back ran the trainer's code, which may have cancelled this task: once this rank has said
            # that it has its state, the others go on
            yield cancellation_point()
            yield from self._context.ask(agreement.restored(ordinal, info.checkpoint_id))
        return info, loaded, skipped

    def opening(
        self,
        source: CheckpointRef,
        keep: Callable[[Opened], object],
        *,
        is_name: bool,
        dequantize: torch.dtype | None = None,
    ) -> Verb[None]:
        """``Checkpoint.open``. Ranks: all must call it; all have the same state of the checkpoint open.

        Args:
            keep: gets what was opened, on the engine's loop, so that no cancellation loses it.
            is_name: whether ``source`` is a name, for which the others are not looked at.
        """
        self._life.check_open()
        ref = reference(source)
        yield from self._context.after_saves_of(ref)
        agreement, ordinal = self._context.agreement(), self._life.book.next_ordinal()
        yield from self._in_common(
            agreement,
            ordinal,
            self._opening(agreement, ordinal, ref, keep, is_name=is_name, dequantize=dequantize),
        )

    def _opening(
        self,
        agreement: Agreement,
        ordinal: int,
        ref: str | int,
        keep: Callable[[Opened], object],
        *,
        is_name: bool,
        dequantize: torch.dtype | None,
    ) -> Verb[None]:
        looks, numbers = itertools.count(), itertools.count()

        def choose() -> Verb[Sequence[str]]:
            if is_name:
                return [str(ref)]
            return (yield from self._context.ask(agreement.resolve(ordinal, ref, next(looks))))

        (attempt, contents), _ = yield from first_whole(
            choose,
            lambda name, _: self._open_one(agreement.attempt(ordinal, next(numbers), name), dequantize),
            falls_back=ref == "latest" and not is_name,
        )

        async def hand_over() -> None:
            if self._life.resources.coordinator.world_size > 1:
                await agreement.restored(ordinal, attempt.name)
            # what was made plain of them has the same reader
            attempt.hand_over()
            opened = Opened(contents)
            self._life.opened.add(opened)
            keep(opened)

        try:
            yield from self._context.ask(hand_over())
        except BaseException as error:
            self._life.resources.loop.call_soon(attempt.leave, error)
            raise

    def _open_one(self, attempt: Attempt, dequantize: torch.dtype | None) -> Verb[tuple[Attempt, Contents]]:
        try:
            contents = yield from self._context.ask(attempt.open())
            # while it is the attempt's still: what is refused here is refused on all ranks
            contents = yield from self._look(attempt, lambda: contents.dequantized(dequantize))
        except BaseException as error:
            self._life.resources.loop.call_soon(attempt.leave, error)
            raise
        return attempt, contents

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
        restorer: Restorer | PlannedState,
        loaded: Loaded,
        info: CheckpointInfo,
    ) -> None:
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
    ) -> Verb[tuple[CheckpointInfo, Restorer | PlannedState, Loaded]]:
        try:
            if self._life.setup.planning.load is not DefaultLoadPlanner:
                return (yield from self._planned(attempt, state, how, refill=refill))
            return (yield from self._tried(attempt, state, asked, how, refill=refill))
        except BaseException as error:
            # what is open is closed by the step that fails; a cancellation may come between two of them
            self._life.resources.loop.call_soon(attempt.leave, error)
            raise

    def _tried(
        self, attempt: Attempt, state: Mapping[str, Any], asked: Asked, how: LoadOptions, *, refill: bool
    ) -> Verb[tuple[CheckpointInfo, Restorer | PlannedState, Loaded]]:
        contents = yield from self._context.ask(attempt.open())
        chosen = yield from self._look(attempt, lambda: how.selection.of(contents))
        part = yield from self._look(attempt, lambda: chosen.of_state(state))
        schema, coordinator = Schema(chosen.contents), self._life.resources.coordinator
        rank, world_size = coordinator.rank, coordinator.world_size
        while world_size > 1:  # what one gives may hold more of them
            wishes = yield from self._look(attempt, lambda: wishes_of(part, schema, asked, rank=rank))
            agreed = yield from self._context.ask(attempt.agree(wishes))
            if not agreed:
                break
            asked.agreed.update(agreed)
        services = self._context.services()

        def look() -> tuple[Targets, DeviceWrites | None, list[Event]]:
            targets = capture_targets(part, schema, asked, rank=rank, world_size=world_size)
            chosen.narrow(targets)
            memory, stager = targets.memory(), services.stager
            # after the state's own code, which may queue work on a device
            away = [self._context.device(kind) for kind in targets.mesh_devices()]
            writes = writes_to(services, (*stager.backend.devices(memory), *away), targets.device)
            return targets, writes, stager.queued_for(memory)

        targets, writes, queued = yield from self._look(attempt, look)

        async def load(ranks: Together) -> Loaded:
            with load_errors(contents.info.checkpoint_id, lambda: refill or ranks.are_ready):
                for event in queued:  # else it would land in what is loaded, or read half of it
                    await run_blocking(services.threads, services.timeout, event.synchronize)
                return await load_into(
                    chosen.contents, targets, services, how, refill=refill, ranks=ranks, writes=writes
                )

        loaded = yield from self._context.ask(attempt.load(load))
        assert loaded.read is not None
        exact = how.dtypes == "exact"
        return contents.info, Restorer(targets, loaded.read, strict=how.strict, exact=exact), loaded

    def _planned(
        self, attempt: Attempt, state: Mapping[str, Any], how: LoadOptions, *, refill: bool
    ) -> Verb[tuple[CheckpointInfo, Restorer | PlannedState, Loaded]]:
        """One attempt by a planner of the user's."""
        contents = yield from self._context.ask(attempt.open())
        contents = yield from self._look(attempt, lambda: how.selection.plain(contents))
        coordinator, services = self._life.resources.coordinator, self._context.services()

        def look() -> tuple[LoadPlanner, PlannedState, list[Event]]:
            planner, stager = load_planner(self._life.setup.planning), services.stager
            planned = PlannedState(state, rank=coordinator.rank, world_size=coordinator.world_size)
            devices = stager.backend.devices(planned.tensors)
            # meta is no accelerator, and has no queue
            queued = [stager.backend.record(device) for device in devices if device.type != "meta"]
            return planner, planned, [*queued, *stager.queued_for(planned.tensors)]

        planner, planned, queued = yield from self._look(attempt, look)

        async def load(ranks: Together) -> Loaded:
            name = contents.info.checkpoint_id
            if refill:
                raise LoadError(
                    f"checkpoint {name!r} is not tried: a planner need not fill what holds bytes of another",
                    checkpoint_id=name,
                )
            with load_errors(name, lambda: ranks.are_ready):
                # a planner writes in a thread of the engine's, on no stream of the caller's
                for event in queued:
                    await run_blocking(services.threads, services.timeout, event.synchronize)
                return await PlannedLoad(contents, planner, services, how, ranks).run(planned.nested)

        loaded = yield from self._context.ask(attempt.load(load))
        return contents.info, planned, loaded

    def _look(self, attempt: Attempt, look: Callable[[], T]) -> Verb[T]:
        """What ``look`` finds in the trainer's objects; where it fails, all ranks go no further."""
        try:
            with _capture_errors(self._life.resources.coordinator):
                return look()
        except BaseException as error:
            common = yield from self._context.ask(attempt.give_up(error))
            if common is error:
                raise
            raise common from error

    def finding_latest(self) -> Verb[CheckpointInfo | None]:
        """``CheckpointEngine.latest``. Ranks: all must call it."""
        self._life.check_open()
        yield from self._context.after_saves_of("latest")
        return (
            yield from self._context.ask(self._context.agreement().latest(self._life.book.next_ordinal()))
        )

    def listing(self) -> Verb[list[str]]:
        """Names of committed checkpoints, ascending."""
        self._life.check_open()
        yield from self._context.after_saves_of("latest")
        return (yield from self._context.ask(self._life.resources.catalog.names()))

    def describing(self, name: str) -> Verb[CheckpointInfo | None]:
        """What ``name`` is; None, and a warning, if it is not whole."""
        self._life.check_open()
        return (yield from self._context.ask(self._life.resources.catalog.info(name)))


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
