"""What ranks load, they load alike: one chooses the checkpoint, all open the same, and one outcome is
everybody's.

Enters: verbs of the engine on its loop, each with an ordinal that is the same on all ranks. Leaves: what the
verb gives, or on every rank the same error. Invariant: no rank touches a target before every rank has
finished its checks. With one rank it is the catalog alone.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, TypeVar

import anyio

from .._concurrency import run_unless
from ..catalog import Catalog, Contents, Opened, UnfitMetadataError
from ..coordination import Coordinator, RemoteFailure
from ..errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EngineStateError,
    IncompatibleStateError,
    LoadError,
    UntrustedCheckpointError,
)
from ..info import CheckpointInfo, CheckpointRef, plain_fields
from .joint_opening import open_same

T = TypeVar("T")

_LOAD_ERRORS: dict[str, type[LoadError]] = {
    cls.__name__: cls
    for cls in (
        CheckpointNotFoundError,
        CorruptCheckpointError,
        IncompatibleStateError,
        UnfitMetadataError,
        UntrustedCheckpointError,
    )
}
_LOAD = "load"


class Agreement:
    """The catalog as all ranks see it. Owns nothing.

    A load has one uid from its choice of a checkpoint to the state's word that it took what was read, and one
    more for each checkpoint that it tries: a rank that leaves the load, at whatever point, fails the first,
    and with it whatever the others are at.
    """

    def __init__(
        self, catalog: Catalog, coordinator: Coordinator, *, timeout: float, opened: Opened | None = None
    ) -> None:
        """
        Args:
            timeout: seconds for a file system to show every rank what one has seen.
            opened: what all ranks have open already; they load nothing else.
        """
        self._catalog = catalog
        self._source = opened or catalog
        self._coordinator = coordinator
        self._timeout = timeout
        self._told_to_all: weakref.WeakSet[CheckpointError] = weakref.WeakSet()
        """Errors that every rank raises alike."""

    async def latest(self, ordinal: int) -> CheckpointInfo | None:
        """The newest whole checkpoint; each rank logs which newer ones are not, and why. Ranks: all must call
        it."""

        async def find() -> Any:
            info, passed_over = await self._catalog.latest()
            return info and plain_fields(info), dict(passed_over)

        uid = self._coordinator.uid(ordinal, "latest")
        try:
            plain, passed_over = await self._told(uid, "latest", find)
        except BaseException as error:
            self._coordinator.fail(uid, "latest", error)
            raise
        finally:
            self._coordinator.forget(uid)
        self._catalog.tell_passed_over(passed_over)
        return plain and self._catalog.info_from(plain)

    async def resolve(self, ordinal: int, ref: CheckpointRef, look: int = 0) -> list[str]:
        """The names to try, best first; ``look`` tells how often they were asked for. Ranks: all must call
        it, and ``restored`` or ``leave`` in the end. Raises CheckpointNotFoundError."""
        uid, phase = self._coordinator.uid(ordinal, _LOAD), f"choose {look}" if look else "choose"
        names: list[str] = await self._told(uid, phase, lambda: self._source.resolve(ref))
        return names

    async def _told(self, uid: str, phase: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        """The coordinator asks, all get its answer."""

        async def decide(messages: Sequence[None]) -> list[Any]:
            # one look for all: by their own, ranks might choose differently where a file system lags
            return [await ask()] * len(messages)

        try:
            return await self._coordinator.exchange(uid, phase, None, decide)
        except (RemoteFailure, CheckpointError, OSError) as error:
            raise await self.common(uid, phase, error, None) from error

    async def restored(self, ordinal: int, name: str) -> None:
        """The state took what was read of ``name``. Ranks: all must call it. Raises LoadError for ranks whose
        state did not."""
        uid = self._coordinator.uid(ordinal, _LOAD)
        try:
            await self._coordinator.exchange(uid, "restore", None, _nothing)
        except RemoteFailure as failure:
            raise await self.common(uid, "restore", failure, name, flag=True) from failure
        self._coordinator.forget(uid)

    async def concluded(
        self, ordinal: int, error: CheckpointError | MemoryError
    ) -> CheckpointError | MemoryError:
        """What this rank raises because of ``error``, its own: the same as every other rank."""
        if self._coordinator.world_size == 1 or error in self._told_to_all:
            return error
        name = error.checkpoint_id if isinstance(error, LoadError) else None
        return await self.common(self._coordinator.uid(ordinal, _LOAD), "load", error, name)

    async def common(
        self, uid: str, phase: str, error: BaseException, name: str | None, *, flag: bool = False
    ) -> CheckpointError:
        """The error of all ranks for ``uid``, which failed: with ``error`` here, or elsewhere. Raises
        ``error`` itself where nobody else is asked."""
        coordinator = self._coordinator
        if not isinstance(error, RemoteFailure):
            coordinator.fail(uid, phase, error)
        if isinstance(error, EngineStateError):  # it takes no part any more
            raise error
        # one rank whose targets were touched makes the load half done for all
        flag = flag or (isinstance(error, CorruptCheckpointError) and error.partially_loaded)
        verdict, touched = await coordinator.settle(uid, flag=flag)
        failures = dict(verdict) or (error.failures if isinstance(error, RemoteFailure) else {})
        if not failures:
            raise error
        made = _load_error(RemoteFailure(failures), name, touched=touched)
        self._told_to_all.add(made)
        return made

    def leave(self, ordinal: int, error: BaseException) -> None:
        """This rank loads no further, because of ``error``. On the engine's loop."""
        uid = self._coordinator.uid(ordinal, _LOAD)
        # in this order: of what is forgotten nobody is told
        self._coordinator.fail(uid, "load", error)
        self._coordinator.forget(uid)

    def attempt(self, ordinal: int, number: int, name: str) -> Attempt:
        """The load's attempt ``number``, at ``name``. Ranks: all must make it."""
        return Attempt(self, self._coordinator, ordinal, number, name)

    async def open(self, uid: str, name: str) -> Contents:
        """Open ``name``, the same state of it on all ranks."""
        return await open_same(self._source, self._coordinator, uid, name, timeout=self._timeout)


