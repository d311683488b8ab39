"""What ranks load, they load alike: one chooses the checkpoint, all open the same, and one outcome is
everybody's.

Enters: verbs of the engine on its loop, each with an ordinal that is the same on all ranks. Leaves: what the
verb gives, or on every rank the same error. Invariant: no rank touches a target before every rank has
finished its checks. With one rank it is the catalog alone.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import anyio

from .catalog import Catalog, Contents
from .coordinator import Coordinator
from .errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompatibleStateError,
    LoadError,
    StorageError,
    UntrustedCheckpointError,
)
from .remote import RemoteFailure
from .response import CheckpointInfo, CheckpointRef

T = TypeVar("T")

_LOAD_ERRORS: dict[str, type[LoadError]] = {
    cls.__name__: cls
    for cls in (
        CheckpointNotFoundError,
        CorruptCheckpointError,
        IncompatibleStateError,
        UntrustedCheckpointError,
    )
}
_RETRY_SECONDS = 0.2
_CHOOSE = "choose"


class Agreement:
    """The catalog as all ranks see it. Owns nothing."""

    def __init__(self, catalog: Catalog, coordinator: Coordinator, *, timeout: float) -> None:
        """``timeout``: seconds for a file system to show every rank what one has seen."""
        self._catalog = catalog
        self._coordinator = coordinator
        self._timeout = timeout

    async def steps(self) -> list[int]:
        """The steps of all checkpoints, committed or not. Local: ``open()`` has met the others already."""
        return await self._catalog.steps()

    async def latest(self, ordinal: int) -> CheckpointInfo | None:
        """The newest whole checkpoint. Ranks: all must call it."""

        async def find() -> Any:
            info = await self._catalog.latest()
            return info and info._plain()

        found = await self._told(ordinal, "latest", find)
        return found and self._catalog.info_from(found)

    async def resolve(self, ordinal: int, ref: CheckpointRef) -> list[str]:
        """The names to try, best first. Ranks: all must call it. Raises CheckpointNotFoundError."""
        names: list[str] = await self._told(ordinal, _CHOOSE, lambda: self._catalog.resolve(ref))
        return names

    def refuse(self, ordinal: int, error: BaseException) -> None:
        """This rank's state can't be loaded into, so it will not ``resolve``. On the engine's loop."""
        uid = self._coordinator.uid(ordinal, _CHOOSE)
        self._coordinator.fail(uid, _CHOOSE, error)
        self._coordinator.forget(uid)

    async def _told(self, ordinal: int, what: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        """The coordinator asks, all get its answer."""
        if self._coordinator.world_size == 1:
            return await ask()

        async def decide(messages: Sequence[None]) -> list[Any]:
            return [await ask()] * len(messages)

        uid = self._coordinator.uid(ordinal, what)
        try:
            return await self._coordinator.exchange(uid, what, None, decide)
        except RemoteFailure as failure:
            raise _load_error(failure, None, touched=False) from failure
        except BaseException as error:
            self._coordinator.fail(uid, what, error)
            raise
        finally:
            self._coordinator.forget(uid)

    async def attempt(
        self,
        ordinal: int,
        name: str,
        load: Callable[[Contents, Callable[[], Awaitable[None]]], Awaitable[T]],
    ) -> T:
        """Open ``name`` and ``load`` it. Ranks: all must call it.

        ``load`` gets the contents and what to await before it touches a target. Raises: what it raises, on
        every rank.
        """
        coordinator, ready = self._coordinator, False
        uid = coordinator.uid(ordinal, f"load {name}")

        async def all_ready() -> None:
            nonlocal ready
            await coordinator.exchange(uid, "ready", None, _nothing)
            ready = True

        try:
            contents = await self._open(uid, name)
            try:
                value = await load(contents, all_ready)
            finally:
                await contents.close()
            await coordinator.exchange(uid, "done", None, _nothing)
        except RemoteFailure as failure:
            raise _load_error(failure, name, touched=ready) from failure
        except BaseException as error:
            coordinator.fail(uid, "load", error)
            raise
        finally:
            coordinator.forget(uid)
        return value

    async def _open(self, uid: str, name: str) -> Contents:
        """Open ``name`` as the coordinator sees it."""
        mine = await self._catalog.open(name) if self._coordinator.is_coordinator else None

        async def decide(messages: Sequence[None]) -> list[str]:
            assert mine is not None
            return [mine.digest] * len(messages)

        try:
            digest = await self._coordinator.exchange(uid, "open", None, decide)
        except BaseException:
            if mine is not None:
                await mine.close()
            raise
        return mine or await self._open_same(name, digest)

    async def _open_same(self, name: str, digest: str) -> Contents:
        """A file system may show a rank an older state for a while."""
        deadline = anyio.current_time() + self._timeout
        while True:
            problem = "it is not the one that the coordinator sees"
            try:
                contents = await self._catalog.open(name)
                if contents.digest == digest:
                    return contents
                await contents.close()
            except (CheckpointNotFoundError, CorruptCheckpointError) as error:
                problem = str(error)
            except StorageError as error:
                if error.errno != errno.ESTALE:
                    raise
                problem = str(error)
            if anyio.current_time() > deadline:
                raise LoadError(
                    f"checkpoint {name!r} can't be opened on this rank: {problem}; "
                    "are all ranks given the same root?",
                    checkpoint_id=name,
                )
            await anyio.sleep(_RETRY_SECONDS)


async def _nothing(messages: Sequence[None]) -> list[None]:
    return [None] * len(messages)


def _load_error(failure: RemoteFailure, name: str | None, *, touched: bool) -> CheckpointError:
    """What a rank raises when another one failed: the same class, if that is one of ours."""
    first = next(iter(failure.failures.values()))
    cls = _LOAD_ERRORS.get(first.type_name, LoadError)
    if cls is CorruptCheckpointError:
        return CorruptCheckpointError(str(failure), checkpoint_id=name, partially_loaded=touched)
    return cls(str(failure), checkpoint_id=name)
