"""``remove``: one checkpoint goes, once a newer one is durable if asked for so, or not at all."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dcp_async import (
    CheckpointEngine,
    CheckpointNotFoundError,
    EngineStateError,
    SaveCancelled,
    SaveError,
    StorageError,
    sync,
)
from tests.support.doubles import FaultyStorage, assert_holds_only, assert_same, committed
from tests.support.saves import STATE, saved

OLD, NEW = "step-00000001", "step-00000002"


async def two(root: Any) -> None:
    async with CheckpointEngine(root) as engine:
        for step in (1, 2):
            await saved(engine, STATE, step=step)


@pytest.mark.parametrize("source", ["name", "step", "info"])
async def test_a_checkpoint_is_removed_by_whatever_names_it(root: Path, source: str) -> None:
    await two(root)
    async with CheckpointEngine(root) as engine:
        named: dict[str, Any] = {"name": OLD, "step": 1, "info": await anext(engine.checkpoints())}
        await engine.remove(named[source])
        assert_holds_only(root, [NEW])


def test_the_blocking_twin_returns_when_it_is_gone(root: Path) -> None:
    with sync.CheckpointEngine(root) as engine:
        engine.save(STATE, step=1)
        engine.remove(1, after=engine.save(STATE, step=2))
        assert_holds_only(root, [NEW])


@pytest.mark.parametrize("is_handle", [False, True])
async def test_it_goes_only_once_the_newer_one_is_durable(
    root: Path, faulty: FaultyStorage, is_handle: bool
) -> None:
    async with CheckpointEngine(faulty) as engine:
        await saved(engine, STATE, step=1)
        with faulty.hold("commit") as gate:
            response = await engine.save(STATE, step=2)
            after = response.upload_completion if is_handle else response
            removal = asyncio.create_task(engine.remove(OLD, after=after))
            await gate.until_arrived()
            assert committed(root) == [OLD]
            assert not removal.done()
        await removal
        assert response.upload_completion.done()
        assert_holds_only(root, [NEW])
        newer = await engine.save(STATE, step=3)
        await newer.upload_completion  # done already: it goes at once
        await engine.remove(NEW, after=newer)
    assert_holds_only(root, ["step-00000003"])


async def test_nothing_goes_if_the_newer_save_fails(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        await saved(engine, STATE, step=1)
        with faulty.fail_late("commit", OSError(28, "No space left on device")):
            response = await engine.save(STATE, step=2)
            removal = asyncio.create_task(engine.remove(OLD, after=response))
        with pytest.raises(SaveError, match=r"'step-00000001' was not removed.*No space left") as caught:
            await removal
        assert caught.value.checkpoint_id == NEW
    assert_holds_only(root, [OLD])


async def test_nothing_goes_if_the_newer_save_is_cancelled(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        await saved(engine, STATE, step=1)
        with faulty.hold("seal"):
            response = await engine.save(STATE, step=2)
            removal = asyncio.create_task(engine.remove(OLD, after=response))
            response.cancel()
        with pytest.raises(SaveCancelled, match="was not removed"):
            await removal
    assert_holds_only(root, [OLD])


async def test_one_that_is_being_saved_goes_when_it_is_there(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("commit") as gate:
            await engine.save(STATE, step=1)
            removal = asyncio.create_task(engine.remove(1))
            await gate.until_arrived()
        await removal
    assert_holds_only(root, [])


async def test_an_engine_that_closes_waits_for_the_removal(root: Path, faulty: FaultyStorage) -> None:
    engine = await CheckpointEngine(faulty).open()
    await saved(engine, STATE, step=1)
    with faulty.hold("commit") as gate:
        removal = asyncio.create_task(engine.remove(OLD, after=await engine.save(STATE, step=2)))
        await gate.until_arrived()
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
    await closing
    await removal
    assert_holds_only(root, [NEW])


async def test_a_removal_that_is_cancelled_while_it_waits_removes_nothing(
    root: Path, faulty: FaultyStorage
) -> None:
    async with CheckpointEngine(faulty) as engine:
        await saved(engine, STATE, step=1)
        with faulty.hold("commit") as gate:
            removal = asyncio.create_task(engine.remove(OLD, after=await engine.save(STATE, step=2)))
            await gate.until_arrived()
            removal.cancel()
            with pytest.raises(asyncio.CancelledError):
                await removal
    assert_holds_only(root, [OLD, NEW])


async def test_who_has_it_open_reads_on(root: Path) -> None:
    await two(root)
    async with CheckpointEngine(root) as engine, engine.checkpoint(OLD) as checkpoint:
        await engine.remove(OLD)
        assert committed(root) == [NEW]
        assert_same(await checkpoint.read(), STATE)


async def test_of_a_link_the_link_goes(root: Path) -> None:
    await two(root)
    (root / "best").symlink_to(OLD)
    async with CheckpointEngine(root) as engine:
        await engine.remove("best")
    assert_holds_only(root, [OLD, NEW])


async def test_what_the_storage_says_is_told(root: Path, faulty: FaultyStorage) -> None:
    await two(root)
    async with CheckpointEngine(faulty) as engine:
        faulty.fail("remove", OSError(5, "Input/output error"))
        with pytest.raises(StorageError, match="Input/output error"):
            await engine.remove(OLD)
    assert committed(root) == [OLD, NEW]


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no such name": ("step-00000007", CheckpointNotFoundError, "there are step-00000001"),
    "no such step": (7, CheckpointNotFoundError, "there are step-00000001"),
    "a path": ("../run/step-00000001", ValueError, "remove 'step-00000001' with an engine on '/"),
    "no name": ("", CheckpointNotFoundError, "no checkpoint"),
    "whatever is newest": ("latest", ValueError, "not 'latest'"),
    "a truth value": (True, TypeError, "named by"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_names_no_checkpoint_removes_none(root: Path, case: str) -> None:
    source, kind, words = REFUSED[case]
    await two(root)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(kind, match=words):
            await engine.remove(source)
    assert_holds_only(root, [OLD, NEW])


async def test_a_checkpoint_under_another_root_stays(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    await two(root)
    await two(other)
    async with CheckpointEngine(root) as engine, engine.checkpoint(other / OLD) as checkpoint:
        for source in (other / OLD, checkpoint.info):
            with pytest.raises(ValueError, match="not the path"):
                await engine.remove(source)
    assert_holds_only(other, [OLD, NEW])


async def test_what_is_no_newer_save_removes_nothing(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        response = await engine.save(STATE, step=1)
        wrong: Any
        for wrong, kind, words in (
            (response, ValueError, "what it would be removed after"),
            (response.staging_completion, TypeError, "tells of staging"),
            ("step-2", TypeError, "must be what save"),
        ):
            with pytest.raises(kind, match=words):
                await engine.remove(1, after=wrong)
    assert_holds_only(root, [OLD])
    with pytest.raises(EngineStateError):
        await engine.remove(1)
