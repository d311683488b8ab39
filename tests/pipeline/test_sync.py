"""The blocking twin: the same verbs, arguments and guarantees for trainers without an event loop."""

from __future__ import annotations

import asyncio
import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_async
from dcp_async import (
    CheckpointExistsError,
    CheckpointInfo,
    CheckpointNotFoundError,
    EngineStateError,
    SaveCancelled,
    SaveError,
    StagingOptions,
)
from dcp_async.sync import CheckpointEngine
from tests.support.doubles import (
    ASIDE_BYTES,
    PATIENCE,
    FaultyStorage,
    TrainingRun,
    assert_holds_only,
    assert_same,
)
from tests.support.saves import PART, SMALL, STATE


@pytest.mark.parametrize(
    "verb", ["__init__", "open", "save", "load", "read", "latest", "wait", "close", "abort"]
)
def test_the_twin_takes_the_same_arguments(verb: str) -> None:
    def shape(engine: type) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(getattr(engine, verb)).parameters.values()
        return [(parameter.name, parameter.kind, str(parameter.default)) for parameter in parameters]

    assert shape(CheckpointEngine) == shape(dcp_async.CheckpointEngine)
    assert not inspect.iscoroutinefunction(getattr(CheckpointEngine, verb))


@pytest.mark.usefixtures("both_loops")
def test_a_whole_life(root: Path) -> None:
    with CheckpointEngine(root, staging=SMALL) as engine:
        assert engine.latest() is None
        response = engine.save(STATE, step=3, notes={"a": 1})
        assert isinstance(response.upload_completion.result(PATIENCE), CheckpointInfo)
        target: dict[str, Any] = {"w": torch.zeros(100, 100), "n": 0}
        report = engine.load(target)
        assert (report.checkpoint_id, report.step, report.next_step) == ("step-00000003", 3, 4)
        assert_same(target, STATE)
        assert_same(engine.read(keys=["n"]), {"n": 1})
        engine.save(STATE, step=4)
        engine.wait()
        assert engine.pending == ()
        assert [info.step for info in engine.checkpoints()] == [3, 4]
        latest = engine.latest()
        assert latest is not None
        assert latest.step == 4
    assert_holds_only(root, ["step-00000003", "step-00000004"])


def test_open_and_close_without_a_block(root: Path) -> None:
    engine = CheckpointEngine(root).open()
    engine.save(STATE)
    engine.close()
    with pytest.raises(EngineStateError):
        engine.save(STATE)
    engine.close()


def test_errors_are_the_same(root: Path) -> None:
    with CheckpointEngine(root) as engine:
        with pytest.raises(CheckpointNotFoundError):
            engine.load({"n": 0})
        engine.save(STATE, step=1).upload_completion.result(PATIENCE)
        with pytest.raises(CheckpointExistsError):
            engine.save(STATE, step=1)


def test_abort_cancels(root: Path, faulty: FaultyStorage) -> None:
    engine = CheckpointEngine(faulty).open()
    with faulty.hold("put") as gate:
        response = engine.save(STATE)
        gate.wait_arrived()
        engine.abort()
    with pytest.raises(SaveCancelled):
        response.upload_completion.result(PATIENCE)
    assert_holds_only(root, [])


def test_a_save_goes_on_while_the_only_thread_computes(root: Path) -> None:
    with CheckpointEngine(root) as engine:
        response = engine.save(STATE)
        turns = 0
        while not response.upload_completion.done() and turns < 500_000_000:
            turns += 1
        assert response.upload_completion.done()


def test_leaving_the_block_raises_an_unseen_failure(faulty: FaultyStorage) -> None:
    def train() -> None:
        with CheckpointEngine(faulty) as engine, faulty.fail_late("put", OSError("broken")):
            engine.save(STATE)

    with pytest.raises(SaveError):
        train()


def test_leaving_the_block_does_not_mask_an_error(root: Path, faulty: FaultyStorage) -> None:
    def train() -> None:
        with CheckpointEngine(faulty) as engine:
            engine.save(STATE, step=1)
            raise KeyError("the trainer's own")

    with pytest.raises(KeyError, match="the trainer's own"):
        train()
    assert_holds_only(root, ["step-00000001"])


def test_handles_of_the_twin_can_be_awaited(root: Path) -> None:
    async def elsewhere(response: Any) -> Any:
        return await response.upload_completion

    with CheckpointEngine(root) as engine:
        response = engine.save(STATE)
        assert asyncio.run(elsewhere(response)).checkpoint_id == response.checkpoint_id


def test_several_threads_share_a_twin(root: Path) -> None:
    errors: list[BaseException] = []

    def work(step: int) -> None:
        try:
            engine.save(STATE | {"n": step}, step=step).upload_completion.result(PATIENCE)
            assert_same(engine.read(step), STATE | {"n": step})
        except BaseException as error:
            errors.append(error)

    with CheckpointEngine(root) as engine:
        threads = [threading.Thread(target=work, args=(step,)) for step in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert errors == []
    assert_holds_only(root, [f"step-{step:08d}" for step in range(5)])


async def test_the_twin_works_inside_a_running_loop(root: Path) -> None:
    with CheckpointEngine(root) as engine:
        info = engine.save(STATE).upload_completion.result(PATIENCE)
        assert_same(engine.read(info), STATE)


def test_training_with_overlap_needs_no_loop(root: Path) -> None:
    run = TrainingRun(1, width=200)
    pictures = []
    with CheckpointEngine(
        root, staging=StagingOptions(part_bytes=PART, budget_bytes=ASIDE_BYTES + 8 * PART, overlap=True)
    ) as engine:
        for step in range(4):
            pictures.append(run.picture())
            engine.save(run.state, step=step)
            run.step()
        engine.wait()
        for step, picture in enumerate(pictures):
            assert_same(engine.read(step), picture)


def test_checkpoints_can_be_left_early(root: Path) -> None:
    with CheckpointEngine(root) as engine:
        for step in range(3):
            engine.save(STATE, step=step).upload_completion.result(PATIENCE)
        for info in engine.checkpoints():
            assert info.step == 0
            break
        engine.save(STATE, step=3).upload_completion.result(PATIENCE)
