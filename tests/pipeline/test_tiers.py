"""Saves near, replication far: what far may do without a save feeling it, what a load makes of both."""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import CheckpointEngine, KeepLatest, ReplicationError, StorageError, Timeouts
from dcp_async.formats import SafetensorsFormat
from dcp_async.storage import LocalStorage, TieredStorage
from tests.support.doubles import FaultyStorage, assert_same, blank, data_files, flip
from tests.support.saves import SMALL, STATE, saved

NAME = "step-00000001"


class Tiers:
    """Two directories, of which the far one stumbles when it is told to."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.near, self.far = root / "near", root / "far"
        self._local = LocalStorage(self.far)
        self.faulty = FaultyStorage(self._local)
        self.storage = TieredStorage(self.near, self.faulty, retry_seconds=0.0, **options)

    async def close(self) -> None:
        await self.storage.close()
        await self._local.close()

    def engine(self, **options: Any) -> CheckpointEngine:
        return CheckpointEngine(self.storage, staging=SMALL, **options)

    def names(self, tier: Path) -> list[str]:
        return sorted(path.parent.name for path in tier.glob("*/.metadata"))


@asynccontextmanager
async def tiers_at(root: Path, **options: Any) -> AsyncIterator[Tiers]:
    tiers = Tiers(root, **options)
    try:
        yield tiers
    finally:
        await tiers.close()


@pytest.fixture
async def tiers(tmp_path: Path) -> AsyncIterator[Tiers]:
    async with tiers_at(tmp_path) as made:
        yield made


async def check_loads(root: Path) -> None:
    """What ``root`` has is a checkpoint of ours by itself."""
    state = blank(STATE)
    async with CheckpointEngine(root) as engine:
        await engine.load(state)
        assert (await engine.verify()).ok
    assert_same(state, STATE)


async def test_a_save_is_far_once_replicated_is_done(tiers: Tiers) -> None:
    async with tiers.engine() as engine:
        response = await engine.save(STATE, step=1, files={"config.json": b"{}", "empty": b""})
        info = await response.replicated
        assert info.checkpoint_id == NAME
        await check_loads(tiers.far)
    assert (tiers.far / NAME / "config.json").read_bytes() == b"{}"
    near = {path.name: path.read_bytes() for path in (tiers.near / NAME).iterdir()}
    assert near == {path.name: path.read_bytes() for path in (tiers.far / NAME).iterdir()}


async def test_without_a_far_tier_replicated_is_the_upload(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        response = await engine.save(STATE)
        assert response.replicated is response.upload_completion


async def test_saves_commit_near_while_far_stands_still(tiers: Tiers) -> None:
    async with tiers.engine() as engine:
        with tiers.faulty.hold("put") as gate:
            responses = [await engine.save(STATE, step=step) for step in range(1, 4)]
            for response in responses:
                await response.upload_completion
                assert not response.replicated.done()
            assert tiers.names(tiers.far) == []
            gate.release()
        for response in responses:
            await response.replicated
    assert tiers.names(tiers.far) == tiers.names(tiers.near)


@pytest.mark.parametrize("verb", ["begin", "put", "seal", "commit", "open", "sweep"])
async def test_a_far_tier_that_fails_for_a_while_loses_nothing(
    tiers: Tiers, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with tiers.engine() as engine:
        error = StorageError("away", verb=verb, path="far", errno=errno.EIO)
        tiers.faulty.fail(verb, error, times=3)
        responses = [await engine.save(STATE, step=step) for step in (1, 2)]
        for response in responses:
            await response.replicated
    await check_loads(tiers.far)
    assert tiers.names(tiers.far) == tiers.names(tiers.near)
    assert "tried again" in caplog.text


async def test_what_an_earlier_engine_left_is_replicated_by_the_next(
    tiers: Tiers, caplog: pytest.LogCaptureFixture
) -> None:
    with tiers.faulty.hold("put"):
        engine = tiers.engine(timeouts=Timeouts(exit_grace=0.01))
        async with engine:
            response = await engine.save(STATE, step=1)
            await response.upload_completion
        assert tiers.names(tiers.far) == []
        with pytest.raises(ReplicationError, match="the engine closed before it was far"):
            await response.replicated
        assert "not replicated to" in caplog.text
        assert "1 checkpoint" in caplog.text
    tiers.faulty.heal()
    async with tiers.engine():
        pass  # closing drains
    await check_loads(tiers.far)


async def test_a_near_tier_that_was_wiped_is_loaded_from_far(tiers: Tiers) -> None:
    async with tiers.engine() as engine:
        await (await engine.save(STATE, step=1)).replicated
    shutil.rmtree(tiers.near)
    state = blank(STATE)
    async with tiers.engine() as engine:
        assert (await engine.load(state)).next_step == 2
        with pytest.raises(FileExistsError):
            await engine.save(STATE, step=1)
        await saved(engine, STATE, step=2)
    assert_same(state, STATE)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def spoil_footer(path: Path) -> None:
    flip(path, path.stat().st_size - 40)


@pytest.mark.parametrize("harm", [Path.unlink, cut, spoil_footer, lambda path: flip(path, 9000)])
async def test_a_file_that_is_not_whole_near_is_read_from_far(tiers: Tiers, harm: Any) -> None:
    async with tiers.engine() as engine:
        await (await engine.save(STATE, step=1)).replicated
    (path,) = data_files(tiers.near / NAME)
    harm(path)
    state = blank(STATE)
    async with tiers.engine() as engine:
        report = await engine.load(state)
        assert report.checkpoint_id == NAME
    assert_same(state, STATE)


async def test_what_is_damaged_near_is_not_replicated(tiers: Tiers) -> None:
    async with tiers.engine() as engine:
        with tiers.faulty.hold("sweep") as gate:
            response = await engine.save(STATE, step=1)
            await response.upload_completion
            (path,) = data_files(tiers.near / NAME)
            await asyncio.to_thread(flip, path, 9000)
            gate.release()
        with pytest.raises(ReplicationError, match="damaged"):
            await response.replicated
        await (await engine.save(STATE, step=2)).replicated
    assert tiers.names(tiers.far) == ["step-00000002"]


async def test_a_removed_checkpoint_is_gone_from_both_and_stays_so(tiers: Tiers) -> None:
    async with tiers.engine() as engine:
        for step in (1, 2):
            await (await engine.save(STATE, step=step)).replicated
        await engine.remove(1)
    async with tiers.engine() as engine:
        assert [info.step async for info in engine.checkpoints()] == [2]
    assert tiers.names(tiers.near) == tiers.names(tiers.far) == ["step-00000002"]


async def test_a_removal_ends_the_copy_that_is_under_way(tiers: Tiers) -> None:
    async with tiers.engine() as engine:
        with tiers.faulty.hold("put") as gate:
            response = await engine.save(STATE, step=1)
            await response.upload_completion
            await gate.until_arrived()
            removing = asyncio.create_task(engine.remove(1))
            await asyncio.sleep(0)
            gate.release()
            await removing
        with pytest.raises(ReplicationError, match="removed"):
            await response.replicated
    assert tiers.names(tiers.near) == tiers.names(tiers.far) == []
    assert not [path for path in tiers.far.rglob("*") if path.is_file()]


async def test_a_removal_that_far_refuses_leaves_it_far_and_is_not_undone(tiers: Tiers) -> None:
    async with tiers.engine() as engine:
        await (await engine.save(STATE, step=1)).replicated
        tiers.faulty.fail("remove", StorageError("away", verb="remove", path="far", errno=errno.EIO))
        with pytest.raises(StorageError):
            await engine.remove(1)
    tiers.faulty.heal()
    async with tiers.engine() as engine:
        assert [info.step async for info in engine.checkpoints()] == [1]
        await engine.remove(1)
        assert await engine.latest() is None
    assert tiers.names(tiers.near) == tiers.names(tiers.far) == []


async def test_retention_keeps_what_is_far_until_a_newer_one_is(tiers: Tiers) -> None:
    async with tiers.engine(retention=KeepLatest(1)) as engine:
        await (await engine.save(STATE, step=1)).replicated
        with tiers.faulty.hold("put") as gate:
            response = await engine.save(STATE, step=2)
            await response.upload_completion
            assert tiers.names(tiers.far) == [NAME]
            gate.release()
        await response.replicated
    assert tiers.names(tiers.near) == tiers.names(tiers.far) == ["step-00000002"]


async def test_retention_keeps_the_newest_that_is_far_while_newer_ones_are_not(tiers: Tiers) -> None:
    async with tiers.engine(retention=KeepLatest(1)) as engine:
        await (await engine.save(STATE, step=1)).replicated
        with tiers.faulty.hold("begin", nth=2) as third, tiers.faulty.hold("put") as second:
            for step in (2, 3):
                await saved(engine, STATE, step=step)
            second.release()
            await third.until_arrived()
            assert tiers.names(tiers.far) == ["step-00000002"]
            assert tiers.names(tiers.near) == ["step-00000002", "step-00000003"]
            third.release()
    assert tiers.names(tiers.near) == tiers.names(tiers.far) == ["step-00000003"]


async def test_near_keeps_the_newest_of_what_is_far(tmp_path: Path) -> None:
    async with tiers_at(tmp_path, near_keeps=2) as tiers:
        async with tiers.engine() as engine:
            for step in range(1, 4):
                await (await engine.save({**STATE, "n": step}, step=step)).replicated
            with tiers.faulty.hold("put") as gate:
                response = await engine.save(STATE, step=4)
                await response.upload_completion
                gate.release()
            await response.replicated
        assert tiers.names(tiers.near) == ["step-00000003", "step-00000004"]
        assert len(tiers.names(tiers.far)) == 4
        async with tiers.engine() as engine:
            assert [info.step async for info in engine.checkpoints()] == [1, 2, 3, 4]
            assert (await engine.read(1))["n"] == 1
            with pytest.raises(FileExistsError):
                await engine.save(STATE, step=1)
            await (await engine.save({**STATE, "n": 9}, step=1, replace=True)).replicated
            assert (await engine.read(1))["n"] == 9
            await engine.remove(2)
        assert tiers.names(tiers.far) == ["step-00000001", "step-00000003", "step-00000004"]


async def test_near_keeps_what_is_not_far(tmp_path: Path) -> None:
    async with tiers_at(tmp_path, near_keeps=1) as tiers:
        with tiers.faulty.hold("put"):
            async with tiers.engine(timeouts=Timeouts(exit_grace=0.01)) as engine:
                for step in (1, 2):
                    await saved(engine, STATE, step=step)
        assert tiers.names(tiers.near) == ["step-00000001", "step-00000002"]
        tiers.faulty.heal()
        async with tiers.engine():
            pass
        assert tiers.names(tiers.near) == ["step-00000002"]


async def test_a_replaced_checkpoint_is_replaced_far(tiers: Tiers) -> None:
    newer = {**STATE, "n": 2}
    async with tiers.engine() as engine:
        await (await engine.save(STATE, step=1)).replicated
        await (await engine.save(newer, step=1, replace=True)).replicated
    state = blank(newer)
    async with CheckpointEngine(tiers.far) as engine:
        await engine.load(state)
    assert_same(state, newer)


async def test_a_stale_near_tier_overwrites_nothing_far(tiers: Tiers, tmp_path: Path) -> None:
    async with tiers.engine() as engine:
        await (await engine.save(STATE, step=1)).replicated
    async with CheckpointEngine(tiers.far) as engine:  # as another node does that has no near tier yet
        await saved(engine, {**STATE, "n": 2}, step=1, replace=True)
    async with tiers.engine():
        pass
    state = blank(STATE)
    async with CheckpointEngine(tiers.far) as engine:
        await engine.load(state)
    assert state["n"] == 2


async def test_nothing_is_copied_that_far_has_already(tiers: Tiers) -> None:
    async with tiers.engine() as engine:
        await (await engine.save(STATE, step=1)).replicated
    before = tiers.faulty.calls.count("put")
    async with tiers.engine():
        pass
    assert tiers.faulty.calls.count("put") == before


async def test_a_copy_waits_for_the_save_that_follows_and_for_no_other(tmp_path: Path) -> None:
    """Counted: with far's first put held, and a save near held in flight, no chunk goes; the one after that
    stops nothing."""
    near_local = LocalStorage(tmp_path / "near")
    near = FaultyStorage(near_local)
    far_local = LocalStorage(tmp_path / "far")
    far = FaultyStorage(far_local)
    storage = TieredStorage(near, far, retry_seconds=0.0)
    try:
        async with CheckpointEngine(storage, staging=SMALL) as engine:
            with far.hold("begin") as begin, near.hold("seal") as seal:
                first = asyncio.create_task(_committed(engine, 1))
                await seal.until_arrived()
                seal.release()
                response = await first
                await begin.until_arrived()
                with near.hold("seal") as second_seal:
                    second = asyncio.create_task(_committed(engine, 2))
                    await second_seal.until_arrived()
                    begin.release()
                    # the copy is let go, and waits for the save
                    for _ in range(20):
                        await asyncio.to_thread(lambda: None)
                    assert far.calls.count("put") == 0
                    second_seal.release()
                    await second
                with near.hold("seal") as third_seal:
                    third = asyncio.create_task(_committed(engine, 3))
                    await third_seal.until_arrived()
                    await response.replicated  # beside the third save
                    third_seal.release()
                    await third
    finally:
        await near_local.close()
        await far_local.close()


async def _committed(engine: CheckpointEngine, step: int) -> Any:
    response = await engine.save(STATE, step=step)
    await response.upload_completion
    return response


async def test_an_abort_waits_for_no_replication(tiers: Tiers) -> None:
    with tiers.faulty.hold("put") as gate:
        engine = await tiers.engine().open()
        response = await engine.save(STATE, step=1)
        await response.upload_completion
        await gate.until_arrived()
        gate.release()
        await engine.abort()
        assert response.replicated.done()


async def test_a_failed_save_fails_its_replication_too(
    tiers: Tiers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    async with tiers.engine() as engine:
        await saved(engine, STATE, step=1)
        with pytest.raises(FileExistsError):
            await engine.save(STATE, step=1)


async def test_one_engine_at_a_time_replicates_a_near_directory(tiers: Tiers, tmp_path: Path) -> None:
    async with tiers.engine() as engine, tiers_at(tmp_path) as others:
        with tiers.faulty.hold("put") as gate:
            response = await engine.save(STATE, step=1)
            await gate.until_arrived()
            async with others.engine() as other:
                assert await other.latest() is not None
            assert "begin" not in others.faulty.calls
            gate.release()
        await response.replicated
    await check_loads(tiers.far)
    assert not (tiers.near / ".replicating").exists()


@pytest.mark.parametrize(
    "options",
    [{"concurrency": 0}, {"near_keeps": 0}, {"retry_seconds": -1.0}],
)
def test_options_that_can_not_be_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        TieredStorage(tmp_path / "near", tmp_path / "far", **options)


async def test_a_storage_can_not_be_both_tiers(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with pytest.raises(ValueError, match="the same storage"):
        TieredStorage(storage, storage)
    await storage.close()


async def test_what_stock_wrote_near_is_left_alone(tiers: Tiers, caplog: pytest.LogCaptureFixture) -> None:
    await asyncio.to_thread(dcp.save, {"w": torch.ones(3)}, checkpoint_id=tiers.near / "stock", no_dist=True)
    async with tiers.engine() as engine:
        assert (await engine.read("stock"))["w"].tolist() == [1.0, 1.0, 1.0]
    assert tiers.names(tiers.far) == []
    assert "not written by dcp_async" in caplog.text


async def test_files_that_others_know_are_known_far_too(tiers: Tiers) -> None:
    async with tiers.engine(format=SafetensorsFormat()) as engine:
        await (await engine.save({"w": torch.ones(3, 4)}, step=1)).replicated
    (near,) = (tiers.near / NAME).glob("*.safetensors")
    assert (tiers.far / NAME / near.name).read_bytes() == near.read_bytes()
    async with CheckpointEngine(tiers.far) as engine:
        assert (await engine.verify()).ok
