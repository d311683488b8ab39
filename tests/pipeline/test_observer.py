"""What an observer is told, in which order, and that it can do no harm."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import (
    CheckpointEngine,
    Limits,
    Observer,
    SaveCancelled,
    SaveCommitted,
    SaveError,
    SaveFailed,
    SaveProgress,
    SaveStaged,
    SaveStarted,
    StagingOptions,
)
from tests.support.doubles import EventLog, FaultyStorage, assert_same, random_tensor
from tests.support.saves import PART, SMALL

pytestmark = pytest.mark.usefixtures("both_loops")

WIDE = {"w": random_tensor(torch.uint8, (20 * PART,), 2), "n": 1}


async def test_a_save_tells_its_story_in_order(root: Path) -> None:
    log = EventLog()
    observer: Observer = log
    async with CheckpointEngine(root, staging=SMALL, observer=observer) as engine:
        info = await (await engine.save(WIDE, step=4)).upload_completion
    assert all((event.checkpoint_id, event.step) == ("step-00000004", 4) for event in log.events)
    assert isinstance(log.events[0], SaveStarted)
    assert isinstance(log.events[-1], SaveCommitted)
    assert len(log.named("SaveStaged")) == 1
    assert len(log.named("SaveFailed")) == 0
    assert log.events[-1].info.checkpoint_id == info.checkpoint_id
    assert log.events[-1].seconds > 0
    assert threading.get_ident() not in log.threads


async def test_progress_grows_to_the_whole(root: Path) -> None:
    log = EventLog()
    async with CheckpointEngine(root, staging=SMALL, observer=log) as engine:
        info = await (await engine.save(WIDE)).upload_completion
    (started,) = log.named("SaveStarted")
    (staged,) = log.named("SaveStaged")
    progress = log.named("SaveProgress")
    assert isinstance(started, SaveStarted)
    assert isinstance(staged, SaveStaged)
    assert all(isinstance(event, SaveProgress) for event in progress)
    written = [event.written_bytes for event in progress]
    assert len(written) >= 10
    assert written == sorted(written)
    assert {event.nbytes for event in progress} == {written[-1]}
    assert 20 * PART <= started.nbytes <= written[-1] <= info.nbytes
    assert 20 * PART <= staged.nbytes <= info.nbytes


async def test_a_failed_save_is_told(root: Path, faulty: FaultyStorage) -> None:
    log = EventLog()
    async with CheckpointEngine(faulty, staging=SMALL, observer=log) as engine:
        with faulty.fail_late("seal", OSError("broken")):
            response = await engine.save(WIDE, step=1)
        with pytest.raises(SaveError):
            await response.upload_completion
    assert isinstance(log.events[-1], SaveFailed)
    assert isinstance(log.events[-1].error, SaveError)
    assert log.named("SaveCommitted") == []


async def test_a_cancelled_save_is_told(root: Path, faulty: FaultyStorage) -> None:
    log = EventLog()
    async with CheckpointEngine(faulty, observer=log) as engine:
        with faulty.hold("put"):
            response = await engine.save(WIDE, step=1)
            response.cancel()
            with pytest.raises(SaveCancelled):
                await response.upload_completion
    (failed,) = log.named("SaveFailed")
    assert isinstance(failed.error, SaveCancelled)


async def test_an_observer_may_cancel_the_save(root: Path, faulty: FaultyStorage) -> None:
    box: dict[str, Any] = {}

    def react(event: Any) -> None:
        if isinstance(event, SaveProgress):
            box["response"].cancel()

    staging = StagingOptions(part_bytes=PART)
    async with CheckpointEngine(faulty, staging=staging, observer=EventLog(react)) as engine:
        with faulty.hold("put"):
            box["response"] = await engine.save(WIDE, step=1)
        with pytest.raises(SaveCancelled):
            await box["response"].upload_completion
        assert await engine.latest() is None


async def test_events_are_frozen(root: Path) -> None:
    log = EventLog()
    async with CheckpointEngine(root, observer=log) as engine:
        await (await engine.save(WIDE)).upload_completion
    for event in log.events:
        with pytest.raises(dataclasses.FrozenInstanceError):
            event.step = 3


async def test_an_observer_that_raises_does_not_fail_the_save(root: Path) -> None:
    def react(event: Any) -> None:
        raise RuntimeError(f"a bad observer at {type(event).__name__}")

    async with CheckpointEngine(root, staging=SMALL, observer=EventLog(react)) as engine:
        await (await engine.save(WIDE)).upload_completion
        assert_same(await engine.read(), WIDE)


async def test_the_checkpoint_exists_when_its_commit_is_told(root: Path) -> None:
    seen: list[bool] = []

    def react(event: Any) -> None:
        if isinstance(event, SaveCommitted):
            seen.append((root / event.checkpoint_id / ".metadata").exists())

    async with CheckpointEngine(root, observer=EventLog(react)) as engine:
        await (await engine.save(WIDE)).upload_completion
    assert seen == [True]


async def test_stories_of_saves_in_flight_are_told_apart(root: Path) -> None:
    log = EventLog()
    async with CheckpointEngine(root, limits=Limits(pending_saves=3), observer=log) as engine:
        for step in range(3):
            await engine.save(WIDE, step=step)
        await engine.wait()
    for step in range(3):
        own = [type(event).__name__ for event in log.events if event.step == step]
        assert (own[0], own[-1]) == ("SaveStarted", "SaveCommitted")
        assert own.count("SaveStaged") == 1
