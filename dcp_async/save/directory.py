"""The directory of one save, from the transaction that leases it to its end.

Enters: a request, the plan's layout of this rank's file. Leaves: a Transaction to write with. Invariant: it
is opened once, by whoever needs it first, and aborted unless it was committed; what can't be aborted now is
left to a later save.
"""

from __future__ import annotations

import logging

from ..formats import FileLayout, uids_named_in
from ..storage import Transaction, is_sharing
from .attachments import Attachments
from .file_writer import FileNames
from .request import SaveRequest
from .services import Carryover, SaveServices

logger = logging.getLogger(__name__)


class SaveDirectory:
    """Where one save writes. Owns its transaction."""

    def __init__(
        self,
        request: SaveRequest,
        services: SaveServices,
        carryover: Carryover,
        *,
        uid: str,
        attachments: Attachments,
    ) -> None:
        self._request = request
        self._services = services
        self._carryover = carryover
        self._uid = uid
        self._attachments = attachments
        self._transaction: Transaction | None = None

    @property
    def transaction(self) -> Transaction:
        """The save's transaction, from ``open`` on."""
        assert self._transaction is not None
        return self._transaction

    @property
    def names(self) -> FileNames:
        """What this rank's files are called."""
        return FileNames(self._services.coordinator.rank, self._uid)

    async def open(self, layout: FileLayout) -> None:
        """Lease the directory; a second call does nothing. The coordinator does before the others are told
        to write, and again when it comes to write itself."""
        coordinator = self._services.coordinator
        if self._transaction is not None:
            return
        name, replace = self._request.response.checkpoint_id, self._request.replace
        led_from = None if coordinator.is_coordinator else coordinator.coordinator_host
        files, shared = self.names.lengths(layout), self.names.public_lengths(layout)
        files |= self._attachments.lengths
        if coordinator.is_coordinator:
            files |= self.names.digests_lengths(layout)
        if coordinator.world_size == 1 or not shared:
            self._transaction = await self._services.storage.begin(
                name, files | shared, uid=self._uid, replace=replace, led_from=led_from
            )
        else:
            storage = self._services.storage
            assert is_sharing(storage)  # the engine would not have opened
            self._transaction = await storage.begin_shared(
                name, files, shared, uid=self._uid, replace=replace, led_from=led_from
            )

    async def sweep(self) -> None:
        """Remove what dead saves left, and finish what could not be undone before. Failing at it loses
        nothing."""
        try:
            for transaction in list(self._carryover.unfinished):
                await transaction.abort()
                # another save may have been as fast
                if transaction in self._carryover.unfinished:
                    self._carryover.unfinished.remove(transaction)
            if self._services.coordinator.is_coordinator:
                # only the format reads a `.metadata`: a storage unpickles nothing
                await self._services.storage.sweep(named=uids_named_in)
        except Exception as error:
            logger.warning("could not sweep leftovers under %r: %s", self._services.storage, error)

    async def close(self) -> None:
        """Undo what was not committed."""
        if self._transaction is None:
            return
        try:
            await self._transaction.abort()  # of a committed one there is nothing left to undo
        except Exception as error:
            # the save has its own outcome; the next one tries again
            self._carryover.unfinished.append(self._transaction)
            logger.warning("could not clean up after %r: %s", self._request.response.checkpoint_id, error)
