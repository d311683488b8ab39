"""Retention in an engine: after each commit what the policy does not keep is removed, in the background.

Enters: the word that a checkpoint is durable. Leaves: fewer checkpoints. Invariant: one run at a time, on the
coordinator alone; no save waits for one, or fails by one; what this engine saved last stays.
"""

from __future__ import annotations

import logging

from .._foreign import ENDINGS, words
from ..catalog import Pruner, Retention
from ..response import ResponseWriter
from .lifetime import Lifetime

logger = logging.getLogger(__name__)


class RetentionRuns:
    """The runs of one engine. Owns nothing. On the engine's loop."""

    def __init__(self, life: Lifetime) -> None:
        self._life = life
        self._pruner: Pruner | None = None
        self._last = ""
        """What was committed last, whatever its step."""
        self._far = ""
        """What was replicated last, where there is a far tier."""
        self._is_running = False
        self._is_due = False
        life.replication.then = self.run

    async def after(self, writer: ResponseWriter) -> None:
        """A save has ended; if it was committed, what need not stay goes.

        Returns when it has gone, or at once while another run is under way, which then begins anew.
        """
        if writer.upload.failure() is not None:
            return
        self._last = writer.response.checkpoint_id
        # with a far tier it is too early: an older one may be all that is far
        if self._life.setup.tiered is None:
            await self.run()

    async def run(self, far: str = "") -> None:
        """A checkpoint is as durable as it will be; ``far``: the one that a far tier has by now. Returns as
        ``after``."""
        self._far = far
        policy, have = self._life.setup.retention, self._life.resources
        if policy is None or not have.coordinator.is_coordinator:
            return
        self._is_due = True
        if self._is_running:
            return
        self._is_running = True
        try:
            while self._is_due:
                # before the run: a commit in the middle of it asks for one more
                self._is_due = False
                await self._run(policy)
        finally:
            self._is_running = False

    async def _run(self, policy: Retention) -> None:
        have = self._life.resources
        if self._pruner is None:
            # kept from run to run, since it knows what it has found whole
            self._pruner = Pruner(have.catalog, have.storage, policy, have.threads)
        try:
            # by step it may be an old one: of a run that went back, what it saves now must not go at once
            pinned = {self._last: "saved last"} if self._last else {}
            for writer in self._life.book.pending():
                pinned[writer.response.checkpoint_id] = "a save is replacing it"
            # near has newer ones, of which far may never hear
            pinned |= dict.fromkeys(filter(None, [self._far]), "the newest that is far")
            pinned |= dict.fromkeys(self._life.replication.left, "it is not far yet")
            await self._pruner.prune(pinned=pinned)
        except ENDINGS:
            raise
        except BaseException as error:  # the policy or the storage may be the user's own
            logger.warning("nothing was removed from %r by %r: %s", have.storage, policy, words(error))
