"""``preemption()`` on one rank, with real signals to this process, in both engines."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import (
    Adaptive,
    CheckpointEngine,
    EngineStateError,
    Every,
    OnSignal,
    PreemptionError,
    SaveError,
    sync,
)
from tests.support.doubles import PATIENCE, FaultyStorage


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A test that fails leaves none of its handlers behind; none of those that pass does either."""
    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(signum) for signum in watched]
    yield
    after = [signal.getsignal(signum) for signum in watched]
    for signum, handler in zip(watched, before, strict=True):
        signal.signal(signum, handler)
    assert after == before


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((1000,), float(step)), "step": step}


async def test_a_signal_has_the_step_saved_durable_at_the_end_of_the_block(root: Path) -> None:
    async with CheckpointEngine(root, policy=Every(steps=10)) as engine:
        async with engine.preemption(signal.SIGTERM):
            for step in range(100):
                if step == 13:
                    os.kill(os.getpid(), signal.SIGTERM)
                if engine.should_save(step):
                    response = await engine.save(state_of(step), step=step)
                if engine.preempted:
                    break
        assert response.upload_completion.done()
        assert step == 13
        assert [info.step async for info in engine.checkpoints()] == [0, 10, 13]
        assert not engine.should_save(14), "the policy goes on"
        assert engine.preempted


