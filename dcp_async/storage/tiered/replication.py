"""Replicates in the background what is near and not far, one checkpoint at a time, oldest first.

    scan, add -> waiting -> copy -> outcome
                   ^---- retry ----'

Enters: names. Leaves: an outcome for each. Invariant: a name that waits is copied, or found removed, damaged
or not ours to copy; what fails goes behind the others and is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Never, TypeAlias

from ..._concurrency import BlockingThreads, SignalSafeFuture
from ...errors import CheckpointError, CorruptCheckpointError, StorageError
from ..base import NamesUids, Reader
from ..deadline import LimitedStorage
from .claim import Claim
from .copying import CopyPlan, copy_checkpoint
from .eviction import evict
from .pace import Pace
from .storage import TieredStorage

logger = logging.getLogger(__name__)

Outcome: TypeAlias = Literal["far", "there", "removed", "damaged", "stale", "foreign"]
"""Copied; or far had it already; or why it is not far."""
PlanOf: TypeAlias = Callable[[str, Reader], Awaitable[CopyPlan | None]]
"""What to copy of a checkpoint; None if it is not ours. Raises CorruptCheckpointError, StorageError."""

_MOST_PAUSE = 60.0
_CLAIM_SECONDS = 10.0


@dataclass(slots=True)
class _Waiting:
    """A name that is to be copied."""

    since: int
    """How many saves had begun."""
    nbytes: int | None = None
    """How much is to be copied, once somebody has looked."""
    failures: int = 0


class Replicator:
    """The replication of one engine. Owns its task; ``stop`` ends it. On the engine's loop."""

    def __init__(
        self,
        storage: TieredStorage,
        plan_of: PlanOf,
        *,
        named: NamesUids,
        threads: BlockingThreads,
        timeout: float,
        ended: Callable[[str, Outcome], Awaitable[None]],
    ) -> None:
        """
        Args:
            plan_of: only a format knows what a checkpoint's files must hold.
            named: see ``Storage.sweep``.
            timeout: seconds for one call to either tier.
            ended: told what has become of each name; raises nothing.
        """
        self._storage = storage
        self._near, self._far = LimitedStorage(storage.near, timeout), LimitedStorage(storage.far, timeout)
        self._plan_of = plan_of
        self._named = named
        self._threads = threads
        self._timeout = timeout
        self._ended = ended
        self._waiting: dict[str, _Waiting] = {}
        self._kept: dict[str, int] = {}
        """Names that are being removed, and by how many."""
        self._task: asyncio.Task[None] | None = None
        self._copying: tuple[str, asyncio.Task[Outcome], SignalSafeFuture[None]] | None = None
        self._changed = asyncio.Event()
        self._is_scanned = self._is_ending = False
        self._is_claimed: bool | None = None
        self._failures = 0
        self.pace = Pace()
        self._far_names: set[str] = set()
        """What near has is far too, since this process has looked or copied."""
        self._copied_bytes = 0
        self._copied_seconds = 0.0
        self._current_bytes = 0

    def start(self) -> None:
        """Find out what is near and not far, and replicate that, and then what is added."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def add(self, name: str, nbytes: int) -> None:
        """``name`` was committed near."""
        self._far_names.discard(name)  # it may be another one
        self._waiting[name] = _Waiting(self.pace.begun, nbytes)
        self._changed.set()

    @asynccontextmanager
    async def kept_from(self, name: str) -> AsyncIterator[None]:
        """``name`` is being removed: its copy is stopped, and none begins."""
        self._kept[name] = self._kept.get(name, 0) + 1
        try:
            # a removal may come from another engine's loop, whose tasks can't wait for ours
            copying = self._copying
            if copying is not None and copying[0] == name:
                copying[1].get_loop().call_soon_threadsafe(copying[1].cancel)
                await asyncio.wrap_future(copying[2])
            yield
        finally:
            self._kept[name] -= 1
            if not self._kept[name]:
                del self._kept[name]
            if self._task is not None:
                self._task.get_loop().call_soon_threadsafe(self._changed.set)

    # -- the end

    @property
    def left(self) -> list[str]:
        """The names that are near and not far, oldest first."""
        return list(self._waiting)

    def left_text(self) -> str:
        """How much is left, and how long that will take."""
        known = [waiting.nbytes for waiting in self._waiting.values()]
        nbytes = sum(filter(None, known)) - self._current_bytes
        text = f"{len(known)} checkpoint{'s' * (len(known) != 1)}, {max(0, nbytes) / 1e9:.2f} GB"
        if None in known:
            text += " or more"
        if not self._copied_seconds:
            return f"{text}; how long that takes is not known yet"
        seconds = max(0, nbytes) * self._copied_seconds / max(1, self._copied_bytes)
        return f"{text}, about {seconds:.0f} s at the pace so far"

    async def drain(self, seconds: float) -> None:
        """Wait until nothing is left, ``seconds`` at most."""
        if self._task is None or self._is_idle() or not seconds:
            return
        if self._waiting:
            logger.info("replicating to %r before the end: %s", self._storage.far, self.left_text())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._is_idle():
                    self._changed.clear()
                    await self._changed.wait()

    def _is_idle(self) -> bool:
        # what another process replicates, this one can't wait for
        return self._is_claimed is False or (self._is_scanned and not self._waiting and not self._is_ending)

    async def stop(self) -> None:
        """End the copy that is under way; what is left stays near, and is found by the next that opens."""
        if self._task is None:
            return
        task, self._task = self._task, None
        task.cancel()
        await asyncio.wait({task})
        if self._waiting:
            logger.warning(
                "not replicated to %r yet: %s. It is whole in %r; the next engine that opens there goes on. "
                "To wait for it, await response.replicated of the last save before closing",
                self._storage.far,
                self.left_text(),
                self._storage.near,
            )

    # -- the work

    async def _run(self) -> None:
        claim = Claim(self._storage.near)
        try:
            with self._storage.replicated_by(self):
                while True:
                    try:
                        await self._run_on(claim)
                    except Exception as error:  # a tier may be anybody's
                        self._failures += 1
                        pause = min(
                            _MOST_PAUSE, self._storage.retry_seconds * 2 ** min(self._failures - 1, 16)
                        )
                        logger.warning(
                            "replication to %r failed, and is tried again in %g s: %s",
                            *(self._storage.far, pause, error),
                        )
                        await asyncio.sleep(pause)
        finally:
            claim.release()

    async def _run_on(self, claim: Claim) -> Never:
        while not self._is_claimed:
            self._is_claimed = await claim.take()
            if not self._is_claimed:  # another process replicates; should it die, this one goes on
                self._changed.set()
                await asyncio.sleep(_CLAIM_SECONDS)
        if not self._is_scanned:
            await self._scan()
        while True:
            name = await self._next()
            waiting = self._waiting[name]
            outcome = await self._copy_as_task(name, waiting)
            self._failures = 0
            self._is_ending = True  # a drain waits for this, too
            try:
                await self._end(name, waiting, outcome)
                await evict(self._storage, self._near, self._may_go)
            finally:
                self._is_ending = False
                self._changed.set()

    async def _scan(self) -> None:
        far = {entry.name: entry for entry in await self._far.list() if entry.committed}
        near = [entry for entry in await self._near.list() if entry.committed]
        # those that both have may be of two saves, which a look at each tells
        near.sort(key=lambda entry: (entry.name in far, entry.modified))
        self._waiting = {entry.name: _Waiting(self.pace.begun) for entry in near} | self._waiting
        self._is_scanned = True
        self._changed.set()

    async def _next(self) -> str:
        """The name to copy next: the oldest, those that have failed last."""
        while True:
            names = [name for name in self._waiting if name not in self._kept]
            if names:
                return min(names, key=lambda name: self._waiting[name].failures)
            self._changed.clear()
            await self._changed.wait()

    async def _copy_as_task(self, name: str, waiting: _Waiting) -> Outcome:
        """A task of its own: a removal ends it without ending the replication."""
        task = asyncio.get_running_loop().create_task(self._copy(name, waiting))
        ended: SignalSafeFuture[None] = SignalSafeFuture()
        self._copying = (name, task, ended)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        finally:
            self._copying, self._current_bytes = None, 0
            ended.set_result(None)
        if task.cancelled():
            return "removed"
        error = task.exception()
        if error is not None:
            waiting.failures += 1
            raise error
        return task.result()

    async def _end(self, name: str, waiting: _Waiting, outcome: Outcome) -> None:
        if outcome == "removed":
            while name in self._kept:
                self._changed.clear()
                await self._changed.wait()
            if await self._is_current(name, None):  # the removal has failed: it is still to be copied
                return
        if self._waiting.get(name) is waiting:  # else it was saved again meanwhile
            await self._ended(name, outcome)
        if self._waiting.get(name) is waiting:
            if outcome in ("far", "there"):
                self._far_names.add(name)
            del self._waiting[name]

    def _may_go(self, name: str) -> bool:
        """Whether far has what near has under ``name``, and nobody is about to change that."""
        return (
            name in self._far_names
            and name not in self._waiting
            and name not in self._kept
            and not self.pace.is_saving(name)
        )

    async def _copy(self, name: str, waiting: _Waiting) -> Outcome:
        try:
            reader = await self._near.open(name)
        except FileNotFoundError:
            return "removed"
        try:
            if (far := await self._far_metadata(name)) is not None and far == await _metadata(reader):
                return "there"
            plan = await self._plan_near(name, reader)
            if isinstance(plan, str):
                return plan
            waiting.nbytes = plan.nbytes
            if far is not None and await self._is_far_newer(name, plan):
                return "stale"
            await self._far.sweep(named=self._named)
            return await self._copy_plan(name, plan, reader, waiting, replace=far is not None)
        except CorruptCheckpointError as error:  # found on the way
            return await self._damaged(name, error)
        finally:
            await reader.close()

    async def _plan_near(self, name: str, reader: Reader) -> CopyPlan | Outcome:
        """What is to be copied, or why nothing is."""
        try:
            plan = await self._plan_of(name, reader)
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            return await self._damaged(name, error)  # a file is gone
        except CorruptCheckpointError as error:
            return await self._damaged(name, error)
        if plan is None:
            logger.warning("%r was not written by dcp_async, and is not replicated", name)
            return "foreign"
        return plan

    async def _damaged(self, name: str, error: CheckpointError) -> Outcome:
        if not await self._is_current(name, None):
            return "removed"
        logger.error("%r is damaged near, and is not replicated: %s", name, error)
        return "damaged"

    async def _copy_plan(
        self, name: str, plan: CopyPlan, reader: Reader, waiting: _Waiting, *, replace: bool
    ) -> Outcome:
        begun = time.monotonic()

        def copied(nbytes: int) -> None:
            self._current_bytes += nbytes

        await copy_checkpoint(
            name,
            plan,
            reader,
            self._far,
            replace=replace,
            concurrency=self._storage.concurrency,
            threads=self._threads,
            timeout=self._timeout,
            turn=lambda: self.pace.turn(waiting.since),
            copied=copied,
            is_current=lambda: self._is_current(name, plan.metadata),
        )
        await reader.give_back()
        seconds = time.monotonic() - begun
        self._copied_bytes += plan.nbytes
        self._copied_seconds += seconds
        logger.info("replicated %s: %d bytes in %.3f s", name, plan.nbytes, seconds)
        self._storage.arrived(name)
        return "far"

    async def _far_metadata(self, name: str) -> bytes | None:
        """What far has under this name; None if it has nothing."""
        try:
            reader = await self._far.open(name)
        except FileNotFoundError:
            return None
        try:
            return await _metadata(reader)
        finally:
            await reader.close()

    async def _is_far_newer(self, name: str, plan: CopyPlan) -> bool:
        """Whether far's checkpoint of this name, another one than near's, was saved later."""
        reader = await self._far.open(name)
        try:
            far = await self._plan_of(name, reader)
        except CorruptCheckpointError as error:
            logger.warning("%r is damaged far, and is replaced by the one that is near: %s", name, error)
            return False
        finally:
            await reader.close()
        if far is not None and far.time <= plan.time:
            return False
        logger.warning(
            "%r was saved far by somebody else, or later than near, and is not replaced there; remove one of "
            "the two, or save under another name",
            name,
        )
        return True

    async def _is_current(self, name: str, metadata: bytes | None) -> bool:
        """Whether near has ``name``, of this ``metadata`` if that is given."""
        try:
            reader = await self._near.open(name)
        except FileNotFoundError:
            return False
        try:
            return metadata is None or await reader.metadata() == metadata
        finally:
            await reader.close()


async def _metadata(reader: Reader) -> bytes:
    """What makes it a checkpoint; nothing of stock's ranks, which is never replicated."""
    try:
        return await reader.metadata()
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        return b""
