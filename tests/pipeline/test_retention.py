"""Retention in an engine: what a policy does not keep goes once a newer checkpoint is durable, in nobody's
way."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import (
    CheckpointEngine,
    KeepBest,
    KeepEvery,
    KeepLatest,
    Limits,
    Retention,
    StorageError,
    open_checkpoint,
    sync,
)
from dcp_async.catalog import CheckpointRecord
from tests.support.doubles import FaultyStorage, assert_holds_only, assert_same, committed, data_files
from tests.support.saves import STATE, saved

FAILURE = StorageError("it does not go", verb="remove", path="there", errno=5)


def names(*steps: int) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


async def run(root: Any, policy: Retention | None, *steps: int, **options: Any) -> None:
    """An engine of its own that saves these steps and closes."""
    async with CheckpointEngine(root, retention=policy, **options) as engine:
        for step in steps:
            await saved(engine, STATE, step=step)


async def test_the_latest_stay(root: Path) -> None:
    await run(root, KeepLatest(2), *range(6))
    assert_holds_only(root, names(4, 5))


async def test_joined_policies_keep_what_any_of_them_keeps(root: Path) -> None:
    async with CheckpointEngine(
        root, retention=KeepLatest(1) | KeepEvery(steps=4) | KeepBest("loss", 2)
    ) as engine:
        for step, loss in enumerate([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0, 9.0, 9.0]):
            await saved(engine, STATE, step=step, notes={"loss": loss})
    assert_holds_only(root, names(0, 1, 3, 4, 8, 10))


async def test_without_a_policy_nothing_goes(root: Path) -> None:
    await run(root, None, *range(3))
    assert_holds_only(root, names(0, 1, 2))


def test_the_blocking_engine_prunes_too(root: Path) -> None:
    with sync.CheckpointEngine(root, retention=KeepLatest(1)) as engine:
        for step in range(3):
            engine.save(STATE, step=step).upload_completion.result()
    assert_holds_only(root, names(2))


async def test_memory_is_pruned_too() -> None:
    async with CheckpointEngine("memory://pruned", retention=KeepLatest(2)) as engine:
        for step in range(4):
            await saved(engine, STATE, step=step)
        await asyncio.gather(engine.wait(), saved(engine, STATE, step=9))
    async with CheckpointEngine("memory://pruned") as engine:
        assert [info.step async for info in engine.checkpoints()] == [3, 9]
    from dcp_async.storage import MemoryStorage

    MemoryStorage.clear("pruned")


async def test_what_an_earlier_run_left_is_counted(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        for step in range(5):
            await saved(engine, STATE, step=step, notes={"loss": abs(step - 2)})
    await run(root, KeepLatest(1) | KeepBest("loss"), 7)
    assert_holds_only(root, names(2, 7))


async def test_what_a_run_saved_last_stays_when_it_has_gone_back_to_an_earlier_step(root: Path) -> None:
    await run(root, None, 100, 200, 300)
    async with CheckpointEngine(root, retention=KeepLatest(2)) as engine:
        await engine.load(dict(STATE), 100)
        for step in (110, 120):
            await saved(engine, STATE, step=step)
    assert_holds_only(root, names(120, 200, 300))


async def test_a_run_that_saves_and_prunes_leaves_others_no_moment_without_a_newest(
    root: Path, faulty: FaultyStorage
) -> None:
    await run(root, None, 1)
    async with CheckpointEngine(faulty) as engine:
        with faulty.hold("open") as gate:
            asked = asyncio.create_task(engine.latest())
            await gate.until_arrived()  # it has listed step 1
            await run(root, KeepLatest(1), 2)
        info = await asked
    assert info is not None, "who resumes where there is a checkpoint, resumes from it"
    assert info.step == 2


@pytest.mark.parametrize("verb", ["load", "read", "checkpoint"])
async def test_who_loads_the_newest_while_another_run_prunes_gets_what_is_newer(
    root: Path, faulty: FaultyStorage, verb: str
) -> None:
    async def save(*steps: int) -> None:
        async with CheckpointEngine(root, retention=KeepLatest(1) | KeepEvery(steps=10)) as engine:
            for step in steps:
                await saved(engine, {"mark": step}, step=step)

    await save(0, 1)
    async with CheckpointEngine(faulty) as engine:
        assert await engine.latest()  # so that the next look opens none but what it loads

        async def mark() -> Any:
            state = {"mark": -1}
            if verb == "load":
                await engine.load(state)
                return state["mark"]
            if verb == "read":
                return (await engine.read())["mark"]
            async with engine.checkpoint() as checkpoint:
                return (await checkpoint.read())["mark"]

        with faulty.hold("open") as gate:
            asked = asyncio.create_task(mark())
            await gate.until_arrived()  # it has listed steps 0 and 1
            await save(2)
        assert await asked == 2
    assert_holds_only(root, names(0, 2))


async def test_a_save_that_fails_removes_nothing(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, retention=KeepLatest(1)) as engine:
        await saved(engine, STATE, step=1)
        faulty.fail("commit", OSError(28, "No space left on device"))
        response = await engine.save(STATE, step=2)
        assert await asyncio.wait_for(_failed(response.upload_completion), 60)
        faulty.heal()
    assert_holds_only(root, names(1))


async def _failed(handle: Any) -> BaseException | None:
    try:
        await handle
    except Exception as error:
        return error
    return None


async def test_no_save_waits_for_a_removal(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, retention=KeepLatest(1), limits=Limits(pending_saves=1)) as engine:
        await saved(engine, STATE, step=1)
        with faulty.hold("remove") as gate:
            await saved(engine, STATE, step=2)
            await gate.until_arrived()
            await saved(engine, STATE, step=3)
            await engine.wait()
            assert committed(root) == names(1, 2, 3)
    assert_holds_only(root, names(3))


async def test_a_removal_that_fails_is_logged_and_tried_again(
    root: Path, faulty: FaultyStorage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with CheckpointEngine(faulty, retention=KeepLatest(1)) as engine:
        await saved(engine, STATE, step=1)
        faulty.fail("remove", FAILURE)
        await saved(engine, STATE, step=2)
        await saved(engine, STATE, step=3)
    assert committed(root) == names(1, 2, 3)
    told = [record.getMessage() for record in caplog.records if "could not be removed" in record.getMessage()]
    assert sorted(text.split("'")[1] for text in told) == names(1, 2)  # each once
    faulty.heal()
    await run(faulty, KeepLatest(1), 4)
    assert_holds_only(root, names(4))


async def test_a_policy_that_raises_removes_nothing_and_fails_no_save(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Retention):
        def keeps(self, checkpoints: Sequence[CheckpointRecord]) -> Iterable[str]:
            raise KeyError("loss")

        def __repr__(self) -> str:
            return "Broken()"

    await run(root, Broken(), 1, 2)
    assert_holds_only(root, names(1, 2))
    assert "Broken(): KeyError: 'loss'" in caplog.text


async def test_what_a_run_reads_does_not_grow_with_the_checkpoints(root: Path, faulty: FaultyStorage) -> None:
    async def manifests_read(steps: range) -> int:
        before = faulty.calls.count("manifest")
        async with CheckpointEngine(faulty, retention=KeepLatest(2) | KeepEvery(steps=2)) as engine:
            opened = faulty.calls.count("manifest") - before
            for step in steps:
                await saved(engine, STATE, step=step)
        return faulty.calls.count("manifest") - before - opened

    few = await manifests_read(range(1, 21))
    many = await manifests_read(range(21, 41))
    assert len(committed(root)) > 20
    # those that stay are looked at once, up to sixteen of them: the rest is the same for each save
    assert many <= few + 20


# -- what never goes


def cut(directory: Path) -> None:
    file = data_files(directory)[0]
    file.write_bytes(file.read_bytes()[:-4096])


@pytest.mark.parametrize(
    "damage", [cut, lambda directory: data_files(directory)[0].unlink()], ids=["cut", "gone"]
)
async def test_a_damaged_checkpoint_that_a_policy_would_keep_stays_and_does_not_count(
    root: Path, damage: Any
) -> None:
    await run(root, None, 1, 2, 3, 4)
    for name in names(2, 4):
        damage(root / name)
    await run(root, KeepLatest(2), 5)
    assert committed(root) == names(3, 4, 5)  # the second would not be among them either way


async def test_the_last_whole_one_stays_where_every_newer_one_is_damaged(root: Path) -> None:
    """What a policy is told of is committed; whether it is whole, the files tell."""
    await run(root, None, 1, 2, 3)

    class Damaging(Retention):
        """Of what has just been saved the files go before anything is removed."""

        def keeps(self, checkpoints: Sequence[CheckpointRecord]) -> Iterable[str]:
            for checkpoint in checkpoints:
                if checkpoint.step == 4:
                    for path in data_files(root / checkpoint.checkpoint_id):
                        path.unlink()
            return [checkpoints[-1].checkpoint_id]

    await run(root, Damaging(), 4)
    assert committed(root) == names(3, 4)


async def test_what_is_being_read_stays_until_a_later_run(root: Path) -> None:
    await run(root, None, 1, 2)
    async with CheckpointEngine(root, retention=KeepLatest(1)) as engine:
        async with open_checkpoint(root / names(1)[0]) as of_others, engine.checkpoint(2) as of_its_own:
            await saved(engine, STATE, step=3)
            await saved(engine, STATE, step=4)
            await asyncio.gather(saved(engine, STATE, step=5), engine.wait())
            for checkpoint in (of_others, of_its_own):
                assert_same(await checkpoint.tensor("w"), STATE["w"])
            assert set(names(1, 2)) <= set(committed(root))
        await saved(engine, STATE, step=6)
    assert_holds_only(root, names(6))


async def test_what_has_no_step_is_nobodys_to_remove(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, STATE, checkpoint_id="best")
        await saved(engine, STATE, checkpoint_id="epoch-1", step=1)
    dcp.save({"w": torch.ones(3)}, checkpoint_id=root / "llama-7b")
    dcp.save({"w": torch.ones(3)}, checkpoint_id=root / "step-00000002")
    await run(root, KeepLatest(1), 3)
    assert committed(root) == sorted(["best", "llama-7b", *names(3)])


async def test_what_a_link_points_to_stays(root: Path) -> None:
    await run(root, None, 1, 2)
    (root / "best").symlink_to("step-00000001")
    await run(root, KeepLatest(1), 3)
    assert (root / "best" / ".metadata").exists()
    assert not (root / "step-00000002").exists()


async def test_one_that_is_replaced_once_it_was_judged_stays(root: Path) -> None:
    await run(root, None, 1)

    def replace() -> None:
        with sync.CheckpointEngine(root) as other:
            other.save(STATE, step=1, replace=True)

    class Replacing(Retention):
        def keeps(self, checkpoints: Sequence[CheckpointRecord]) -> Iterable[str]:
            thread = threading.Thread(target=replace)
            thread.start()
            thread.join()
            return []

    await run(root, Replacing(), 2)
    assert_holds_only(root, names(1, 2))


@pytest.mark.parametrize("given", ["latest", 3, KeepLatest])
def test_what_is_no_policy_is_refused(root: Path, given: Any) -> None:
    with pytest.raises(TypeError, match="must be a policy such as KeepLatest"):
        CheckpointEngine(root, retention=given)
