"""open, wait, close, abort: what each leaves behind, and who hears of a failure that nobody looked at."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import (
    CheckpointEngine,
    EngineStateError,
    Limits,
    SaveCancelled,
    SaveError,
    Timeouts,
    sync,
)
from tests.support.doubles import (
    PATIENCE,
    EventLog,
    FaultyStorage,
    Gate,
    assert_holds_only,
    assert_same,
    chain,
    committed,
    on_thread,
    random_tensor,
)
from tests.support.saves import PART, SMALL_OVERLAP, STATE

pytestmark = pytest.mark.usefixtures("both_loops")

WIDE = {"w": random_tensor(torch.uint8, (20 * PART,), 2)}


async def assert_refuses_work(engine: CheckpointEngine, why: str) -> None:
    with pytest.raises(EngineStateError, match=why):
        await engine.save(STATE)
    with pytest.raises(EngineStateError):
        await engine.load({"n": 0})
    with pytest.raises(EngineStateError):
        await engine.read()
    with pytest.raises(EngineStateError):
        await engine.latest()
    with pytest.raises(EngineStateError):
        [info async for info in engine.checkpoints()]


async def test_an_engine_that_was_not_opened_refuses_work(root: Path) -> None:
    engine = CheckpointEngine(root)
    await assert_refuses_work(engine, "open")
    assert not root.exists() or committed(root) == []


async def test_an_engine_that_is_being_opened_refuses_work(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save(STATE, step=100)).upload_completion
    engine = CheckpointEngine(root)
    opening = asyncio.create_task(engine.open())
    await asyncio.sleep(0)  # it waits for the engine's loop, which has not looked at the root
    with pytest.raises(EngineStateError, match="being opened"):
        await engine.save(STATE)
    with pytest.raises(EngineStateError, match="being opened"):
        await engine.latest()
    await opening
    await (await engine.save(STATE)).upload_completion
    await engine.close()
    assert committed(root) == ["step-00000100", "step-00000101"]


async def test_constructing_an_engine_starts_nothing(root: Path) -> None:
    before = threading.active_count()
    CheckpointEngine(root)
    assert threading.active_count() == before
    assert not root.exists()


async def test_a_closed_engine_refuses_work(root: Path) -> None:
    engine = await CheckpointEngine(root).open()
    await (await engine.save(STATE)).upload_completion
    await engine.close()
    await assert_refuses_work(engine, "clos")


async def test_close_and_abort_can_be_repeated(root: Path) -> None:
    engine = await CheckpointEngine(root).open()
    await (await engine.save(STATE)).upload_completion
    await asyncio.gather(engine.close(), engine.close())
    await engine.close()
    await engine.abort()
    await engine.close()


async def test_close_of_an_engine_that_was_never_opened_is_quiet(root: Path) -> None:
    await CheckpointEngine(root).close()
    await CheckpointEngine(root).abort()


async def test_close_drains(root: Path, faulty: FaultyStorage) -> None:
    engine = await CheckpointEngine(faulty, limits=Limits(pending_saves=2)).open()
    with faulty.hold("put") as gate:
        responses = [await engine.save(STATE, step=step) for step in range(2)]
        await gate.until_arrived()
        closing = asyncio.ensure_future(engine.close())
        await asyncio.sleep(0)
        assert not closing.done()
    await closing
    assert all(response.upload_completion.done() for response in responses)
    assert_holds_only(root, ["step-00000000", "step-00000001"])


async def test_a_closing_engine_takes_no_new_save(root: Path, faulty: FaultyStorage) -> None:
    engine = await CheckpointEngine(faulty, limits=Limits(pending_saves=2)).open()
    with faulty.hold("put") as gate:
        await engine.save(STATE, step=0)
        await gate.until_arrived()
        closing = asyncio.ensure_future(engine.close())
        await asyncio.sleep(0)
        late = asyncio.ensure_future(engine.save(STATE, step=1))
        await asyncio.wait({late}, timeout=5)
    await asyncio.wait({closing, late}, timeout=PATIENCE)
    with pytest.raises(EngineStateError):
        await late
    await closing
    assert_holds_only(root, ["step-00000000"])


async def test_wait_drains_and_stays_open(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, limits=Limits(pending_saves=2)) as engine:
        with faulty.hold("put"):
            responses = [await engine.save(STATE, step=step) for step in range(2)]
        await engine.wait()
        assert engine.pending == ()
        assert all(response.upload_completion.done() for response in responses)
        await (await engine.save(STATE, step=2)).upload_completion


async def test_cancelling_wait_leaves_the_saves_alone(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(STATE, step=0)
            await gate.until_arrived()
            waiting = asyncio.ensure_future(engine.wait())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert (await response.upload_completion).step == 0


async def test_abort_cancels_and_leaves_nothing(root: Path, faulty: FaultyStorage) -> None:
    engine = await CheckpointEngine(faulty, limits=Limits(pending_saves=2)).open()
    await (await engine.save(STATE, step=0)).upload_completion
    with faulty.hold("put") as gate:
        responses = [await engine.save(STATE, step=step) for step in (1, 2)]
        await gate.until_arrived()
        await engine.abort()
    for response in responses:
        with pytest.raises(SaveCancelled):
            await response.upload_completion
    assert_holds_only(root, ["step-00000000"])
    with pytest.raises(EngineStateError):
        await engine.save(STATE)


async def test_abort_releases_a_caller_in_save(root: Path, faulty: FaultyStorage) -> None:
    engine = await CheckpointEngine(faulty).open()
    with faulty.hold("put") as gate:
        await engine.save(STATE, step=1)
        await gate.until_arrived()
        queued = asyncio.ensure_future(engine.save(STATE, step=2))
        await asyncio.sleep(0)
        await engine.abort()
        with pytest.raises((SaveCancelled, EngineStateError)):
            await asyncio.wait_for(queued, PATIENCE)
    assert_holds_only(root, [])


async def test_abort_cuts_a_close_short(root: Path, faulty: FaultyStorage) -> None:
    engine = await CheckpointEngine(faulty).open()
    with faulty.hold("put") as gate:
        response = await engine.save(STATE)
        await gate.until_arrived()
        closing = asyncio.ensure_future(engine.close())
        await asyncio.sleep(0)
        await asyncio.wait_for(engine.abort(), PATIENCE)
        await asyncio.wait([closing], timeout=PATIENCE)
        assert closing.done()
        closing.exception()
    assert isinstance(response.upload_completion.exception(), SaveCancelled)
    assert_holds_only(root, [])


# --- leaving the block ----------------------------------------------------------------------------


async def test_leaving_by_an_error_drains_and_does_not_mask_it(root: Path, faulty: FaultyStorage) -> None:
    responses: list[Any] = []

    async def train() -> None:
        async with CheckpointEngine(faulty) as engine:
            responses.append(await engine.save(STATE, step=1))
            raise KeyError("the trainer's own")

    with pytest.raises(KeyError, match="the trainer's own"):
        await train()
    assert responses[0].upload_completion.done()
    assert_holds_only(root, ["step-00000001"])


async def test_leaving_by_an_error_masks_it_with_no_failure_of_a_save(
    root: Path, faulty: FaultyStorage
) -> None:
    async def train() -> None:
        async with CheckpointEngine(faulty) as engine:
            with faulty.fail_late("put", OSError("broken")):
                await engine.save(STATE, step=1)
            raise KeyError("the trainer's own")

    with pytest.raises(KeyError, match="the trainer's own"):
        await train()


class Trainer:
    """Saves once, then trains until it is cancelled."""

    def __init__(self, storage: FaultyStorage, exit_grace: float) -> None:
        self._storage, self._timeouts = storage, Timeouts(exit_grace=exit_grace)
        self._has_saved = asyncio.Event()
        self.response: Any = None

    async def _train(self) -> None:
        async with CheckpointEngine(self._storage, timeouts=self._timeouts) as engine:
            self.response = await engine.save(STATE, step=1)
            self._has_saved.set()
            await asyncio.Event().wait()

    async def cancelled(self, gate: Gate) -> asyncio.Task[None]:
        """Trains, and is cancelled while its save waits at ``gate``."""
        task = asyncio.ensure_future(self._train())
        await self._has_saved.wait()
        await gate.until_arrived()
        task.cancel()
        return task


async def test_leaving_by_cancellation_drains_within_the_grace(root: Path, faulty: FaultyStorage) -> None:
    with faulty.hold("put") as gate:
        task = await Trainer(faulty, PATIENCE).cancelled(gate)
        await asyncio.sleep(0)
        assert not task.done()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_holds_only(root, ["step-00000001"])


async def test_leaving_by_cancellation_aborts_after_the_grace(root: Path, faulty: FaultyStorage) -> None:
    trainer = Trainer(faulty, 0.05)
    with faulty.hold("put") as gate:
        task = await trainer.cancelled(gate)
        with pytest.raises(asyncio.CancelledError):
            await task
    assert isinstance(trainer.response.upload_completion.exception(), SaveCancelled)
    assert_holds_only(root, [])


async def test_a_second_cancellation_aborts_at_once(root: Path, faulty: FaultyStorage) -> None:
    with faulty.hold("put") as gate:
        task = await Trainer(faulty, 1000).cancelled(gate)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, PATIENCE)
    assert_holds_only(root, [])


# --- failures that nobody looked at ---------------------------------------------------------------


async def failed(engine: CheckpointEngine, faulty: FaultyStorage, step: int) -> Any:
    """A save that has failed, with its handles unseen."""
    with faulty.fail_late("seal", OSError(f"broken at {step}")):
        response = await engine.save(STATE, step=step)
    done = threading.Event()
    response.upload_completion.add_done_callback(lambda *_: done.set())
    assert await on_thread(lambda: done.wait(PATIENCE))
    faulty.heal()
    return response


async def test_wait_raises_an_unseen_failure_once(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        await failed(engine, faulty, 3)
        with pytest.raises(SaveError) as caught:
            await engine.wait()
        assert caught.value.step == 3
        assert any("broken at 3" in str(link) for link in chain(caught.value))
        await engine.wait()


async def test_close_raises_an_unseen_failure_and_closes_all_the_same(
    root: Path, faulty: FaultyStorage
) -> None:
    engine = await CheckpointEngine(faulty).open()
    await failed(engine, faulty, 3)
    with pytest.raises(SaveError):
        await engine.close()
    with pytest.raises(EngineStateError):
        await engine.save(STATE)
    await engine.close()


async def test_leaving_the_block_raises_an_unseen_failure(root: Path, faulty: FaultyStorage) -> None:
    with pytest.raises(SaveError):
        async with CheckpointEngine(faulty) as engine:
            await failed(engine, faulty, 3)


@pytest.mark.parametrize("look", ["await", "result", "exception"])
async def test_a_failure_that_was_looked_at_is_not_raised_again(
    root: Path, faulty: FaultyStorage, look: str
) -> None:
    async with CheckpointEngine(faulty) as engine:
        response = await failed(engine, faulty, 3)
        if look == "exception":
            assert isinstance(response.upload_completion.exception(), SaveError)
        elif look == "result":
            with pytest.raises(SaveError):
                response.upload_completion.result(0)
        else:
            with pytest.raises(SaveError):
                await response.upload_completion
        await engine.wait()


async def test_an_unseen_failure_of_an_earlier_save_is_not_lost_by_later_ones(
    root: Path, faulty: FaultyStorage
) -> None:
    async with CheckpointEngine(faulty) as engine:
        await failed(engine, faulty, 1)
        for step in range(2, 6):
            await (await engine.save(STATE, step=step)).upload_completion
        with pytest.raises(SaveError) as caught:
            await engine.wait()
        assert caught.value.step == 1


async def test_an_unseen_failure_is_logged_at_once(
    root: Path, faulty: FaultyStorage, caplog: pytest.LogCaptureFixture
) -> None:
    async with CheckpointEngine(faulty) as engine:
        response = await failed(engine, faulty, 3)
        records = [record for record in caplog.records if record.name.startswith("dcp_async")]
        assert any("step-00000003" in record.getMessage() and record.levelno >= 40 for record in records)
        response.upload_completion.exception()


# --- threads, loops, forks ------------------------------------------------------------------------


async def test_the_engine_runs_where_the_loop_factory_says(root: Path, both_loops: Any) -> None:
    log = EventLog()
    async with CheckpointEngine(root, observer=log) as engine:
        await (await engine.save(STATE)).upload_completion
        assert len(both_loops.loops) == 1
        assert both_loops.loops[0].is_running()
    assert threading.get_ident() not in log.threads
    assert len(log.threads) == 1


async def test_one_engine_serves_several_loops_and_threads(root: Path) -> None:
    async with CheckpointEngine(root, limits=Limits(pending_saves=4)) as engine:

        def other(step: int) -> Any:
            async def work() -> Any:
                response = await engine.save(STATE | {"n": step}, step=step)
                await response.upload_completion
                return await engine.read(step)

            return asyncio.run(work())

        results = await asyncio.gather(*(on_thread(functools.partial(other, step)) for step in range(4)))
    for step, result in enumerate(results):
        assert_same(result, STATE | {"n": step})


async def test_a_call_from_the_engines_own_thread_raises(root: Path) -> None:
    errors: list[BaseException] = []
    trainers: list[int] = []

    def react(event: Any) -> None:
        if threading.get_ident() in trainers:
            errors.append(AssertionError(f"{type(event).__name__} came on the trainer's thread"))
            return
        calls: tuple[Callable[[], object], ...] = (engine.latest, engine.wait, engine.close, engine.read)
        for call in calls:
            try:
                call()
            except BaseException as error:
                errors.append(error)
            else:
                errors.append(AssertionError(f"{call} came back"))

    engine = sync.CheckpointEngine(root, observer=EventLog(react))

    def whole_life() -> None:
        trainers.append(threading.get_ident())
        with engine:
            engine.save(STATE).upload_completion.result(PATIENCE)

    await on_thread(whole_life)
    assert errors
    assert [type(error) for error in errors] == [EngineStateError] * len(errors)


async def test_loads_and_saves_may_run_at_the_same_time(root: Path) -> None:
    async with CheckpointEngine(root, limits=Limits(pending_saves=2)) as engine:
        await (await engine.save(WIDE, step=0)).upload_completion
        targets = [{"w": torch.zeros_like(WIDE["w"])} for _ in range(4)]
        await asyncio.gather(
            *(engine.load(target, 0) for target in targets),
            *(_commit(engine, step) for step in range(1, 4)),
            engine.read(0),
        )
        for target in targets:
            assert_same(target, WIDE)


async def _commit(engine: CheckpointEngine, step: int) -> None:
    await (await engine.save(WIDE, step=step)).upload_completion


async def test_many_lives_leave_nothing(root: Path) -> None:
    for step in range(5):
        async with CheckpointEngine(root, staging=SMALL_OVERLAP) as engine:
            await engine.save(WIDE, step=step)


async def test_an_interrupt_that_comes_as_a_close_ends_is_raised_as_it_is(tmp_path: Path) -> None:
    engine = await CheckpointEngine(tmp_path).open()
    verb = engine._life.closing()
    drained = next(verb)
    await drained.wait()  # closed, and the verb does not know yet
    with pytest.raises(asyncio.CancelledError):
        verb.throw(asyncio.CancelledError())


async def test_an_open_that_is_cancelled_before_it_begins_leaves_nothing(tmp_path: Path) -> None:
    for _ in range(5):
        opening = asyncio.ensure_future(CheckpointEngine(tmp_path).open())
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening


async def test_an_open_that_is_cancelled_as_it_ends_leaves_nothing(tmp_path: Path) -> None:
    engine = CheckpointEngine(tmp_path)
    verb = engine._life.opening()
    await next(verb).wait()  # open, and the caller does not know yet
    undone = verb.throw(asyncio.CancelledError())
    await undone.wait()
    with pytest.raises(asyncio.CancelledError):
        next(verb)
