"""Prunes a root by a policy: what may go, what is in the way, and what has gone.

Enters: a Catalog, a Storage, a policy. Leaves: fewer checkpoints, and the word of each. Invariant: the newest
checkpoint that is whole stays, looked at anew each time; so does whatever is not whole, is being read, or was
replaced since it was judged. Whatever can't be removed now is tried again by the next run.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from .._concurrency import BlockingThreads, for_each
from ..errors import CheckpointNotFoundError, StorageError
from ..storage import InUseError, Storage
from .catalog import Catalog, Record
from .retention import Retention, RetentionPlan, is_of_a_step, plan_retention

logger = logging.getLogger(__name__)

_PROVEN = 16
"""How many of the newest that stay must be whole to count: each is looked at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What one run did."""

    plan: RetentionPlan
    removed: tuple[str, ...]
    in_use: tuple[str, ...]
    """Left, because somebody reads them."""
    failed: tuple[str, ...]
    """Left, because the storage would not remove them, which was logged."""


class Pruner:
    """Applies one policy to one root, again and again. Owns nothing."""

    def __init__(
        self,
        catalog: Catalog,
        storage: Storage,
        policy: Retention,
        threads: BlockingThreads,
        *,
        removals_at_once: int = 4,
    ) -> None:
        self._catalog = catalog
        self._storage = storage
        self._policy = policy
        self._threads = threads
        self._removals_at_once = removals_at_once
        self._whole: dict[str, Record] = {}
        """What was found whole, as it was then."""
        self._told: set[tuple[str, str]] = set()

    async def plan(self, *, pinned: Mapping[str, str] | None = None) -> RetentionPlan:
        """What a run would keep and remove now. Removes nothing.

        Args: ``pinned``: name -> why it stays, besides what a link points to.
        Raises: StorageError; whatever the policy raises.
        """
        return (await self._judged(pinned or {}))[0]

    async def prune(self, *, pinned: Mapping[str, str] | None = None) -> Pruned:
        """Remove what the policy does not keep. Cancellation: waits for the removals under way. Raises: as
        ``plan``, before anything was removed."""
        plan, records = await self._judged(pinned or {})
        outcomes: dict[str, str] = {}

        async def remove(name: str) -> None:
            outcomes[name] = await self._remove(records[name])

        await for_each(plan.removed, remove, at_once=min(self._removals_at_once, len(plan.removed)))

        def those(outcome: str) -> tuple[str, ...]:
            return tuple(name for name in plan.removed if outcomes[name] == outcome)

        if removed := those("removed"):
            logger.info("%r removed %d checkpoints: %s", self._policy, len(removed), ", ".join(removed))
        return Pruned(plan=plan, removed=removed, in_use=those("in use"), failed=those("failed"))

    async def _judged(self, given: Mapping[str, str]) -> tuple[RetentionPlan, dict[str, Record]]:
        inventory = await self._catalog.records()
        pinned = {name: f"the link {link!r}" for name, link in inventory.aliases.items()}
        pinned |= given
        records = {record.checkpoint_id: record for record in inventory.records}
        while True:
            # in a thread: of ten thousand it takes tens of milliseconds
            plan = await self._threads.run(
                plan_retention, list(records.values()), self._policy, pinned=pinned
            )
            broken = await self._broken(plan, records) if plan.removed else []
            if not broken:
                return plan, records
            # they count for nothing, and are left to whoever wants to mend them
            for name in broken:
                del records[name]

    async def _broken(self, plan: RetentionPlan, records: dict[str, Record]) -> list[str]:
        """The newest of those that stay which are not whole: a policy must not count on them."""
        newest = [name for name in reversed(list(plan.kept)) if is_of_a_step(records[name])][:_PROVEN]
        self._whole = {name: record for name, record in self._whole.items() if records.get(name) == record}
        broken: list[str] = []
        for name in newest:
            # the newest each time: the others go because it is there
            if name == newest[0] or name not in self._whole:
                if await self._catalog.info(name) is None:
                    broken.append(name)
                else:
                    self._whole[name] = records[name]
        return broken

    async def _remove(self, record: Record) -> str:
        name = record.checkpoint_id
        try:
            if not await self._catalog.is_still(record):
                return "replaced"
            await self._storage.remove(name, unless_read=True)
        except InUseError as error:
            logger.debug("%r stays for now: %s", name, error)
            return "in use"
        except CheckpointNotFoundError:
            return "gone"  # another process was faster
        except Exception as error:  # a storage of the user's may raise anything
            if isinstance(error, StorageError) and error.errno == errno.ENOENT:
                return "gone"
            if (name, str(error)) not in self._told:
                self._told.add((name, str(error)))
                logger.warning("%r could not be removed, and is tried again later: %s", name, error)
            return "failed"
        return "removed"
