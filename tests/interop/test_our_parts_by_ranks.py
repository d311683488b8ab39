"""Stock's save and load by several ranks through our writer and reader; then the engine looks at it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_async import CheckpointEngine
from tests.interop.our_parts_rank_jobs import run
from tests.interop.stock_states import sharded_whole
from tests.support.doubles import assert_same, blank
from tests.support.processes import run_in_processes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs, by two processes over gloo."""
    directory = tmp_path_factory.mktemp("world")
    run_in_processes([(run, (directory, 2, rank)) for rank in range(2)])
    (directory / "rendezvous").unlink(missing_ok=True)
    return directory


@pytest.mark.timeout(300)
async def test_an_engine_reads_what_ranks_of_stock_wrote_through_our_writer(world: Path) -> None:
    async with CheckpointEngine(world) as engine:
        target = blank(sharded_whole())
        await engine.load(target, "reshard")
        assert_same(target, sharded_whole())
        infos = {info.checkpoint_id: info async for info in engine.checkpoints()}
    written = {"reshard", "cached", "cached-elsewhere", "beside-1", "beside-2", "failed"}
    assert infos.keys() == written
    assert {info.producer for info in infos.values()} == {"dcp_async"}
    assert {(info.num_files, info.world_size) for info in infos.values()} == {(2, 2)}
