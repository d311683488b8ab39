"""Replication in an engine whose storage has a far tier: what is committed near is told, and answered for.

Enters: committed saves. Leaves: handles that tell when the checkpoint is far. Invariant: the coordinator
alone replicates; no save waits for it, or fails by it; at the end of the engine no handle is pending.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager

from .._foreign import ENDINGS
from ..catalog import copy_plan_of
from ..errors import ReplicationError
from ..formats import uids_named_in
from ..info import CheckpointInfo
from ..response import AsyncSaveResponse, ResponseWriter
from ..storage import CopyPlan, Outcome, Reader, Replicator, TieredStorage
from .resources import Resources

logger = logging.getLogger(__name__)

_WHY: dict[Outcome, str] = {
    "removed": "it was removed before it was far",
    "damaged": "it is damaged where it was saved, so nothing was replicated; see the log",
    "stale": "far has a later one of this name, which stays",
    "foreign": "dcp_async has not written what lies there by now",
}


class Replication:
    """The replication of one engine; nothing, where its storage has no far tier. Owns its Replicator. On the
    engine's loop."""

    def __init__(self, storage: TieredStorage | None) -> None:
        self.then: Callable[[str], Awaitable[object]] | None = None
        """Awaited with the name of each checkpoint that was copied."""
        self._storage = storage
        self._replicator: Replicator | None = None
        self._grace = 0.0
        self._waiting: dict[str, list[tuple[ResponseWriter, CheckpointInfo]]] = {}

    def start(self, have: Resources) -> None:
        """Replicate from now on, on the rank that does."""
        if self._storage is None or have.setup.is_reader or not have.coordinator.is_coordinator:
            return

        async def plan_of(name: str, reader: Reader) -> CopyPlan | None:
            return await copy_plan_of(name, reader, have.threads, timeout=have.timeout)

        self._grace = have.setup.timeouts.exit_grace
        self._replicator = Replicator(
            self._storage,
            plan_of,
            named=uids_named_in,
            threads=have.threads,
            timeout=have.timeout,
            ended=self._ended,
        )
        self._replicator.start()

    @property
    def left(self) -> list[str]:
        """The names that are to be replicated."""
        return [] if self._replicator is None else self._replicator.left

    def yielding(self, name: str) -> AbstractContextManager[None]:
        """Around a save of ``name``, which copies let pass by."""
        return contextlib.nullcontext() if self._replicator is None else self._replicator.pace.yielding(name)

    def committed(self, writer: ResponseWriter, info: CheckpointInfo) -> None:
        """The save of ``writer`` is near, which is all that there is where there is no far."""
        writer.committed(info)
        if self._replicator is not None:
            self._waiting.setdefault(info.checkpoint_id, []).append((writer, info))
            self._replicator.add(info.checkpoint_id, info.nbytes)
        elif self._storage is not None:
            why = "this rank is not told; the coordinator replicates, ask there"
            writer.replicated(_error(writer.response, why))

    async def _ended(self, name: str, outcome: Outcome) -> None:
        for writer, info in self._waiting.pop(name, ()):
            is_far = outcome in ("far", "there")
            writer.replicated(info if is_far else _error(writer.response, _WHY[outcome]))
        if outcome == "far" and self.then is not None:
            try:
                await self.then(name)
            except ENDINGS:
                raise
            except Exception as error:
                logger.warning("after %r was replicated: %s", name, error)

    async def drain(self, patience: float | None) -> None:
        """Wait until all is far, for ``exit_grace`` at most, and ``patience`` seconds if that is given."""
        if self._replicator is not None:
            await self._replicator.drain(self._grace if patience is None else min(self._grace, patience))

    async def stop(self) -> None:
        """End; handles that are pending are told so."""
        if self._replicator is not None:
            await self._replicator.stop()
        why = "the engine closed before it was far; the next one that opens there goes on"
        for writer, _ in itertools.chain(*self._waiting.values()):
            writer.replicated(_error(writer.response, why))
        self._waiting.clear()


def _error(response: AsyncSaveResponse, why: str) -> ReplicationError:
    return ReplicationError(
        f"{response.checkpoint_id!r} is committed near, and not known to be far: {why}",
        checkpoint_id=response.checkpoint_id,
        step=response.step,
        phase="commit",
    )
