"""What load, read, latest and checkpoints see of saves in flight: the same as had save() done it all."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import (
    CheckpointEngine,
    CheckpointNotFoundError,
    EngineStateError,
    Limits,
    StagingOptions,
    sync,
)
from tests.support.doubles import KIB, PATIENCE, FaultyStorage, on_thread, random_tensor
from tests.support.saves import STATE

BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["staged", "overlap"])


def state(n: int) -> dict[str, Any]:
    return STATE | {"n": n}


def engine_on(faulty: FaultyStorage, overlap: bool = False) -> CheckpointEngine:
    return CheckpointEngine(faulty, staging=StagingOptions(overlap=overlap), limits=Limits(pending_saves=3))


async def _load(engine: CheckpointEngine, source: Any) -> int:
    target: dict[str, Any] = {"w": torch.zeros(100, 100), "n": 0}
    await engine.load(target, source)
    return int(target["n"])


async def _read(engine: CheckpointEngine, source: Any) -> int:
    return int((await engine.read(source))["n"])


async def _latest(engine: CheckpointEngine, _: Any) -> int | None:
    found = await engine.latest()
    return found.step if found else None


async def _checkpoints(engine: CheckpointEngine, _: Any) -> int | None:
    return max([info.step or 0 async for info in engine.checkpoints()], default=None)


Look = Callable[[CheckpointEngine, Any], Awaitable[Any]]
LOOKS: list[Look] = [_load, _read, _latest, _checkpoints]


@BOTH
@pytest.mark.parametrize("look", LOOKS)
async def test_the_newest_is_the_one_that_was_saved_last(
    root: Path, faulty: FaultyStorage, look: Look, overlap: bool
) -> None:
    async with engine_on(faulty, overlap) as engine:
        with faulty.hold("commit") as gate:
            await engine.save(state(1), step=1)
            await engine.save(state(2), step=2)
            looking = asyncio.ensure_future(look(engine, "latest"))
            await gate.until_arrived()
            assert not looking.done()
        assert await looking == 2


@BOTH
@pytest.mark.parametrize("look", [_load, _read])
@pytest.mark.parametrize("source", [5, "step-00000005"])
async def test_a_name_or_step_waits_for_its_own_save(
    root: Path, faulty: FaultyStorage, look: Look, source: Any, overlap: bool
) -> None:
    async with engine_on(faulty, overlap) as engine:
        with faulty.hold("commit") as gate:
            await engine.save(state(5), step=5)
            looking = asyncio.ensure_future(look(engine, source))
            await gate.until_arrived()
            assert not looking.done()
        assert await looking == 5


async def test_a_step_finds_its_save_under_another_name(root: Path, faulty: FaultyStorage) -> None:
    async with engine_on(faulty) as engine:
        with faulty.hold("commit") as gate:
            await engine.save(state(5), step=5, checkpoint_id="best")
            looking = asyncio.ensure_future(_read(engine, 5))
            await gate.until_arrived()
        assert await looking == 5


@pytest.mark.parametrize("look", [_load, _read])
async def test_another_name_does_not_wait(root: Path, faulty: FaultyStorage, look: Look) -> None:
    async with engine_on(faulty) as engine:
        info = await (await engine.save(state(1), step=1)).upload_completion
        with faulty.hold("commit") as gate:
            await engine.save(state(2), step=2)
            await gate.until_arrived()
            assert await look(engine, 1) == 1
            assert await look(engine, info) == 1


@pytest.mark.parametrize("look", LOOKS)
async def test_a_save_that_fails_leaves_the_older_one(root: Path, faulty: FaultyStorage, look: Look) -> None:
    async with engine_on(faulty) as engine:
        await (await engine.save(state(1), step=1)).upload_completion
        with faulty.fail_late("seal", OSError("broken")):
            response = await engine.save(state(2), step=2)
            looking = asyncio.ensure_future(look(engine, "latest"))
            await asyncio.sleep(0)
        assert await looking == 1
        assert response.upload_completion.exception() is not None


async def test_a_save_that_fails_leaves_no_such_name(root: Path, faulty: FaultyStorage) -> None:
    async with engine_on(faulty) as engine:
        with faulty.fail_late("seal", OSError("broken")):
            response = await engine.save(state(2), step=2)
            looking = asyncio.ensure_future(_read(engine, 2))
            await asyncio.sleep(0)
        with pytest.raises(CheckpointNotFoundError):
            await looking
        response.upload_completion.exception()


@pytest.mark.parametrize("look", LOOKS)
async def test_cancelling_who_waits_leaves_the_save_alone(
    root: Path, faulty: FaultyStorage, look: Look
) -> None:
    async with engine_on(faulty) as engine:
        with faulty.hold("commit") as gate:
            response = await engine.save(state(1), step=1)
            looking = asyncio.ensure_future(look(engine, "latest"))
            await gate.until_arrived()
            looking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await looking
        assert (await response.upload_completion).step == 1


@pytest.mark.parametrize("look", LOOKS)
async def test_abort_ends_who_waits(root: Path, faulty: FaultyStorage, look: Look) -> None:
    engine = await engine_on(faulty).open()
    with faulty.hold("commit") as gate:
        await engine.save(state(1), step=1)
        looking = asyncio.ensure_future(look(engine, "latest"))
        await gate.until_arrived()
        aborting = asyncio.ensure_future(engine.abort())
        await asyncio.sleep(0)
    await asyncio.wait_for(aborting, PATIENCE)
    with pytest.raises(EngineStateError):
        await asyncio.wait_for(looking, PATIENCE)


async def test_a_task_that_looks_does_not_keep_another_tasks_save_from_returning(
    root: Path, faulty: FaultyStorage
) -> None:
    """The upload waits until save() has returned, and that needs the loop that the other task waits on."""
    part = 64 * KIB
    small = StagingOptions(part_bytes=part, budget_bytes=4 * part)
    async with CheckpointEngine(faulty, staging=small) as engine:
        with faulty.hold("put") as gate:
            saving = asyncio.ensure_future(
                engine.save({"w": random_tensor(torch.uint8, (20 * part,), 2)}, step=1)
            )
            await gate.until_arrived()
            looking = asyncio.ensure_future(_latest(engine, None))
            await asyncio.sleep(0)
        assert await asyncio.wait_for(looking, PATIENCE) == 1
        await saving


async def test_the_blocking_engine_looks_after_its_saves_too(root: Path) -> None:
    def life() -> list[Any]:
        with sync.CheckpointEngine(root, limits=Limits(pending_saves=2)) as engine:
            found: list[Any] = []
            for step in range(3):
                engine.save(state(step), step=step)
                latest = engine.latest()
                found += [latest and latest.step, engine.read()["n"], len(list(engine.checkpoints()))]
            return found

    assert await on_thread(functools.partial(life)) == [0, 0, 1, 1, 1, 2, 2, 2, 3]
