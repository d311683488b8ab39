"""A load through any StorageReader of stock's, with an engine's errors and common outcome.

Enters: a state, a reader and a planner of anybody's. Leaves: a filled state, or on every rank one LoadError.
Invariant: no rank's ``read_data`` is called before all ranks have finished their plans; what fails before
that leaves the targets as they were, and the error says which of the two it was.
Source: torch/distributed/checkpoint/state_dict_loader.py (the order of calls).

    (caller's thread) state_dict() of Statefuls
    (all ranks) reset, read_metadata, set_up_planner, set_up_storage_reader, create_local_plan,
        prepare_local_plan
    (coordinator) create_global_plan, prepare_global_plan
    (all ranks) finish_plan, read_data
    (caller's thread) load_state_dict() of Statefuls
"""

from __future__ import annotations

import functools
import inspect
import os
import pickle
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader

from .._concurrency import Wait, first_failure, run_unless
from .._foreign import ENDINGS, user_code
from ..coordination import Coordination, PhaseFailure, RemoteError, RemoteFailure
from ..errors import CheckpointNotFoundError, CorruptCheckpointError, LoadError, UntrustedCheckpointError
from ..save import forget_locals
from .stock_call import Claim, StockCall, asked, check_state, label, packed, require, synchronize_device

T = TypeVar("T")

_READER = (
    "reset",
    "read_metadata",
    "set_up_storage_reader",
    "prepare_local_plan",
    "prepare_global_plan",
    "read_data",
)
_PLANNER = ("set_up_planner", "create_local_plan", "create_global_plan", "finish_plan")

_KINDS: dict[str, type[LoadError]] = {
    CheckpointNotFoundError.__name__: CheckpointNotFoundError,
    FileNotFoundError.__name__: CheckpointNotFoundError,
    CorruptCheckpointError.__name__: CorruptCheckpointError,
    UntrustedCheckpointError.__name__: UntrustedCheckpointError,
}
"""What a rank calls it -> what it is to the user."""


async def load_through(
    reader: StorageReader,
    state_dict: dict[str, Any],
    *,
    planner: LoadPlanner | None = None,
    coordination: Coordination,
    checkpoint_id: str | os.PathLike[str] | None = None,
) -> None:
    """Fill ``state_dict`` through ``reader``, in DCP's order of calls, all of them from one thread.

    ``state_dict()`` and ``load_state_dict()`` of Statefuls are called in the caller's thread, in one order
    on all ranks; other entries are put back into ``state_dict``.

    Args:
        planner: for this load; None for DCP's default one.
        checkpoint_id: what ``reader.reset`` is called with; None: it is not called.
    Ranks: all call it, in the same order. A reader or planner that another call uses is waited for.
    Raises: LoadError, the same on every rank, which says whether targets may be partly overwritten; TypeError
        for what is no reader or planner; EngineStateError where ranks can't meet.
    Cancellation: the call of the reader's that is under way is waited for; the other ranks' loads fail.
    """
    planner = DefaultLoadPlanner() if planner is None else planner
    require(reader, "a StorageReader", _READER)
    require(planner, "a LoadPlanner", _PLANNER)
    check_state(state_dict)
    claim = Claim((reader, planner))
    await claim.take()
    try:
        call = StockCall(coordination, "load")
    except BaseException:
        claim.release()
        raise
    load = _Load(call, reader, planner, checkpoint_id)
    try:
        await load.run(state_dict)
    finally:
        await load.end()
        claim.release()


class _Calls:
    """The calls of a reader and a planner on one rank, in the thread of the load."""

    def __init__(
        self,
        reader: StorageReader,
        planner: LoadPlanner,
        checkpoint_id: str | os.PathLike[str] | None,
        *,
        rank: int,
        is_coordinator: bool,
    ) -> None:
        self._reader, self._planner, self._checkpoint_id = reader, planner, checkpoint_id
        self._rank, self._is_coordinator = rank, is_coordinator
        self._plan: LoadPlan
        self.has_read = False
        """Whether targets may hold other bytes than before."""

    def metadata(self) -> tuple[Metadata, bool]:
        """What the checkpoint holds, and whether it is of all ranks."""
        reader = self._reader
        if self._checkpoint_id is not None:
            reader.reset(self._checkpoint_id)
        try:
            return reader.read_metadata(), True
        except Exception:
            # saved without collectives: each rank has its own, and stock asks the same way
            if "kwargs" not in inspect.signature(reader.read_metadata).parameters:
                raise
            try:
                return reader.read_metadata(rank=self._rank), False
            except Exception as second:
                second.__suppress_context__ = True  # that there is no other is the reader's own affair
            raise

    def local_plan(self, metadata: Metadata, of_all: bool, state: dict[str, Any]) -> bytes:
        """This rank's plan, for the coordinator."""
        reader, planner = self._reader, self._planner
        planner.set_up_planner(state, metadata, self._is_coordinator)
        if "kwargs" in inspect.signature(reader.set_up_storage_reader).parameters:
            reader.set_up_storage_reader(
                metadata, self._is_coordinator, rank=self._rank, use_collectives=of_all
            )
        else:
            reader.set_up_storage_reader(metadata, self._is_coordinator)
        return packed("the plan", reader.prepare_local_plan(planner.create_local_plan()))

    def global_plans(self, plans: Sequence[bytes]) -> list[bytes]:
        """All ranks' plans -> each rank's; the coordinator's alone."""
        made = self._planner.create_global_plan([pickle.loads(plan) for plan in plans])
        prepared = self._reader.prepare_global_plan(made)
        if len(prepared) != len(plans):
            raise ValueError(f"{len(prepared)} plans were made for {len(plans)} ranks")
        return [packed("the plan", plan) for plan in prepared]

    def finish_plan(self, answer: bytes) -> None:
        self._plan = self._planner.finish_plan(pickle.loads(answer))

    def read(self) -> None:
        """Fill the targets."""
        # before, not after: what fails in the middle has written too
        self.has_read = True
        self._reader.read_data(self._plan, self._planner).wait()
        synchronize_device()


