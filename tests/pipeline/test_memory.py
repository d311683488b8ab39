"""Engines on URLs: runs that resume without a disk, and one directory by two names."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_async.sync
from dcp_async import CheckpointEngine, CheckpointExistsError, SaveError, StagingOptions
from dcp_async.storage import MemoryStorage
from tests.support.doubles import PATIENCE, FaultyStorage, TrainingRun, assert_same

URL = "memory://tests/pipeline"


@pytest.fixture(autouse=True)
def _cleared() -> Iterator[None]:
    yield
    MemoryStorage.clear("tests/pipeline")


def _state(value: int) -> dict[str, Any]:
    return {"w": torch.full((3000, 1000), value), "few": torch.full((7,), value), "label": str(value)}


@pytest.mark.usefixtures("no_leaks")
async def test_a_run_goes_on_where_an_earlier_engine_left_it() -> None:
    run = TrainingRun(1)
    async with CheckpointEngine(URL) as engine:
        for step in range(3):
            run.step()
            await engine.save(run.state, step=step)
    resumed = TrainingRun(2)
    with dcp_async.sync.CheckpointEngine(URL) as engine_again:
        assert engine_again.load(resumed.state).next_step == 3
        assert [info.checkpoint_id for info in engine_again.checkpoints()] == [
            f"step-{step:08d}" for step in range(3)
        ]
    assert_same(resumed.picture(), run.picture())


async def test_a_name_is_exclusive_and_may_be_replaced() -> None:
    async with CheckpointEngine(URL) as engine:
        await engine.save(_state(1), step=1)
        with pytest.raises(CheckpointExistsError):
            await engine.save(_state(2), step=1)
        assert (await engine.read())["label"] == "1"
        await (await engine.save(_state(3), step=1, replace=True)).upload_completion
        assert (await engine.read())["label"] == "3"


def test_engines_in_several_threads_share_a_name() -> None:
    failures: list[BaseException] = []

    def save(first: int) -> None:
        try:
            with dcp_async.sync.CheckpointEngine(URL) as engine:
                for step in range(first, 12, 3):
                    engine.save(_state(step), step=step)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert failures == []
    with dcp_async.sync.CheckpointEngine(URL) as engine:
        for step in range(12):
            read = engine.read(step)
            assert read["label"] == str(step)
            assert bool((read["w"] == step).all())


async def test_a_save_that_fails_in_memory_leaves_nothing() -> None:
    memory = MemoryStorage()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(memory.close)
        faulty = FaultyStorage(memory)
        async with CheckpointEngine(faulty, staging=StagingOptions(part_bytes=1 << 20)) as engine:
            faulty.fail("put", OSError(errno.ENOSPC, "no space"), nth=3)
            with pytest.raises(SaveError, match="no space"):
                await (await engine.save(_state(1), step=1)).upload_completion
            assert await memory.list() == []
            faulty.heal()
            await engine.save(_state(2), step=2)
        assert [stored.name for stored in await memory.list()] == ["step-00000002"]


async def test_a_file_url_and_a_path_name_one_directory(root: Path) -> None:
    async with CheckpointEngine(root.as_uri()) as engine:
        await engine.save(_state(1), step=1)
    async with CheckpointEngine(root) as engine:
        assert (await engine.read())["label"] == "1"
