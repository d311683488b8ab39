"""What the async engine and its blocking twin are made of: one constructor, one way to open, the same verbs.

Enters: what callers pass to either of them. Leaves: generators, which one awaits and the other waits for in
the caller's thread (see _concurrency/verbs.py). Invariant: neither twin has logic of its own.
"""

from __future__ import annotations

import os

from .._concurrency import Verb
from ..catalog import Retention
from ..coordination import Coordination
from ..events import Observer
from ..formats import DISTCP, Format
from ..options import Limits, Timeouts
from ..planning import PlanningOptions
from ..response import AsyncSaveResponse
from ..schedule import Preemption, SavePolicy, SaveSchedule
from ..staging import Stager, StagingOptions
from ..storage import Storage
from ..trust import Trust
from .admission import normal_step
from .lifetime import Lifetime
from .load_context import LoadContext
from .loads import Loads
from .reads import Reads
from .release import check_torch
from .removals import Removals
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
        format: Format = DISTCP,
        retention: Retention | None = None,
        coordination: Coordination = Coordination(),
        limits: Limits = Limits(),
        timeouts: Timeouts = Timeouts(),
        trust: Trust = Trust(),
        observer: Observer | None = None,
        policy: SavePolicy | None = None,
    ) -> None:
        """
        Args:
            root: a directory (``~`` is the home directory), made by the first save; a URL, which is
                ``file:///absolute/path`` or ``memory://name`` for MemoryStorage; or a Storage, which stays
                the caller's to close.
            staging: how the state is copied, or a Stager to share, which stays the caller's to close.
            planning: DCP's planners, and whether plans are reused.
            format: how data files are written. A load reads what it finds, whatever this is.
            retention: which checkpoints stay once a newer one is durable: ``KeepLatest(3)``; None: all.
            coordination: which processes save together.
            limits: how much goes on at once.
            timeouts: how long to wait.
            trust: which pickled leaves a load accepts (a save refuses the others), and whether links out of
                the root are followed.
            observer: is told each event, on the engine's thread.
            policy: when ``should_save`` says that a save is due: ``Every(steps=100) | OnSignal()``.
        """
        setup = make_setup(
            root,
            staging,
            planning=planning,
            format=format,
            coordination=coordination,
            limits=limits,
            timeouts=timeouts,
            trust=trust,
            observer=observer,
            policy=policy,
            retention=retention,
        )
        self._life = life = Lifetime(setup)
        self._schedule = SaveSchedule(policy, timeout=timeouts.coordination, waited=lambda: life.hooks.waited)
        self._saves, self._removals = Saves(life, self._schedule.saved), Removals(life)
        context = LoadContext(life)
        self._loads, self._reads = Loads(context), Reads(context)

    def __repr__(self) -> str:
        life = self._life
        return f"<CheckpointEngine {life.setup.storage!r} {life.state}, {len(self.pending)} pending>"

    def __del__(self) -> None:
        life = self.__dict__.get("_life")  # a constructor may have failed
        schedule = self.__dict__.get("_schedule")
        if schedule is not None:
            schedule.end()
        if life is not None:
            life.dropped(repr(self))

    def _opening(self) -> Verb[None]:
        check_torch()  # before threads start: a torch that can't be read back opens nothing
        self._schedule.check_thread()
        with self._life.storage_errors("open"):
            yield from self._life.opening()
        resources = self._life.resources
        # last: ranks agree on a step by way of those, once they have met
        self._schedule.begin(resources.coordinator, resources.loop)

    def _leaving(self, exc_type: type[BaseException] | None) -> Verb[None]:
        yield from self._ending(self._life.leaving(exc_type))

    def _closing(self) -> Verb[None]:
        yield from self._ending(self._life.closing())

    def _aborting(self) -> Verb[None]:
        yield from self._ending(self._life.aborting())

    def _ending(self, end: Verb[None]) -> Verb[None]:
        try:
            yield from end
        finally:
            self._schedule.end()  # last: until here a second signal must not end the process

    def should_save(self, step: int) -> bool:
        """Whether ``step`` is to be saved: by the engine's policy, or since the process was asked to stop.

        Ask at each step, behind it, on every rank; asked again about a step that is not saved yet, it gives
        the same answer. Costs microseconds, and sends nothing: what is due by the clock or a signal is agreed
        on in the background, and a rank waits here, for the time of a few messages, only while that goes on.

        Raises: PreemptionError if the process was asked to stop and the ranks could not agree on a step;
            EngineStateError; TypeError and ValueError for what is no step.
        Ranks: all get the same answer for the same step.
        """
        self._life.check_open()
        return self._schedule.should_save(normal_step(step))

    @property
    def preempted(self) -> bool:
        """Whether the process was asked to stop and ``should_save`` has told the step to stop at: save it and
        leave the loop.

        Ranks: it becomes true at the same step on all.
        """
        return self._schedule.stop_step is not None

    def preemption(self, *signals: int, grace: float = 30.0) -> Preemption:
        """A block in which one of ``signals`` (SIGTERM, if none is named) to any rank makes all of them save
        at one step and leave::

            with engine.preemption(signal.SIGTERM):
                for step in range(start, num_steps):
                    train_step()
                    if engine.should_save(step):
                        await engine.save(state, step=step)
                    if engine.preempted:
                        break

        Leaving it waits until that checkpoint is durable; in a coroutine ``async with`` waits without holding
        the loop. A second signal changes nothing, but for a second Ctrl-C. Handlers that were there before
        are called as well. They are there again behind the block; if it was asked to stop or has failed, when
        the engine has closed, so that nothing cuts the last uploads off.

        Args:
            grace: seconds from the signal until the process will be killed.
        Raises: on leaving, PreemptionError if the checkpoint is not durable within ``grace``, or failed;
            EngineStateError outside of the main thread.
        Ranks: all should enter it; a signal to one is enough.
        """
        self._life.check_open()
        rank = self._life.resources.coordinator.rank
        return Preemption(self._schedule, self._life.inside, rank, signals, grace)

    @property
    def pending(self) -> tuple[AsyncSaveResponse, ...]:
        """Saves in flight, oldest first."""
        return tuple(writer.response for writer in self._life.book.pending())
