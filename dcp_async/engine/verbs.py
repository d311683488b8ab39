"""What the async engine and its blocking twin are made of: one constructor, one way to open, the same verbs.

Enters: what callers pass to either of them. Leaves: generators, which one awaits and the other waits for in
the caller's thread (see _concurrency/verbs.py). Invariant: neither twin has logic of its own.
"""

from __future__ import annotations

import os

from .._concurrency import Verb
from ..coordination import Coordination
from ..events import Observer
from ..options import Limits, Timeouts
from ..planning import PlanningOptions
from ..response import AsyncSaveResponse
from ..staging import Stager, StagingOptions
from ..storage import Storage
from ..trust import Trust
from .lifetime import Lifetime
from .load_context import LoadContext
from .loads import Loads
from .reads import Reads
from .release import check_torch
from .resources import make_setup
from .saves import Saves


class EngineVerbs:
    """Base of both engines. Owns their lifetime, and with it what they make."""

    def __init__(
        self,
        root: Storage | str | os.PathLike[str],
        *,
        staging: Stager | StagingOptions = StagingOptions(),
        planning: PlanningOptions = PlanningOptions(),
        coordination: Coordination = Coordination(),
        limits: Limits = Limits(),
        timeouts: Timeouts = Timeouts(),
        trust: Trust = Trust(),
        observer: Observer | None = None,
    ) -> None:
        """
        Args:
            root: a directory (``~`` is the home directory), made by the first save; a URL, which is
                ``file:///absolute/path`` or ``memory://name`` for MemoryStorage; or a Storage, which stays
                the caller's to close.
            staging: how the state is copied, or a Stager to share, which stays the caller's to close.
            planning: DCP's planners, and whether plans are reused.
            coordination: which processes save together.
            limits: how much goes on at once.
            timeouts: how long to wait.
            trust: which pickled leaves a load accepts (a save refuses the others), and whether links out of
                the root are followed.
            observer: is told each event, on the engine's thread.
        """
        self._life = Lifetime(
            make_setup(
                root,
                staging,
                planning=planning,
                coordination=coordination,
                limits=limits,
                timeouts=timeouts,
                trust=trust,
                observer=observer,
            )
        )
        self._saves = Saves(self._life)
        context = LoadContext(self._life)
        self._loads = Loads(context)
        self._reads = Reads(context)

    def __repr__(self) -> str:
        life = self._life
        return f"<CheckpointEngine {life.setup.storage!r} {life.state}, {len(self.pending)} pending>"

    def __del__(self) -> None:
        life = self.__dict__.get("_life")  # a constructor may have failed
        if life is not None:
            life.dropped(repr(self))

    def _opening(self) -> Verb[None]:
        check_torch()  # before threads start: a torch that can't be read back opens nothing
        with self._life.storage_errors("open"):
            yield from self._life.opening()

    @property
    def pending(self) -> tuple[AsyncSaveResponse, ...]:
        """Saves in flight, oldest first."""
        return tuple(writer.response for writer in self._life.book.pending())