async def _nothing(messages: Sequence[None]) -> list[None]:
    return [None] * len(messages)


class _Load:
    """One load on one rank. Owns its call."""

    def __init__(
        self,
        call: StockCall,
        reader: StorageReader,
        planner: LoadPlanner,
        checkpoint_id: str | os.PathLike[str] | None,
    ) -> None:
        self._call = call
        ranks = call.coordinator
        self._calls = _Calls(
            reader, planner, checkpoint_id, rank=ranks.rank, is_coordinator=ranks.is_coordinator
        )
        self._name = type(reader).__name__ if checkpoint_id is None else os.fspath(checkpoint_id)
        self._uid = ""

    async def _on_loop(self, coro: Coroutine[Any, Any, T]) -> T | None:
        return await self._call.loop.submit(coro).join().wait()

    async def run(self, state_dict: dict[str, Any]) -> None:
        """See ``load_through``."""
        # outside of what is settled: as long as ranks have not met, there is nobody to tell
        await self._on_loop(self._call.coordinator.open())
        self._uid = self._call.coordinator.uid(0, "load")
        try:
            state = self._asked(state_dict)
            synchronize_device()
            await self._on_loop(self._together(functools.partial(self._read, state)))
            self._restore(state_dict, state)
            exchange = functools.partial(
                self._call.coordinator.exchange, self._uid, "restore", None, _nothing
            )
            await self._on_loop(self._together(exchange))
        except BaseException as error:
            error = first_failure(error)
            cause = error.cause if isinstance(error, PhaseFailure) else error
            # whoever keeps the error would keep the state with the frames
            forget_locals(error)
            failure = await Wait(self._call.loop.submit(self._failure(error)).future, shielded=True).wait()
            if isinstance(error, ENDINGS) or failure is None:
                raise
            raise failure from cause

    async def end(self) -> None:
        """Leave the other ranks and release everything."""
        try:
            await Wait(self._call.loop.submit(self._leave()).future, shielded=True).wait()
        finally:
            self._call.stop()

    async def _leave(self) -> None:
        self._call.coordinator.forget(self._uid)
        await self._call.close()

    def _asked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        try:
            return asked(state_dict, self._call.coordinator.activity)
        except ENDINGS:
            raise
        except BaseException as error:
            raise PhaseFailure(label("ask"), error) from error

    def _restore(self, state_dict: dict[str, Any], state: dict[str, Any]) -> None:
        with self._call.coordinator.activity.watched():
            # stock's order, and one for all ranks: load_state_dict() may call collectives
            for key in sorted(state_dict):
                value = state_dict[key]
                if not isinstance(value, Stateful):
                    state_dict[key] = state[key]
                    continue
                try:
                    with user_code("load_state_dict", value, key):
                        value.load_state_dict(state[key])
                except ENDINGS:
                    raise
                except BaseException as error:
                    raise PhaseFailure(label("restore"), error) from error

    async def _together(self, step: Any) -> None:
        await run_unless(functools.partial(self._call.coordinator.failed, self._uid), step)

    async def _read(self, state: dict[str, Any]) -> None:
        call, calls, uid = self._call, self._calls, self._uid

        async def plans(messages: Sequence[bytes]) -> list[bytes]:
            return await call.run("reads", calls.global_plans, messages)

        exchange = call.coordinator.exchange
        metadata, of_all = await call.run("open", calls.metadata)
        plan = await call.run("reads", calls.local_plan, metadata, of_all, state)
        answer = await exchange(uid, "reads", plan, plans)
        await call.run("reads", calls.finish_plan, answer)
        # no target is touched before every rank has come to here
        await exchange(uid, "ready", None, _nothing)
        await call.run("done", calls.read)
        await exchange(uid, "done", None, _nothing)

    async def _failure(self, error: BaseException) -> LoadError | None:
        """What every rank raises because of ``error``, its own or another's. On the loop."""
        coordinator, uid = self._call.coordinator, self._uid
        # what came from another rank the others have heard of
        if not isinstance(error, RemoteFailure):
            coordinator.fail(uid, "load", error)
        if isinstance(error, ENDINGS):
            return None
        verdict, touched = await coordinator.settle(uid, flag=self._calls.has_read)
        # no verdict where the other ranks are out of reach: then what this one knows has to do
        failures = dict(verdict) or (
            dict(error.failures)
            if isinstance(error, RemoteFailure)
            else {coordinator.rank: RemoteError.of("load", error)}
        )
        return self._load_error(failures, touched=touched)

    def _load_error(self, failures: dict[int, RemoteError], *, touched: bool) -> LoadError:
        first = next(error for _, error in sorted(failures.items()))
        kind = _KINDS.get(first.type_name, LoadError)
        state = "targets may be partly overwritten" if touched else "nothing was loaded"
        message = f"loading {self._name!r} failed: {RemoteFailure(failures)}; {state}"
        if kind is CorruptCheckpointError:
            return CorruptCheckpointError(
                message, checkpoint_id=self._name, partially_loaded=touched, tensors=first.tensors
            )
        return kind(message, checkpoint_id=self._name)
