"""``with engine.preemption(SIGTERM)``: a signal has all ranks save at one step, and leaving waits for that.

Enters: a signal on any rank. Leaves: a durable checkpoint of the step that all were told, or PreemptionError.
Invariant: handlers do no more than ask; the trainer learns of it from ``should_save`` alone, at the same step
on every rank. Once they have asked, or the block has failed, the handlers stay until the engine has ended, so
that no further signal cuts its last uploads off.
"""

from __future__ import annotations

import logging
import signal
from types import TracebackType
from typing import Self

from .._concurrency import Inside, SignalSafeFuture, Verb, Wait, drive, drive_blocking
from ..errors import EngineStateError, PreemptionError
from ..response import AsyncSaveResponse
from .schedule import SaveSchedule
from .signals import SignalWatch

logger = logging.getLogger(__name__)


class Preemption:
    """A block in which signals ask for a last checkpoint. Where other tasks of the loop have to go on while
    that becomes durable, ``async with``."""

    def __init__(
        self, schedule: SaveSchedule, inside: Inside, rank: int, signals: tuple[int, ...], grace: float
    ) -> None:
        """``rank``: this one's, for messages; ``grace``: seconds from the signal until the checkpoint has to
        be durable."""
        if not grace > 0:
            raise ValueError(f"preemption(grace=...) is more than 0 seconds, not {grace}")
        self._schedule, self._inside, self._rank, self._grace = schedule, inside, rank, grace
        self._watch = SignalWatch(signals or (signal.SIGTERM,), self._ask)
        self._is_entered = False

    def __repr__(self) -> str:
        return f"<Preemption {self._watch!r} grace={self._grace:g} s>"

    def _ask(self, signum: int) -> None:
        why = f"rank {self._rank} received {signal.Signals(signum).name}"
        self._schedule.stop(why, self._grace)

    def __enter__(self) -> Self:
        if self._is_entered:
            raise EngineStateError("a preemption() is entered once; call it anew")
        self._watch.install()
        self._is_entered = True
        self._schedule.is_block_left = False
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        drive_blocking("preemption", self._leaving(exc_type), self._inside)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await drive("preemption", self._leaving(exc_type), self._inside)

    def _leaving(self, exc_type: type[BaseException] | None) -> Verb[None]:
        schedule = self._schedule
        failure = schedule.take_failure()
        is_quiet = exc_type is None and failure is None and schedule.stopping_since is None
        try:
            if exc_type is not None:
                if schedule.stopping_since is not None:
                    logger.error("asked to stop, and the block ended by %s before that", exc_type.__name__)
            elif failure is not None:
                raise failure
            elif schedule.stop_step is not None:
                yield from self._durable(schedule.stop_step, schedule.last_save)
            elif schedule.stopping_since is not None:  # only this rank's engine may know of it
                # no error: it would keep the trainer from the save that it makes behind its loop
                logger.warning("asked to stop, and the loop ended before a step could be saved for that")
        finally:
            schedule.is_block_left = True
            if is_quiet and schedule.stopping_since is None:
                self._watch.restore()
            else:
                # the process is about to end, and uploads may be in flight: no signal may cut them off
                schedule.restore_at_end(self._watch)

    def _durable(self, step: int, response: AsyncSaveResponse | None) -> Verb[None]:
        """Wait, until the deadline, for the save of ``step``. Raises PreemptionError."""
        # told on all ranks, so all of them raise this, and none waits for the others
        if response is None:
            raise PreemptionError(
                f"should_save({step}) told all ranks to save and stop, and the block was left without a save"
            )
        ended: SignalSafeFuture[None] = SignalSafeFuture()
        upload = response.upload_completion
        upload.add_done_callback(lambda _: ended.set_result(None))
        yield Wait(ended, timeout=max(0.0, self._seconds_left()))
        if not upload.done():
            late = self._grace - self._seconds_left()
            stage = "written" if response.staging_completion.done() else "copied from the state"
            raise PreemptionError(
                f"{response.checkpoint_id!r} (step {step}) is not durable {late:.1f} s after the signal, and "
                f"the grace is {self._grace:g} s; it is being {stage}, and the engine goes on with it as "
                "long as the process lives"
            )
        if (error := upload.exception()) is not None:
            raise PreemptionError(f"step {step} was to be the last checkpoint: {error}") from error

    def _seconds_left(self) -> float:
        since = self._schedule.stopping_since
        assert since is not None, "a step was told"
        return since + self._grace - self._schedule.clock()
