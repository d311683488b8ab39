"""``should_save``: one answer on all ranks, from the policy, the clock and what was asked for.

Enters: the trainer's steps, what saves cost, requests (the clock's, a signal's, another rank's). Leaves:
whether a step is saved. Invariant: what follows from the step alone is computed by each rank and costs no
message. All else goes by a sync point: the coordinator calls it, each engine answers with the step that its
trainer has reached and holds it at the next one, the latest is told to all, and the first step behind that is
saved. The engines answer, so that it ends whatever the trainers do.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence

import anyio

from .._concurrency import LoopThread
from ..coordination import Coordinator, RemoteFailure, SyncCalled
from ..errors import EngineStateError, PreemptionError
from ..response import AsyncSaveResponse
from .policies import SaveCost, SavePolicy
from .signals import SignalWatch, check_main_thread
from .step_gate import NOW, AgreedStep, Position, StepGate

logger = logging.getLogger(__name__)

_PHASE = "sync"
_NUM_COSTS = 5
"""Saves whose costs a policy sees: few, since states grow and disks are shared with others."""
_NO_STEP = "and no step to save at could be agreed on"
_SLACK_SECONDS = 2.0
"""How much longer a rank waits for the coordinator than that waits for the ranks: its word says who is
missing."""


async def _latest(positions: Sequence[Position]) -> list[Position]:
    return [max(positions)] * len(positions)


class SaveSchedule:
    """One engine's. ``begin`` gives it the other ranks."""

    def __init__(
        self,
        policy: SavePolicy | None,
        *,
        timeout: float,
        waited: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``timeout``: seconds that ranks have to agree, where nobody is about to stop. ``waited``: seconds
        for which optimizers have waited for saves so far."""
        self.clock = clock
        self.stopping_since: float | None = None
        """When this rank heard of a signal that asks it to stop; None again if the ranks could not agree."""
        self.stop_step: int | None = None
        """The step at which all ranks were told to save and stop; None before that."""
        self.last_save: AsyncSaveResponse | None = None
        """The save that was made when the ranks were told to stop."""
        self.is_block_left = False
        """Nobody waits for the last checkpoint any more."""
        self._policy = policy if policy is not None else SavePolicy()  # which is never due
        self._timeout, self._waited = timeout, waited
        self._gate = StepGate()
        self._costs: deque[SaveCost] = deque(maxlen=_NUM_COSTS)
        self._waited_before = 0.0
        """What ``waited`` gave at the last save."""
        self._since: float | None = None
        """When the interval of the policy began."""
        self._is_requested = False
        """The clock has asked for a save, which has not come yet."""
        self._answer: tuple[int, bool] | None = None
        """The last step that was asked about, and whether it is yet to be saved."""
        self._is_stop_called = False
        """The coordinator has called the sync point at which the ranks stop."""
        self._failure: PreemptionError | None = None
        self._coordinator: Coordinator
        self._loop: LoopThread
        self._watch = SignalWatch(self._policy.signals, self._ask_by_signal)
        self._kept: list[SignalWatch] = []

    def __repr__(self) -> str:
        return f"<SaveSchedule {self._policy!r} {self._gate!r}>"

    # The engine's life.

    def check_thread(self) -> None:
        """Raises EngineStateError if the policy's signals can't be watched from this thread."""
        if self._policy.signals:
            check_main_thread(f"open() with {self._policy!r}")

    def begin(self, coordinator: Coordinator, loop: LoopThread) -> None:
        """The engine is open: hear the other ranks and the policy's signals."""
        self._coordinator, self._loop = coordinator, loop
        if coordinator.world_size > 1:
            # no job of the engine's, which would wait for its end: this one ends with the coordination
            loop.submit(self._listen())
        if self._policy.signals:
            self._watch.install()

    def restore_at_end(self, watch: SignalWatch) -> None:
        """Keep the handlers of ``watch`` until the engine has ended."""
        self._kept.append(watch)

    def end(self) -> None:
        """The engine has ended. Callable from every thread."""
        # the last to be set is the first to go, so that each finds its own handler there
        for watch in [*reversed(self._kept), self._watch]:
            watch.restore()

    # In the trainer's thread.

    def should_save(self, step: int) -> bool:
        """See ``EngineVerbs.should_save``."""
        if self._answer is not None and self._answer[0] == step:
            return self._answer[1]  # asked again: it is the same question
        # both before the step arrives: what they need is where the trainer was
        previous = self._gate.previous(step)
        if self._coordinator.is_coordinator:
            self._look_at_clock()
        self._gate.arrive(step)
        if (failure := self.take_failure()) is not None:
            raise failure
        agreed = self._gate.take_agreed()
        answer = bool(agreed) or self._policy.at_step(step, previous)
        if any(one.stop for one in agreed) and self.stop_step is None:
            self.stop_step = step
            logger.info("saving step %d and stopping: %s", step, agreed[-1].why)
        if answer:
            self._restart_interval()
        self._answer = step, answer
        return answer

    def saved(self, response: AsyncSaveResponse, seconds: float) -> None:
        """``save()`` has returned ``response`` after ``seconds``."""
        waited = self._waited()
        if self._costs:  # optimizers wait behind their save
            self._costs[-1].stall += waited - self._waited_before
        self._waited_before = waited
        cost, began = SaveCost(stall=seconds), self.clock() - seconds

        def ended(_: object) -> None:
            cost.ended = self.clock() - began

        # before its callback, which the loop may call at once
        self._costs.append(cost)
        response.upload_completion.add_done_callback(ended)
        self._restart_interval()
        if self._answer is not None and self._answer[0] == response.step:
            self._answer = response.step, False  # it is saved
        if self.stop_step is not None and self.last_save is None:
            self.last_save = response

    def take_failure(self) -> PreemptionError | None:
        """Why the ranks could not be told a step to stop at; given once."""
        failure, self._failure = self._failure, None
        return failure

    def _look_at_clock(self) -> None:
        now = self.clock()
        if self._since is None:
            self._since = now
        # ranks that are about to stop may have left by the time that they would have agreed
        if self._is_requested or self.stopping_since is not None:
            return
        interval = self._policy.interval(self._costs)
        if interval is not None and now - self._since >= interval:
            self._is_requested = True
            why = f"a save is due by the clock of rank {self._coordinator.rank}"
            self._request(why, stop=False, seconds=self._timeout)

    def _restart_interval(self) -> None:
        self._since = self.clock()
        self._is_requested = False

    # In a signal handler, or wherever a save is asked for.

    def _ask_by_signal(self, signum: int) -> None:
        if self.stopping_since is None:
            why = f"rank {self._coordinator.rank} received {signal.Signals(signum).name}"
            self._request(why, stop=False, seconds=self._timeout)

    def stop(self, why: str, seconds: float) -> None:
        """Have all ranks save at one step and stop. Asked again it changes nothing, unless they could not."""
        if self.stopping_since is not None:
            return
        self.stopping_since = self.clock()
        self._request(why, stop=True, seconds=seconds)
        self._loop.call_soon(self._watch_stop, why, seconds)

    def _request(self, why: str, *, stop: bool, seconds: float) -> None:
        # without a lock of ours: a handler may have come into any line of should_save()
        if self._coordinator.world_size == 1:
            self._gate.agree(AgreedStep(after=NOW, why=why, stop=stop))
        else:
            self._loop.call_soon(self._coordinator.request_sync_point, why, stop, seconds)

    # On the loop.

    def _watch_stop(self, why: str, seconds: float) -> None:
        """Say at the deadline what is missing, since the trainer may hang; and give up on a coordinator that
        is gone."""
        since, loop = self.stopping_since, asyncio.get_running_loop()

        def tell() -> None:
            if self.stopping_since == since and (missing := self._missing()):
                logger.error("%s %g s ago, and %s", why, seconds, missing)

        def give_up() -> None:
            # a sync point that was called ends in its own way, and so may have the request itself
            if self.stopping_since == since and not self._is_stop_called:
                self._fail(f"{why}, {_NO_STEP}: the coordinating rank has not answered for {seconds:g} s")

        loop.call_later(seconds, tell)
        if self._coordinator.world_size > 1:
            loop.call_later(seconds + _SLACK_SECONDS, give_up)

    def _missing(self) -> str:
        """What the last checkpoint still waits for; empty if that is nothing."""
        if self.is_block_left:
            return ""  # its end has told
        if self.stop_step is None:
            return "should_save() has not been asked about a further step"
        if self.last_save is None:
            return f"save() of step {self.stop_step} has not returned"
        if not self.last_save.upload_completion.done():
            return f"{self.last_save.checkpoint_id!r} is not durable yet"
        return ""

    async def _listen(self) -> None:
        """Meet the other ranks at each sync point, until the coordination ends."""
        while True:
            try:
                called = await self._coordinator.sync_calls.next()
            except EngineStateError as error:
                logger.debug("no further sync points: %s", error)
                return
            await self._meet(called)

    async def _meet(self, called: SyncCalled) -> None:
        if called.stop:
            self._is_stop_called = True
            if self.stopping_since is None:
                self.stopping_since = self.clock()
                self._watch_stop(called.why, called.seconds)
        coordinator, position = self._coordinator, self._gate.hold()
        try:
            # a rank that is silent fails it after Timeouts.coordination, which is longer than most graces
            with anyio.fail_after(called.seconds + _SLACK_SECONDS):
                after = await coordinator.exchange(called.uid, _PHASE, position, _latest)
            rewinds, step = after
            self._gate.agree(AgreedStep(after=(rewinds, step), why=called.why, stop=called.stop))
        except (RemoteFailure, EngineStateError, TimeoutError, ValueError) as error:
            coordinator.fail(called.uid, _PHASE, error)
            self._miss(called, error)
        finally:
            # the trainer goes on whatever has happened, also when the loop ends
            self._gate.release()
            coordinator.forget(called.uid)

    def _miss(self, called: SyncCalled, error: Exception) -> None:
        told = f"{called.why}, {_NO_STEP}: {str(error) or 'no rank answers'}"
        if called.stop:
            self._fail(told)
        else:
            logger.warning("%s; training goes on", told)
            self._restart_interval()

    def _fail(self, why: str) -> None:
        self._failure = PreemptionError(why)
        # whoever trains on all the same may be asked to stop once more
        self.stopping_since, self._is_stop_called = None, False