@pytest.mark.usefixtures("both_loops")
def test_the_blocking_twin_does_the_same(root: Path) -> None:
    with sync.CheckpointEngine(root) as engine:
        with engine.preemption(signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(signal.SIGINT)
            assert engine.should_save(3)
            engine.save(state_of(3), step=3)
        latest = engine.latest()
        assert latest is not None
        assert latest.step == 3


async def test_a_plain_block_serves_in_a_coroutine(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        with engine.preemption():
            signal.raise_signal(signal.SIGTERM)
            assert engine.should_save(0)
            response = await engine.save(state_of(0), step=0)
        assert response.upload_completion.done()


async def test_without_a_signal_nothing_happens(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        async with engine.preemption():
            assert not any(engine.should_save(step) for step in range(10))
        assert not engine.preempted
        assert await engine.latest() is None


async def test_signals_during_the_commit_leave_that_save_alone(faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        async with engine.preemption():
            with faulty.hold("commit") as gate:
                response = await engine.save(state_of(1), step=1)
                await gate.until_arrived()
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            assert (await response.upload_completion).step == 1
            assert engine.should_save(2)
            await engine.save(state_of(2), step=2)
        assert [info.step async for info in engine.checkpoints()] == [1, 2]


async def preempted(engine: CheckpointEngine, step: int, *, grace: float = 30.0) -> None:
    async with engine.preemption(grace=grace):
        signal.raise_signal(signal.SIGTERM)
        assert engine.should_save(step)
        await engine.save(state_of(step), step=step)


async def test_an_upload_that_outlasts_the_grace_is_an_error_and_goes_on(faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("commit") as gate:
            with pytest.raises(PreemptionError, match=r"\(step 7\) is not durable .* grace is 0.001 s"):
                await preempted(engine, 7, grace=0.001)
            await gate.until_arrived()
        latest = await engine.latest()
        assert latest is not None
        assert latest.step == 7


class Listener(logging.Handler):
    """Hands the first message of a logger to the loop of the test."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._loop = asyncio.get_running_loop()
        self.said: asyncio.Future[str] = self._loop.create_future()

    def emit(self, record: logging.LogRecord) -> None:
        self._loop.call_soon_threadsafe(self.said.set_result, record.getMessage())


async def test_what_a_trainer_that_hangs_is_missing_is_said_at_the_deadline(root: Path) -> None:
    listener, logger = Listener(), logging.getLogger("dcp_async.schedule.schedule")
    logger.addHandler(listener)
    try:
        async with CheckpointEngine(root) as engine, engine.preemption(grace=0.001):
            signal.raise_signal(signal.SIGTERM)
            said = await asyncio.wait_for(listener.said, PATIENCE)
            assert engine.should_save(7), "late is better than never"
            response = await engine.save(state_of(7), step=7)
            await response.upload_completion
    finally:
        logger.removeHandler(listener)
    assert (
        said
        == "rank 0 received SIGTERM 0.001 s ago, and should_save() has not been asked about a further step"
    )


async def test_a_save_that_fails_is_why_there_is_no_checkpoint(faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        faulty.fail("commit", OSError(28, "disk full"))
        with pytest.raises(PreemptionError, match=r"step 7 was to be .*disk full") as raised:
            await preempted(engine, 7)
        assert isinstance(raised.value.__cause__, SaveError)


async def test_the_error_of_the_block_itself_is_not_masked(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises(ValueError, match="less than"):
            await preempted(engine, 7 << 80)


async def test_no_signal_cuts_the_uploads_off_behind_a_block_that_failed(faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("commit"):
            await engine.save(state_of(1), step=1)
            with pytest.raises(ValueError, match="less than"):
                await preempted(engine, 7 << 80)
            signal.raise_signal(signal.SIGTERM)
        await engine.wait()
        assert [info.step async for info in engine.checkpoints()] == [1]


async def test_a_loop_that_ends_before_it_was_told_may_save_behind_the_block(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with CheckpointEngine(root) as engine:
        async with engine.preemption():
            assert not engine.should_save(9)
            signal.raise_signal(signal.SIGTERM)
        assert not engine.preempted
        await engine.save(state_of(9), step=9)
    assert "the loop ended before a step could be saved" in caplog.text


def test_a_block_is_entered_in_the_main_thread_and_once(root: Path) -> None:
    with sync.CheckpointEngine(root) as engine:
        preemption = engine.preemption()
        with ThreadPoolExecutor(1) as thread, pytest.raises(EngineStateError, match="main thread"):
            thread.submit(preemption.__enter__).result()
        with preemption:
            pass
        with pytest.raises(EngineStateError, match="entered once"):
            preemption.__enter__()
        with pytest.raises(ValueError, match="grace"):
            engine.preemption(grace=0)


async def test_a_signal_of_the_policy_saves_and_training_goes_on(root: Path) -> None:
    async with CheckpointEngine(root, policy=OnSignal(signal.SIGUSR1)) as engine:
        assert not engine.should_save(0)
        signal.raise_signal(signal.SIGUSR1)
        assert [engine.should_save(step) for step in range(1, 4)] == [True, False, False]
        signal.raise_signal(signal.SIGUSR1)
        assert [engine.should_save(step) for step in range(4, 6)] == [True, False]
        assert not engine.preempted


def test_an_engine_whose_policy_has_signals_opens_in_the_main_thread(root: Path) -> None:
    engine = sync.CheckpointEngine(root, policy=OnSignal())
    with ThreadPoolExecutor(1) as thread, pytest.raises(EngineStateError, match="main thread"):
        thread.submit(engine.open).result()
    with engine:
        pass


@pytest.mark.filterwarnings("ignore:.*was dropped while it was open:ResourceWarning")
def test_a_dropped_engine_gives_its_signals_back(root: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    engine = sync.CheckpointEngine(root, policy=OnSignal(signal.SIGUSR1)).open()
    finished = engine._life.resources.loop.finished
    del engine
    gc.collect()
    assert signal.getsignal(signal.SIGUSR1) == before
    finished.result(PATIENCE)


def test_a_question_to_an_engine_that_is_not_open_is_refused(root: Path) -> None:
    engine = sync.CheckpointEngine(root)
    with pytest.raises(EngineStateError, match="not open"):
        engine.should_save(0)
    with engine, pytest.raises(TypeError, match="step"):
        engine.should_save(1.5)  # type: ignore[arg-type]


async def test_the_cost_of_a_save_sets_the_next_interval(root: Path) -> None:
    """A real save: with an overhead of nearly 1 the next is due as soon as the first is durable."""
    async with CheckpointEngine(root, policy=Adaptive(overhead=0.999)) as engine:
        assert engine.should_save(0)
        response = await engine.save(state_of(0), step=0)
        await response.upload_completion
        steps = itertools.count(1)
        assert next(step for step in steps if engine.should_save(step)) > 0
