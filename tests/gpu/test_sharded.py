"""FSDP2 on one rank: DTensors come back, and a change that only their wrappers tell of is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from dcp_async import AppState, CheckpointEngine, SaveError, StagingOptions
from tests.support.devices import assert_equal, keep_busy, on_host, train_step

WIDTH = 256


@pytest.fixture
def mesh(device: torch.device) -> Iterator[DeviceMesh]:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(device.type, (1,))
    dist.destroy_process_group()


def sharded(mesh: DeviceMesh, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))).to(device)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    averages = [optimizer.state[parameter]["exp_avg"] for parameter in model.parameters()]
    return [on_host(tensor) for tensor in (*model.parameters(), *averages)]


@pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])
async def test_a_sharded_trainer_comes_back_as_it_was_though_training_went_on(
    tmp_path: Path, device: torch.device, mesh: DeviceMesh, overlap: bool
) -> None:
    model, optimizer = sharded(mesh, device)
    async with CheckpointEngine(tmp_path, staging=StagingOptions(overlap=overlap)) as engine:
        for _ in range(2):
            train_step(model, optimizer, WIDTH)
        expected = held(model, optimizer)
        response = await engine.save({"app": AppState(model, optimizer)})
        train_step(model, optimizer, WIDTH)
        await response.upload_completion
        loaded = sharded(mesh, device)
        await engine.load({"app": AppState(*loaded)})
    assert_equal(held(*loaded), expected)


async def test_a_change_of_sharded_weights_under_overlap_is_refused_or_came_too_late(
    tmp_path: Path, device: torch.device, mesh: DeviceMesh
) -> None:
    model, _ = sharded(mesh, device)
    async with CheckpointEngine(tmp_path, staging=StagingOptions(overlap=True)) as engine:
        try:
            await (await engine.save({"m": model}, step=0)).upload_completion
            expected = [on_host(parameter) for parameter in model.parameters()]
            keep_busy(device, 300)
            response = await engine.save({"m": model}, step=1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
            await response.upload_completion
        except SaveError:
            return
        saved = await engine.read(1)
        assert_equal(saved["m"].values(), expected)
