"""Ranks that open a checkpoint together load parts of it together, and read of it each by itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dcp_async import CheckpointEngine, LoadError, open_checkpoint
from tests.support.processes import run_in_processes

SIZE = 2
WEIGHT = torch.arange(64.0 * 32).reshape(64, 32)
BIAS = torch.arange(7.0)


def run_rank(rank: int, root: str) -> dict[str, Any]:
    """What a rank saw."""
    store = dist.FileStore(f"{root}/store", SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    try:
        return asyncio.run(_run_rank(rank, f"{root}/run"))
    finally:
        dist.destroy_process_group()


async def _run_rank(rank: int, root: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (SIZE,))

    def sharded(value: torch.Tensor) -> DTensor:
        return distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)

    seen: dict[str, Any] = {}
    async with CheckpointEngine(root) as engine:
        state = {"module": {"w": sharded(WEIGHT), "b": BIAS}, "epoch": 3}
        await engine.save(state, step=1)
        await engine.wait()
        async with engine.checkpoint() as checkpoint:
            await engine.save({"epoch": 4}, step=1, replace=True)
            await engine.wait()
            target: dict[str, Any] = {"w": sharded(torch.zeros_like(WEIGHT)), "b": torch.zeros(7)}
            # each rank has another part of what is asked for
            own = {"w": target["w"]} if rank else target
            await checkpoint.load(own, keys=["w", "b"], rename={"module.*": "*"})
            seen["shard"] = torch.equal(target["w"].to_local(), sharded(WEIGHT).to_local())
            seen["bias"] = torch.equal(target["b"], BIAS)
            if rank == 1:  # nobody has to read with it
                seen["rows"] = torch.equal(await checkpoint.tensor("module.w", slice(30, 34)), WEIGHT[30:34])
                seen["names"] = [name async for name, _ in checkpoint.stream(budget_bytes=4096)]
            later = {"epoch": 0}
            await checkpoint.load(later)
            seen["epoch"] = later["epoch"]
            try:
                await checkpoint.load(later, keys=["epoch"] if rank else ["epochs"])
            except LoadError as error:
                seen["error"] = (type(error).__name__, str(error))
    try:
        async with open_checkpoint(f"{root}/step-00000001") as alone:
            seen["alone"] = await alone.read() if rank else {}
    except LoadError as error:
        seen["alone"] = str(error)
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = str(tmp_path_factory.mktemp("opened"))
    answers: list[dict[str, Any]] = run_in_processes([(run_rank, (rank, root)) for rank in range(SIZE)])
    assert Path(root, "run", "step-00000001", ".metadata").exists()
    return answers


def test_each_rank_loads_its_shards_of_what_was_opened_though_it_was_replaced(
    seen: list[dict[str, Any]],
) -> None:
    assert [answer["shard"] for answer in seen] == [True, True]
    assert [answer["bias"] for answer in seen] == [True, False]
    assert [answer["epoch"] for answer in seen] == [3, 3]


def test_a_rank_reads_by_itself(seen: list[dict[str, Any]]) -> None:
    assert seen[1]["rows"]
    assert seen[1]["names"] == ["module.w", "module.b"]
    assert seen[1]["alone"] == {"epoch": 4}


def test_a_key_that_matches_nothing_on_one_rank_is_the_same_error_on_all(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["error"] == seen[1]["error"]
    kind, text = seen[0]["error"]
    assert kind == "IncompatibleStateError"
    assert "'epochs' of keys asks for" in text
