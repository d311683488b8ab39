"""Cancelled anywhere, a save leaves nothing: no name, no file, no task, no buffer; and the next one works."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import (
    AsyncSaveResponse,
    CheckpointEngine,
    Limits,
    SaveCancelled,
)
from dcp_async.catalog import Contents
from dcp_async.load import Attempt
from tests.support.doubles import (
    PATIENCE,
    FaultyStorage,
    Gate,
    LoopSpy,
    SteppingLoop,
    assert_holds_only,
    assert_same,
    committed,
    open_descriptors,
    random_tensor,
    replace_loops,
)
from tests.support.saves import PART, SMALL, SMALL_OVERLAP, STATE

WIDE: dict[str, Any] = {"w": random_tensor(torch.uint8, (20 * PART,), 2), "n": [1, {"x": torch.ones(3)}]}


async def save_and_cancel(engine: CheckpointEngine, state: dict[str, Any], gate: Gate) -> AsyncSaveResponse:
    """Save ``state`` as step 1, and cancel that once it waits at ``gate``."""
    response = await engine.save(state, step=1)
    await gate.until_arrived()
    response.cancel()
    return response


@pytest.mark.usefixtures("both_loops")
async def test_cancel_during_upload_leaves_nothing(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("put") as gate:
            response = await save_and_cancel(engine, STATE, gate)
            with pytest.raises(SaveCancelled) as caught:
                await response.upload_completion
        assert (caught.value.checkpoint_id, caught.value.step) == ("step-00000001", 1)
        await (await engine.save(STATE, step=2)).upload_completion
        assert_same(await engine.read(2), STATE)
    assert_holds_only(root, ["step-00000002"])


@pytest.mark.usefixtures("both_loops")
async def test_cancel_during_staging_fails_both_handles(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, staging=SMALL_OVERLAP) as engine:
        with faulty.hold("put") as gate:
            response = await save_and_cancel(engine, WIDE, gate)
            with pytest.raises(SaveCancelled):
                await response.staging_completion
            with pytest.raises(SaveCancelled):
                await response.upload_completion
        await (await engine.save(WIDE)).upload_completion
        assert_same(await engine.read(), WIDE)


@pytest.mark.usefixtures("both_loops")
@pytest.mark.parametrize("verb", ["begin", "put", "seal"])
async def test_cancel_at_each_storage_verb_leaves_nothing(
    root: Path, faulty: FaultyStorage, verb: str
) -> None:
    async with CheckpointEngine(faulty, staging=SMALL_OVERLAP) as engine:
        with faulty.hold(verb, times=1) as gate:
            response = await save_and_cancel(engine, WIDE, gate)
        with pytest.raises(SaveCancelled):
            await asyncio.wait_for(_upload(response), PATIENCE)
        assert committed(root) == []
        await (await engine.save(WIDE, step=1)).upload_completion
        assert_same(await engine.read(1), WIDE)
    assert_holds_only(root, ["step-00000001"])


@pytest.mark.usefixtures("both_loops")
async def test_cancel_during_the_commit_is_all_or_nothing(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, staging=SMALL_OVERLAP) as engine:
        with faulty.hold("commit", times=1) as gate:
            response = await save_and_cancel(engine, WIDE, gate)
        try:
            await asyncio.wait_for(_upload(response), PATIENCE)
        except SaveCancelled:
            assert committed(root) == []
        else:
            assert_same(await engine.read(1), WIDE)
        await (await engine.save(WIDE, step=2)).upload_completion
        assert_same(await engine.read(2), WIDE)


async def _upload(response: AsyncSaveResponse) -> Any:
    return await response.upload_completion


async def test_a_cancelled_save_takes_its_files_along(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, staging=SMALL_OVERLAP) as engine:
        with faulty.hold("put", nth=2) as gate:
            response = await engine.save(WIDE)
            await gate.until_arrived()
            response.cancel()
            with pytest.raises(SaveCancelled):
                await response.upload_completion
    assert_holds_only(root, [])


async def test_cancel_is_harmless_twice_and_after_the_commit(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        done = await engine.save(STATE)
        await done.upload_completion
        done.cancel()
        done.cancel()
        assert (await done.upload_completion).checkpoint_id == done.checkpoint_id
        with faulty.hold("put"):
            response = await engine.save(STATE)
            response.cancel()
            response.cancel()
            with pytest.raises(SaveCancelled):
                await response.upload_completion
        response.cancel()
    done.cancel()
    assert_holds_only(root, [done.checkpoint_id])


async def test_cancel_works_from_another_thread(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("put"):
            response = await engine.save(STATE)
            thread = threading.Thread(target=response.cancel)
            thread.start()
            thread.join()
            with pytest.raises(SaveCancelled):
                await response.upload_completion


async def test_a_cancelled_save_that_nobody_awaited_is_no_failure_of_wait(
    root: Path, faulty: FaultyStorage
) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("put"):
            response = await engine.save(STATE)
            response.cancel()
        await engine.wait()
        assert response.upload_completion.done()


async def test_cancelling_one_of_two_in_flight_leaves_the_other(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, limits=Limits(pending_saves=2)) as engine:
        with faulty.hold("put") as gate:
            first = await engine.save(STATE, step=1)
            second = await engine.save(STATE | {"n": 2}, step=2)
            await gate.until_arrived()
            first.cancel()
            with pytest.raises(SaveCancelled):
                await first.upload_completion
        assert (await second.upload_completion).step == 2
        assert_same(await engine.read(), STATE | {"n": 2})
        await (await engine.save(STATE, step=3)).upload_completion
    assert_holds_only(root, ["step-00000002", "step-00000003"])


@pytest.mark.usefixtures("both_loops")
@pytest.mark.parametrize("overlap", [False, True])
async def test_a_cancelled_call_of_save_means_no_checkpoint(
    root: Path, faulty: FaultyStorage, overlap: bool
) -> None:
    staging = SMALL_OVERLAP if overlap else SMALL
    async with CheckpointEngine(faulty, staging=staging) as engine:
        with faulty.hold("put", times=1) as gate:
            task = asyncio.ensure_future(engine.save(WIDE, step=1))
            await gate.until_arrived()
            if task.done():
                (await task).cancel()
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        await engine.wait()
        assert committed(root) == []
        assert engine.pending == ()
        await (await engine.save(WIDE, step=1)).upload_completion
        assert_same(await engine.read(1), WIDE)
    assert_holds_only(root, ["step-00000001"])


@pytest.mark.usefixtures("both_loops")
async def test_a_call_of_save_cancelled_in_the_queue_leaves_the_oldest_alone(
    root: Path, faulty: FaultyStorage
) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("put") as gate:
            first = await engine.save(STATE, step=1)
            await gate.until_arrived()
            task = asyncio.ensure_future(engine.save(STATE, step=2))
            for _ in range(5):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await first.upload_completion).step == 1
        await engine.wait()
        assert committed(root) == ["step-00000001"]
        await (await engine.save(STATE, step=2)).upload_completion
    assert_holds_only(root, ["step-00000001", "step-00000002"])


async def test_buffers_of_cancelled_saves_are_usable_again(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, staging=SMALL_OVERLAP) as engine:
        for step in range(12):
            with faulty.hold("put", nth=1 + step % 3) as gate:
                response = await engine.save(WIDE, step=step)
                await gate.until_arrived()
                response.cancel()
                with pytest.raises(SaveCancelled):
                    await response.upload_completion
            faulty.heal()
        await asyncio.wait_for(_upload(await engine.save(WIDE, step=100)), PATIENCE)
        assert_same(await engine.read(100), WIDE)
    assert_holds_only(root, ["step-00000100"])


@pytest.mark.usefixtures("both_loops")
async def test_a_cancelled_load_leaves_the_engine_working(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, staging=SMALL) as engine:
        await (await engine.save(WIDE)).upload_completion
        target: dict[str, Any] = {"w": torch.zeros_like(WIDE["w"]), "n": [0, {"x": torch.zeros(3)}]}
        with faulty.hold("read_into", times=1) as gate:
            task = asyncio.ensure_future(engine.load(target))
            await gate.until_arrived()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await engine.load(target)
        assert_same(target, WIDE)
        await (await engine.save(WIDE)).upload_completion


# --- cancel after k turns of the engine's loop, for every k --------------------------------------


def _from_engine_thread(loop: asyncio.AbstractEventLoop, act: Callable[[], object]) -> None:
    """Run `act` on the caller's loop while the engine's loop stands still."""
    done = threading.Event()

    def work() -> None:
        act()
        done.set()

    loop.call_soon_threadsafe(work)
    assert done.wait(PATIENCE)


async def _attempt_response(engine: CheckpointEngine, loop: SteppingLoop, turns: int, step: int) -> bool:
    """Cancel through the response; returns whether the save was over before its turn came."""
    box: dict[str, AsyncSaveResponse] = {}
    here = asyncio.get_running_loop()
    box["response"] = response = await engine.save(WIDE, step=step)
    loop.arm(turns, lambda: _from_engine_thread(here, box["response"].cancel))
    try:
        await response.upload_completion
    except SaveCancelled:
        return False
    return loop.disarm()


async def _attempt_call(engine: CheckpointEngine, loop: SteppingLoop, turns: int, step: int) -> bool:
    """Cancel the task that awaits save(); returns whether save() was over before its turn came."""
    here = asyncio.get_running_loop()
    task = asyncio.ensure_future(engine.save(WIDE, step=step))
    loop.arm(turns, lambda: _from_engine_thread(here, task.cancel))
    try:
        response = await task
    except asyncio.CancelledError:
        return False
    unused = loop.disarm()
    await response.upload_completion
    return unused


@pytest.mark.parametrize("attempt", [_attempt_response, _attempt_call], ids=["response", "call"])
@pytest.mark.parametrize("overlap", [False, True], ids=["staged", "overlap"])
async def test_cancelled_after_k_turns_for_every_k(
    root: Path, monkeypatch: pytest.MonkeyPatch, attempt: Any, overlap: bool
) -> None:
    spy: LoopSpy = replace_loops(monkeypatch, SteppingLoop)
    staging = SMALL_OVERLAP if overlap else SMALL
    num_cancelled = 0
    async with CheckpointEngine(root, staging=staging) as engine:
        (loop,) = spy.loops
        assert isinstance(loop, SteppingLoop)
        quiet = set(asyncio.all_tasks(loop))
        expected: list[str] = []
        for turns in range(1, 2000):
            name = f"step-{turns:08d}"
            over = await attempt(engine, loop, turns, turns)
            await engine.wait()
            assert engine.pending == ()
            if name in committed(root):
                expected.append(name)
            else:
                num_cancelled += 1
                assert committed(root) == expected
            assert len(set(asyncio.all_tasks(loop))) <= len(quiet)
            if over:
                break
        else:
            pytest.fail("a save takes more than 2000 turns")
        assert num_cancelled > 5 or attempt is _attempt_call
        await (await engine.save(WIDE, step=5000)).upload_completion
        assert_same(await engine.read(5000), WIDE)
        for survivor in expected:
            assert_same(await engine.read(survivor), WIDE)
    assert_holds_only(root, [*expected, "step-00005000"])


@pytest.mark.usefixtures("both_loops")
async def test_a_load_that_is_cancelled_between_two_steps_leaves_no_file_open(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens, loop = Attempt.open, asyncio.get_running_loop()

    async def open_and_cancel(attempt: Attempt) -> Contents:
        contents = await opens(attempt)
        loop.call_soon_threadsafe(loading.cancel)  # arrives before what was opened does
        return contents

    async with CheckpointEngine(root) as engine:
        await (await engine.save(STATE, step=1)).upload_completion
        monkeypatch.setattr(Attempt, "open", open_and_cancel)
        loading = asyncio.ensure_future(engine.load({"w": torch.zeros(1)}, 1))
        with pytest.raises(asyncio.CancelledError):
            await loading
        deadline = loop.time() + PATIENCE
        while left := [path for path in open_descriptors().values() if str(root) in path]:
            assert loop.time() < deadline, left
            await asyncio.sleep(0.01)
