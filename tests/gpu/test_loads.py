"""A load wins over what was queued before it, and whoever uses its targets afterwards sees what it loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dcp_async import CheckpointEngine
from tests.support.devices import assert_equal, elements, keep_busy, on_stream, synchronize

plain_and_atomic = pytest.mark.parametrize("atomic", [False, True], ids=["plain", "atomic"])


@plain_and_atomic
async def test_writes_that_a_side_stream_queued_before_a_load_do_not_land_after_it(
    tmp_path: Path, device: torch.device, atomic: bool
) -> None:
    weights = torch.rand(4 * elements(device), device=device)
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save({"w": weights})).upload_completion
        target = torch.zeros_like(weights)
        with on_stream(device, "side"):
            keep_busy(device, 500)
            target.fill_(7.0)
            await engine.load({"w": target}, atomic=atomic)
        assert_equal([target], [weights])


@plain_and_atomic
async def test_what_a_load_filled_may_be_used_on_a_side_stream_at_once(
    tmp_path: Path, device: torch.device, atomic: bool
) -> None:
    weights = torch.rand(64 * elements(device), device=device)
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save({"w": weights})).upload_completion
        target = torch.zeros_like(weights)
        synchronize(device)
        keep_busy(device, 500)  # the default stream, which is that of other threads
        with on_stream(device, "unordered side"):
            await engine.load({"w": target}, atomic=atomic)
            used = target.clone()
        assert_equal([used], [weights])


@plain_and_atomic
async def test_strided_targets_and_other_dtypes_are_filled(
    tmp_path: Path, device: torch.device, atomic: bool
) -> None:
    weights = torch.rand(1000, 1003, device=device)
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save({"w": weights})).upload_completion
        for target in (
            torch.zeros(1000, 1003, device=device),
            torch.zeros(1003, 1000, device=device).t(),
            torch.zeros(2000, 1003, device=device)[::2],
        ):
            await engine.load({"w": target}, atomic=atomic)
            assert_equal([target], [weights])
        half = torch.zeros(1000, 1003, dtype=torch.bfloat16, device=device)
        await engine.load({"w": half}, dtypes="convert", atomic=atomic)
        assert_equal([half], [weights.bfloat16()])


async def test_read_makes_its_tensors_on_the_device_that_was_asked_for(
    tmp_path: Path, device: torch.device
) -> None:
    weights = torch.rand(1000, 1003, device=device)
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save({"w": weights, "small": weights[0]})).upload_completion
        read = await engine.read(device=device)
        assert read["w"].device == read["small"].device == weights.device
        assert_equal([read["w"], read["small"]], [weights, weights[0]])


async def test_read_without_an_index_is_on_the_callers_current_device(
    tmp_path: Path, device: torch.device
) -> None:
    if device.type == "cpu" or torch.accelerator.device_count() < 2:
        pytest.skip("needs two devices")
    async with CheckpointEngine(tmp_path) as engine:
        with torch.accelerator.device_index(1):
            await (await engine.save({"w": torch.ones(9, device=device.type)})).upload_completion
            read = await engine.read(device=device.type)
        assert read["w"].device == torch.device(device.type, 1)


async def test_a_model_without_memory_is_made_on_the_default_device(
    tmp_path: Path, device: torch.device
) -> None:
    source = nn.Linear(512, 512).to(device)
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save({"m": source})).upload_completion
        with torch.device("meta"):
            model = nn.Linear(512, 512)
        with device:
            await engine.load({"m": model})
    assert model.weight.device == source.weight.device
    assert_equal(model.state_dict().values(), source.state_dict().values())


async def test_a_fresh_optimizer_is_filled_on_its_parameters_device(
    tmp_path: Path, device: torch.device
) -> None:
    model = nn.Linear(512, 512).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 512, device=device)).sum().backward()
    optimizer.step()
    expected = [optimizer.state[parameter]["exp_avg"].clone() for parameter in model.parameters()]
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save({"m": model, "o": optimizer})).upload_completion
        fresh = torch.optim.AdamW(model.parameters())
        await engine.load({"m": model, "o": fresh})
    found = [fresh.state[parameter]["exp_avg"] for parameter in model.parameters()]
    assert {tensor.device for tensor in found} == {model.weight.device}
    assert_equal(found, expected)


async def test_memory_an_atomic_load_is_staged_in_the_hosts(tmp_path: Path, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs an allocator that counts")
    weights = torch.rand(64 * elements(device), device=device)
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save({"w": weights})).upload_completion
        target = torch.zeros_like(weights)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        await engine.load({"w": target}, atomic=True)
        assert torch.cuda.max_memory_allocated(device) - before < weights.nbytes // 2
        assert_equal([target], [weights])


@plain_and_atomic
async def test_sparse_targets_are_filled_in_the_order_of_the_callers_stream(
    tmp_path: Path, device: torch.device, atomic: bool
) -> None:
    saved = torch.eye(50).to_sparse().to(device)
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save({"w": saved})).upload_completion
        target = torch.zeros(50, 50).to_sparse().to(device)
        with on_stream(device, "side"):
            keep_busy(device, 200)
            target.add_(torch.ones(50, 50).to_sparse().to(device))
            await engine.load({"w": target}, atomic=atomic)
            used = target.to_dense()
        assert_equal([used], [saved.to_dense()])
