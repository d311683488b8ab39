"""Makes room near: what far has too goes there, but for the newest.

Enters: which names may go. Leaves: fewer checkpoints near. Invariant: what is removed near was seen far, and
no save of its name begins before it is gone.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from ...errors import StorageError
from ..base import InUseError, Storage
from .storage import TieredStorage

logger = logging.getLogger(__name__)


async def evict(tiers: TieredStorage, near: Storage, may_go: Callable[[str], bool]) -> None:
    """Remove all but the newest ``near_keeps`` from ``near``, as far as they may go. Raises StorageError."""
    if tiers.near_keeps is None:
        return
    committed = [entry for entry in await near.list() if entry.committed]
    committed.sort(key=lambda entry: entry.modified)
    for entry in committed[: -tiers.near_keeps]:
        # in one step with ``evicting``: one that is saved again is another one, and may be near alone
        if not may_go(entry.name):
            continue
        with tiers.evicting(entry.name):
            try:
                await near.remove(entry.name, unless_read=True)
            except InUseError:
                logger.debug("%s is being read near, and stays until another one is far", entry.name)
                continue
            except StorageError as error:
                if error.errno != errno.ENOENT:  # somebody else was as fast
                    raise
        logger.info("removed %s near; far has it", entry.name)
