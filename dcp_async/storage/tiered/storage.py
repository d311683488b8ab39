"""A storage of two tiers: saves go near, what was replicated is far, and both together are what there is.

    save -> near -[Replicator]-> far          load <- near, or far what near has not whole

Enters: a near and a far storage. Leaves: one storage. Invariant: no save waits for far; what is removed is
gone from both, and nothing copies it back; a name that both have means what is near.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from dataclasses import replace as replaced
from typing import Protocol, TypeAlias

from ..._concurrency import SignalSafeFuture
from ...errors import StorageError
from ..base import (
    LinkError,
    NamesUids,
    Reader,
    SharedTransaction,
    Storage,
    StoredCheckpoint,
    Transaction,
    gives_public_names,
    is_sharing,
)
from ..urls import storage_at
from .reader import TieredReader

logger = logging.getLogger(__name__)

Tier: TypeAlias = "Storage | str | os.PathLike[str]"

_TIMEOUT = 600.0
"""For calls to tiers that are made here from paths and URLs; an engine's own limit is around it."""


class Copier(Protocol):
    """Whoever copies from near to far."""

    def kept_from(self, name: str) -> AbstractAsyncContextManager[None]:
        """Within it ``name`` is being removed, and nothing copies it."""


class TieredStorage:
    """Checkpoints that are committed near, on a fast disk, and replicated far, to a bucket say.

    A save is as fast as on the near storage alone. An engine replicates in the background what is near and
    not far, also what an earlier process has left; ``response.replicated`` tells when. ``latest`` is the
    newest over both, and a load reads each file from near, or from far where near has it not or cut off.

    Ranks: all must see the same near storage, a shared directory; the coordinator replicates. A disk of each
    node's own is not for engines over several nodes: they refuse it when the first save finds that the ranks
    have different roots.

    Owns the storages that it makes of paths and URLs; those that it was given are the caller's to close.
    """

    def __init__(
        self,
        near: Tier,
        far: Tier,
        *,
        concurrency: int = 4,
        retry_seconds: float = 1.0,
        near_keeps: int | None = None,
    ) -> None:
        """
        Args:
            near: where saves go: a storage, or the path or URL of one.
            far: where they are replicated to.
            concurrency: parts on their way from near to far at a time; each takes 8 MiB of memory.
            retry_seconds: the pause before what could not be replicated is tried again; it doubles up to a
                minute.
            near_keeps: how many checkpoints stay near, the newest, once they are far; the others are read
                from there. None: all that far has.
        Raises: ValueError.
        """
        if concurrency < 1:
            raise ValueError(f"TieredStorage(concurrency=...) is at least 1, not {concurrency}")
        if not retry_seconds >= 0:
            raise ValueError(f"TieredStorage(retry_seconds=...) is at least 0, not {retry_seconds}")
        if near_keeps is not None and near_keeps < 1:
            raise ValueError(f"TieredStorage(near_keeps=...) is at least 1, not {near_keeps}")
        if near is far:
            raise ValueError(f"near and far are the same storage, {near!r}")
        self.concurrency, self.retry_seconds, self.near_keeps = concurrency, retry_seconds, near_keeps
        self._made: list[Storage] = []
        self.near, self.far = self._storage_of(near), self._storage_of(far)
        self.shares_files = is_sharing(self.near)
        self.gives_public_names = gives_public_names(self.near) and gives_public_names(self.far)
        # what far had when it was last looked at: a save does not wait for an answer from there
        self._far_names: set[str] | None = None
        self._copiers: set[Copier] = set()
        self._evicted: dict[str, SignalSafeFuture[None]] = {}
        """Names that are being removed near."""

    def _storage_of(self, tier: Tier) -> Storage:
        if not isinstance(tier, (str, os.PathLike)):
            return tier
        made = storage_at(
            tier, io_concurrency=2, timeout=_TIMEOUT, lease_max_age=_TIMEOUT, follow_links=False
        )
        self._made.append(made)
        return made

    def __repr__(self) -> str:
        return f"TieredStorage(near={self.near!r}, far={self.far!r})"

    async def connect(self) -> None:
        await self.near.connect()
        await self.far.connect()

    async def _look_far(self) -> Sequence[StoredCheckpoint]:
        stored = await self.far.list()
        self._far_names = {entry.name for entry in stored if entry.committed}
        return stored

    async def close(self) -> None:
        for storage in self._made:
            await storage.close()

    def abandon(self) -> None:
        self.near.abandon()
        self.far.abandon()

    # -- saving

    async def _check_free(self, name: str, *, replace: bool, led_from: str | None) -> None:
        """Raises: FileExistsError if only far has ``name``; near says so itself."""
        if led_from is None and (evicted := self._evicted.get(name)) is not None:
            await asyncio.wrap_future(evicted)  # or it would take the new one for the old
        if replace or led_from is not None:
            return
        if self._far_names is None:  # an engine has listed before it saves
            await self._look_far()
        if not self._far_names or name not in self._far_names:
            return
        try:  # once more: somebody else may have removed it there
            await (await self.far.open(name)).close()
        except FileNotFoundError:
            self._far_names.discard(name)
        else:
            raise FileExistsError(
                errno.EEXIST, "a checkpoint of this name is committed", f"{name} in {self.far!r}"
            )

    async def begin(
        self,
        name: str,
        files: Mapping[str, int | None],
        *,
        uid: str,
        replace: bool,
        led_from: str | None = None,
    ) -> Transaction:
        await self._check_free(name, replace=replace, led_from=led_from)
        return await self.near.begin(name, files, uid=uid, replace=replace, led_from=led_from)

    async def begin_shared(
        self,
        name: str,
        files: Mapping[str, int | None],
        shared: Mapping[str, int],
        *,
        uid: str,
        replace: bool,
        led_from: str | None = None,
    ) -> SharedTransaction:
        await self._check_free(name, replace=replace, led_from=led_from)
        assert is_sharing(self.near)  # nobody asks for it elsewhere
        return await self.near.begin_shared(name, files, shared, uid=uid, replace=replace, led_from=led_from)

    async def sweep(self, *, named: NamesUids) -> None:
        """Near alone: a save waits for it. What is left far is swept before each copy."""
        await self.near.sweep(named=named)

    # -- looking

    async def list(self) -> Sequence[StoredCheckpoint]:
        near = {entry.name: entry for entry in await self.near.list()}
        for entry in await self._look_far():
            is_near = entry.name in near and (near[entry.name].committed or near[entry.name].alias_of)
            if not is_near and (entry.committed or entry.name not in near):
                # of two that have one name, whoever remembers one must not take the other for it
                near[entry.name] = replaced(entry, version=f"far {entry.version}")
        return list(near.values())

    async def open(self, name: str) -> Reader:
        missing: Exception
        try:
            return TieredReader(await self.near.open(name), self.far, name)
        except LinkError:
            raise  # what lies behind it may be another one
        except FileNotFoundError as error:
            missing = error
        except StorageError as error:
            logger.warning("%r can't be opened near: %s; looking far", name, error)
            missing = error
        try:
            return await self.far.open(name)
        except FileNotFoundError:
            raise missing from None

    # -- removing

    async def remove(self, name: str, *, unless_read: bool = False) -> None:
        async with AsyncExitStack() as copies:
            for copier in list(self._copiers):
                await copies.enter_async_context(copier.kept_from(name))
            # near first: killed between the two, far has it still, and nothing is ever copied from there
            removed = [await _remove(tier, name, unless_read) for tier in (self.near, self.far)]
            if self._far_names is not None:
                self._far_names.discard(name)
        if not any(removed):
            raise StorageError.of(
                "remove", f"{name} in {self!r}", OSError(errno.ENOENT, "there is no such checkpoint")
            )

    # -- replication

    @contextmanager
    def replicated_by(self, copier: Copier) -> Iterator[None]:
        """Within it ``copier`` copies; a removal tells it."""
        self._copiers.add(copier)
        try:
            yield
        finally:
            self._copiers.discard(copier)

    @contextmanager
    def evicting(self, name: str) -> Iterator[None]:
        """Within it ``name``, which far has, is removed near, and no save of it begins."""
        evicted = self._evicted[name] = SignalSafeFuture()
        try:
            yield
        finally:
            del self._evicted[name]
            evicted.set_result(None)

    def arrived(self, name: str) -> None:
        """``name`` was replicated."""
        if self._far_names is not None:
            self._far_names.add(name)


async def _remove(tier: Storage, name: str, unless_read: bool) -> bool:
    try:
        await tier.remove(name, unless_read=unless_read)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True