def _unexpected_of_all(reports: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[str]:
    """Names that are unexpected on some rank and that no rank has.

    Args: ``reports``: per rank, what is unexpected there and the top-level names of its state.
    """
    lists = [set(names) for names, _ in reports]
    # a rank that names the subtree and does not report the name has it
    owners = [tuple(f"{prefix}." for prefix in prefixes) for _, prefixes in reports]
    # by a dict, not a set: every rank reports them in one order
    return [
        name
        for name in dict.fromkeys(name for names, _ in reports for name in names)
        if all(
            name in mine or not f"{name}.".startswith(own) for mine, own in zip(lists, owners, strict=True)
        )
    ]


class Attempt:
    """One checkpoint that a load tries: first opened, then loaded; in between the caller's thread looks at
    what it holds. Owns what it opened until ``load``, ``give_up`` or ``leave`` ends.

    Ranks: all must call ``open``, ``agree`` as often as each other, and ``load``; each raises on every rank
    what it raises on one.
    """

    def __init__(
        self, agreement: Agreement, coordinator: Coordinator, ordinal: int, number: int, name: str
    ) -> None:
        self._agreement = agreement
        self._coordinator = coordinator
        self.name = name
        self._whole = coordinator.uid(ordinal, _LOAD)
        self._uid = coordinator.uid(ordinal, _LOAD, variant=f"{number} {name}")
        self._ranks = Together(coordinator, self._uid)
        self._contents: Contents | None = None
        self._ending: asyncio.Task[None] | None = None

    async def open(self) -> Contents:
        """The checkpoint as the coordinator sees it."""

        async def open_it() -> Contents:
            # kept at once: a cancellation that comes now loses what is handed on
            self._contents = await self._agreement.open(self._uid, self.name)
            return self._contents

        return await self._together(open_it)

    def hand_over(self) -> Contents:
        """What was opened is the caller's from here on. On the engine's loop."""
        self._coordinator.forget(self._uid)
        contents, self._contents = self._contents, None
        assert contents is not None
        return contents

    async def agree(self, wishes: Sequence[str]) -> list[str]:
        """The names that any rank wishes to ask for their state."""
        return await self._together(lambda: self._ranks.wished(wishes))

    async def load(self, load: Callable[[Together], Awaitable[T]]) -> T:
        """What ``load`` gives; the checkpoint is closed then."""
        value = await self._together(functools.partial(self._load, load))
        await self._end()
        return value

    async def give_up(self, error: BaseException) -> BaseException:
        """This rank goes no further, because of ``error``; gives what it raises, as every other rank."""
        try:
            # a cancellation, or what ends a program: it stays itself here, and fails the load for the others
            if not isinstance(error, (RemoteFailure, CheckpointError, OSError)):
                self._coordinator.fail(self._uid, "load", error)
                return error
            # a rank that left the whole load took this attempt with it
            failed = self._whole if self._coordinator.has_failed(self._whole) else self._uid
            return await self._agreement.common(failed, "load", error, self.name, flag=self._ranks.are_ready)
        finally:
            await self._end()

    def leave(self, error: BaseException) -> None:
        """The caller goes no further, because of ``error``, which may have come between two steps. On the
        engine's loop."""
        if self._contents is not None:
            self._coordinator.fail(self._uid, "load", error)
            self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _load(self, load: Callable[[Together], Awaitable[T]]) -> T:
        assert self._contents is not None
        value = await load(self._ranks)
        await self._coordinator.exchange(self._uid, "done", None, _nothing)
        # not before: other ranks of this host may want to read the same
        await self._contents.reader.give_back()
        return value

    async def _together(self, step: Callable[[], Awaitable[T]]) -> T:
        # an attempt has a uid of its own, under which nobody hears of a rank that left the load as a whole
        left = functools.partial(self._coordinator.failed, self._whole)
        try:
            return await run_unless(left, step)
        except BaseException as error:
            common = await self.give_up(error)
            if common is error:
                raise
            raise common from error

    async def _end(self) -> None:
        self._coordinator.forget(self._uid)
        contents, self._contents = self._contents, None
        if contents is not None:
            # a cancelled load must not leave files open either
            with anyio.CancelScope(shield=True):
                await contents.close()


class Together:
    """What the ranks tell each other while they load one checkpoint."""

    def __init__(self, coordinator: Coordinator, uid: str) -> None:
        self._coordinator = coordinator
        self._uid = uid
        self.are_ready = False
        self._rounds = 0

    async def wished(self, names: Sequence[str]) -> list[str]:
        """The ``names`` of all ranks. Ranks: all must call it."""

        async def decide(reports: Sequence[list[str]]) -> list[list[str]]:
            return [sorted(set().union(*reports))] * len(reports)

        # numbered: an exchange is known by its phase, and a load may ask more than once
        self._rounds += 1
        phase = f"ask {self._rounds}"
        return await self._coordinator.exchange(self._uid, phase, list(names), decide)

    async def planned(
        self, plan: bytes, decide: Callable[[Sequence[bytes]], Awaitable[list[bytes]]]
    ) -> bytes:
        """What ``decide``, on the coordinator, makes of this rank's ``plan``, given all of them. Ranks: all
        must call it."""
        return await self._coordinator.exchange(self._uid, "reads", plan, decide)

    @property
    def is_coordinator(self) -> bool:
        return self._coordinator.is_coordinator

    async def unexpected(self, names: Sequence[str], prefixes: Collection[str]) -> list[str]:
        """Names that no rank expects; this one does not expect ``names``. Ranks: all must call it."""

        async def decide(reports: Sequence[tuple[list[str], list[str]]]) -> list[list[str]]:
            return [_unexpected_of_all(reports)] * len(reports)

        report = (list(names), sorted(prefixes))
        return await self._coordinator.exchange(self._uid, "unexpected", report, decide)

    async def ready(self) -> None:
        """To be awaited before a target is touched. Ranks: all must call it."""
        await self._coordinator.exchange(self._uid, "ready", None, _nothing)
        self.are_ready = True


async def _nothing(messages: Sequence[None]) -> list[None]:
    return [None] * len(messages)


def _load_error(failure: RemoteFailure, name: str | None, *, touched: bool) -> CheckpointError:
    """What all ranks raise when some failed: the class of the first one's, if that is a LoadError. What a
    storage raised is a LoadError, also on the rank that it was raised on."""
    first = next(error for _, error in sorted(failure.failures.items()))
    cls = _LOAD_ERRORS.get(first.type_name, LoadError)
    if cls is CorruptCheckpointError:
        tensors = dict.fromkeys(name for error in failure.failures.values() for name in error.tensors)
        return CorruptCheckpointError(
            str(failure), checkpoint_id=name, partially_loaded=touched, tensors=tuple(tensors)
        )
    return cls(str(failure), checkpoint_id=name)
