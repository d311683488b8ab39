"""The awaitables of a save: from any loop, any thread, any number of times, and never in the save's way."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import uvloop

from dcp_async import (
    CheckpointEngine,
    CheckpointInfo,
    EngineStateError,
    SaveError,
    StagingOptions,
)
from tests.support.doubles import (
    PATIENCE,
    EventLog,
    FaultyStorage,
    assert_holds_only,
    assert_same,
    chain,
    on_thread,
    random_tensor,
)
from tests.support.saves import PART, SMALL, SMALL_OVERLAP, STATE

pytestmark = pytest.mark.usefixtures("both_loops")

WIDE = {"w": random_tensor(torch.uint8, (40 * PART,), 2)}


async def test_upload_goes_on_while_the_callers_loop_is_blocked(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        seen = threading.Event()
        with faulty.hold("put") as gate:
            response = await engine.save(STATE)
            await gate.until_arrived()
        handle = response.upload_completion

        def watch() -> None:
            handle.result(PATIENCE)
            seen.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        turns = 0
        while not seen.is_set() and turns < 2_000_000_000 and watcher.is_alive():
            turns += 1  # pure Python on the loop's own thread: nothing here lets the caller's loop run
        watcher.join()
        assert seen.is_set()
        assert handle.done()
        assert_holds_only(root, [response.checkpoint_id])


async def test_a_caller_that_never_awaits_again_finds_the_checkpoint(root: Path) -> None:
    engine = await CheckpointEngine(root, staging=StagingOptions(overlap=True)).open()
    try:
        response = await engine.save(STATE, step=4)
        assert response.upload_completion.result(PATIENCE).step == 4
        assert_holds_only(root, ["step-00000004"])
    finally:
        await engine.close()


async def test_handles_say_what_completed(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        response = await engine.save(STATE, step=7)
        assert (response.checkpoint_id, response.step) == ("step-00000007", 7)
        await response.staging_completion
        staged: object = response.staging_completion.result(0)
        info = await response.upload_completion
    assert staged is None
    assert isinstance(info, CheckpointInfo)
    assert (info.checkpoint_id, info.step) == ("step-00000007", 7)


async def test_a_handle_can_be_awaited_twice_and_by_many(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("put"):
            response = await engine.save(STATE)
            waiters = [asyncio.ensure_future(_result(response.upload_completion)) for _ in range(5)]
            await asyncio.sleep(0)
        infos = [await waiter for waiter in waiters]
        infos += [await response.upload_completion, await response.upload_completion]
    assert {info.checkpoint_id for info in infos} == {response.checkpoint_id}


async def _result(handle: Any) -> Any:
    return await handle


async def test_a_handle_can_be_awaited_on_a_second_loop_while_it_is_pending(
    root: Path, faulty: FaultyStorage
) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(STATE)
            started = threading.Event()

            async def elsewhere() -> CheckpointInfo:
                started.set()
                info: CheckpointInfo = await response.upload_completion
                return info

            other = asyncio.ensure_future(on_thread(lambda: asyncio.run(elsewhere())))
            await on_thread(lambda: started.wait(PATIENCE))
            await gate.until_arrived()
            assert not response.upload_completion.done()
        assert (await other).checkpoint_id == response.checkpoint_id
        assert (await response.upload_completion).checkpoint_id == response.checkpoint_id


async def test_a_plain_thread_can_wait_for_a_handle(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        response = await engine.save(STATE)
        info = await on_thread(lambda: response.upload_completion.result(PATIENCE))
    assert info.checkpoint_id == response.checkpoint_id


async def test_handles_work_with_gather_and_with_cancel_scopes(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        response = await engine.save(STATE)
        _, info = await asyncio.gather(response.staging_completion, response.upload_completion)
        with anyio.fail_after(PATIENCE):
            assert (await response.upload_completion).checkpoint_id == info.checkpoint_id


async def test_a_trainer_on_uvloop_is_served_too(root: Path) -> None:
    async def life() -> str:
        async with CheckpointEngine(root) as engine:
            info: CheckpointInfo = await (await engine.save(STATE)).upload_completion
            assert_same(await engine.read(), STATE)
            return info.checkpoint_id

    def whole_life() -> str:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(life())

    assert (await on_thread(whole_life)) in [path.name for path in root.iterdir()]


async def test_a_handle_outlives_its_engine(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        response = await engine.save(STATE)
    assert (await response.upload_completion).checkpoint_id == response.checkpoint_id
    assert response.upload_completion.result(0).checkpoint_id == response.checkpoint_id
    assert response.upload_completion.exception() is None
    assert asyncio.get_running_loop() is not None
    info = await on_thread(lambda: asyncio.run(_result(response.upload_completion)))
    assert info.checkpoint_id == response.checkpoint_id


async def test_a_response_outlives_the_loop_that_saved(root: Path) -> None:
    engine = CheckpointEngine(root)

    def first_loop() -> Any:
        async def save() -> Any:
            await engine.open()
            return await engine.save(STATE, step=1)

        return asyncio.run(save())

    response = await on_thread(first_loop)
    try:
        assert (await response.upload_completion).step == 1
        assert_same(await engine.read(1), STATE)
    finally:
        await engine.close()


async def test_cancelling_a_waiter_leaves_the_save_alone(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(STATE)
            waiter = asyncio.ensure_future(_result(response.upload_completion))
            await gate.until_arrived()
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(_result(response.upload_completion), 0)
        assert (await response.upload_completion).checkpoint_id == response.checkpoint_id
        assert_holds_only(root, [response.checkpoint_id])


async def test_result_with_a_timeout_raises_and_leaves_the_save_alone(
    root: Path, faulty: FaultyStorage
) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("put"):
            response = await engine.save(STATE)
            with pytest.raises(TimeoutError):
                response.upload_completion.result(0)
            with pytest.raises(TimeoutError):
                response.upload_completion.result(timeout=0.001)
            assert not response.upload_completion.done()
        assert response.upload_completion.result(PATIENCE).checkpoint_id == response.checkpoint_id


async def test_staging_is_done_when_save_returns(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("put"):
            response = await engine.save(STATE)
            assert response.staging_completion.done()
            assert not response.upload_completion.done()


async def test_save_waits_for_staging_when_the_budget_is_small(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, staging=SMALL) as engine:
        with faulty.hold("put") as gate:
            task = asyncio.ensure_future(engine.save(WIDE))
            await gate.until_arrived()
            assert not task.done()
        response = await task
        await response.upload_completion
        assert_same(await engine.read(), WIDE)


async def test_callbacks_run_once_each_also_when_they_come_late(root: Path, faulty: FaultyStorage) -> None:
    calls: list[str] = []
    async with CheckpointEngine(faulty) as engine:
        called = threading.Event()
        with faulty.hold("put"):
            response = await engine.save(STATE)
            response.upload_completion.add_done_callback(lambda *_: calls.append("early"))
            response.upload_completion.add_done_callback(lambda *_: called.set())
            assert calls == []
        assert await on_thread(lambda: called.wait(PATIENCE))
        response.upload_completion.add_done_callback(lambda *_: calls.append("late"))
    assert calls == ["early", "late"]


async def test_a_callback_that_raises_harms_nobody(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        reached = threading.Event()

        def bad(*_: object) -> None:
            raise RuntimeError("a bad callback")

        with faulty.hold("put"):
            response = await engine.save(STATE)
            response.upload_completion.add_done_callback(bad)
            response.upload_completion.add_done_callback(lambda *_: reached.set())
        await response.upload_completion
        assert await on_thread(lambda: reached.wait(PATIENCE))
        await (await engine.save(STATE)).upload_completion


async def test_each_waiter_gets_a_fresh_error_from_the_one_cause(root: Path, faulty: FaultyStorage) -> None:
    cause = OSError(errno.ENOSPC, "no space left")
    async with CheckpointEngine(faulty) as engine:
        with faulty.fail_late("put", cause):
            response = await engine.save(STATE, step=3)
        with pytest.raises(SaveError) as first:
            await response.upload_completion
        with pytest.raises(SaveError) as second:
            await response.upload_completion
        with pytest.raises(SaveError) as third:
            response.upload_completion.result(PATIENCE)
        shown = response.upload_completion.exception()
    errors = [first.value, second.value, third.value]
    assert len({id(error) for error in errors}) == 3
    assert isinstance(shown, SaveError)
    for error in errors:
        assert (error.checkpoint_id, error.step) == ("step-00000003", 3)
        assert error.__cause__ is errors[0].__cause__
        assert any(link is cause for link in chain(error))


async def test_tracebacks_do_not_grow_with_each_waiter(root: Path, faulty: FaultyStorage) -> None:
    def depth(error: BaseException) -> int:
        count, frame = 0, error.__traceback__
        while frame is not None:
            count, frame = count + 1, frame.tb_next
        return count

    async with CheckpointEngine(faulty) as engine:
        with faulty.fail_late("put", OSError(errno.EIO, "broken")):
            response = await engine.save(STATE)
        depths = []
        for _ in range(4):
            with pytest.raises(SaveError) as caught:
                await response.upload_completion
            depths.append(max(depth(link) for link in chain(caught.value)))
    assert depths[-1] == depths[0]


async def test_a_staging_failure_fails_both_handles(root: Path, faulty: FaultyStorage) -> None:
    faulty.fail("put", OSError(errno.EIO, "broken"))
    async with CheckpointEngine(faulty, staging=SMALL_OVERLAP) as engine:
        response = await engine.save(WIDE)
        with pytest.raises(SaveError):
            await response.staging_completion
        with pytest.raises(SaveError):
            await response.upload_completion
        assert isinstance(response.staging_completion.exception(), SaveError)


async def test_waiting_on_the_engines_own_thread_raises_instead_of_hanging(
    root: Path, faulty: FaultyStorage
) -> None:
    box: dict[str, Any] = {}

    def react(event: Any) -> None:
        if type(event).__name__ == "SaveStaged":
            try:
                box["result"] = box["response"].upload_completion.result(PATIENCE)
            except BaseException as error:
                box["error"] = error

    log = EventLog(react)
    async with CheckpointEngine(faulty, staging=SMALL_OVERLAP, observer=log) as engine:
        with faulty.hold("put"):
            box["response"] = await engine.save(WIDE)
        await box["response"].upload_completion
    assert isinstance(box.get("error"), EngineStateError)


async def test_handles_and_responses_show_id_and_state(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        response = await engine.save(STATE, step=5)
        await response.upload_completion
        assert "step-00000005" in repr(response)
        assert repr(response.upload_completion) != object.__repr__(response.upload_completion)
