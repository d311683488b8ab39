"""Each checkpoint holds the state of its save(), whatever the device was at and whatever came after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_async import CheckpointEngine, RNGState, SaveError, StagingOptions
from tests.support.devices import (
    Which,
    assert_equal,
    elements,
    entries,
    keep_busy,
    on_host,
    on_stream,
    synchronize,
    train_step,
)
from tests.support.doubles import assert_same

both_kinds = pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])
WIDTH = 512


def engine(root: Path, **staging: Any) -> CheckpointEngine:
    return CheckpointEngine(root, staging=StagingOptions(**staging))


@both_kinds
@pytest.mark.parametrize("stream", ["default", "side"])
async def test_stream_order_is_kept_between_a_save_and_what_is_queued_around_it(
    tmp_path: Path, device: torch.device, overlap: bool, stream: Which
) -> None:
    weights = torch.zeros(32 * elements(device), device=device)
    async with engine(tmp_path, overlap=overlap) as checkpoints:
        for step in range(3):
            with on_stream(device, stream):
                keep_busy(device, 150)
                weights.fill_(float(step))
                response = await checkpoints.save({"w": weights}, step=step)
                await response.staging_completion
                weights.add_(100.0)
                await response.upload_completion
            saved = await checkpoints.read(step)
            assert saved["w"].eq(step).all()


async def test_a_mutation_under_overlap_is_refused_or_came_too_late(
    tmp_path: Path, device: torch.device
) -> None:
    async with engine(tmp_path, overlap=True) as checkpoints:
        weights = torch.ones(64 * elements(device), device=device)
        await (await checkpoints.save({"w": weights}, step=0)).upload_completion
        keep_busy(device, 100)
        response = await checkpoints.save({"w": weights}, step=1)
        weights.add_(1.0)
        try:
            await response.upload_completion
        except SaveError:
            return
        saved = await checkpoints.read(1)
        assert saved["w"].eq(1).all()


@pytest.mark.parametrize("stream", ["default", "side"])
async def test_a_source_that_is_freed_after_save_is_not_given_out_by_the_allocator(
    tmp_path: Path, device: torch.device, stream: Which
) -> None:
    size = 32 * elements(device)
    async with engine(tmp_path, overlap=True) as checkpoints:
        weights = torch.rand(size, device=device)
        kept = on_host(weights)
        keep_busy(device, 100)
        response = await checkpoints.save({"w": weights})
        del weights
        with on_stream(device, stream):
            junk = [torch.full((size,), 9.0, device=device) for _ in range(4)]
        await response.upload_completion
        assert_same((await checkpoints.read())["w"], kept)
        del junk


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "fused capturable": {"fused": True, "capturable": True},
}


@both_kinds
@pytest.mark.parametrize("kind", OPTIMIZERS)
async def test_an_optimizer_comes_back_as_it_was_though_training_went_on(
    tmp_path: Path, device: torch.device, kind: str, overlap: bool
) -> None:
    options = OPTIMIZERS[kind]
    if device.type == "cpu" and "capturable" in options:
        pytest.skip("capturable is for accelerators")

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        layers = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)]
        model = nn.Sequential(*layers).to(device)
        return model, torch.optim.AdamW(model.parameters(), **options)

    def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
        model, optimizer = made()
        for _ in range(2):
            train_step(model, optimizer, WIDTH)
        return model, optimizer

    expected = entries(*trained())
    model, optimizer = trained()
    async with engine(tmp_path, overlap=overlap) as checkpoints:
        keep_busy(device, 80)
        response = await checkpoints.save({"model": model, "optim": optimizer})
        train_step(model, optimizer, WIDTH)
        await response.upload_completion
        loaded = made()
        await checkpoints.load({"model": loaded[0], "optim": loaded[1]})
    found = entries(*loaded)
    assert_equal(found, expected)
    assert [tensor.device for tensor in found] == [tensor.device for tensor in expected]


DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16),
    *(torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]


def odd_tensors(device: torch.device) -> dict[str, Any]:
    """Every dtype by every layout, and what is lazy, expanded, empty, sparse or not on the device at all."""
    generator = torch.Generator().manual_seed(1)
    state: dict[str, Any] = {}
    for dtype in DTYPES:
        largest = 2 if dtype is torch.bool else 100
        raw = torch.randint(0, largest, (1 << 18,), generator=generator, dtype=torch.uint8)
        flat = raw.view(dtype)
        side = int(flat.numel() ** 0.5)
        square = flat[: side * side].view(side, side).to(device)
        name = str(dtype).removeprefix("torch.")
        state[name], state[f"{name} transposed"] = square, square.t()
        state[f"{name} strided"], state[f"{name} 0-d"] = square[:, ::2], square[0, 0]
    lazy = torch.randn(256, 256, dtype=torch.complex64, generator=generator).to(device)
    images = torch.randn(8, 16, 64, 64, generator=generator).to(device)
    return state | {
        "conj": lazy.conj(),
        "conj transposed": lazy.conj().t(),
        "neg": lazy.conj().imag,
        "channels last": images.to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3, device=device),
        "expanded": torch.arange(64.0, device=device)[:, None].expand(64, 32),
        "sparse": torch.eye(64, device=device).to_sparse(),
        "host": torch.ones(5),
        "tuple": (torch.ones(2, device=device), 1),
    }


@both_kinds
async def test_every_dtype_and_layout_comes_back(tmp_path: Path, device: torch.device, overlap: bool) -> None:
    state = odd_tensors(device)
    async with engine(tmp_path, overlap=overlap, part_bytes=1 << 20) as checkpoints:
        await (await checkpoints.save(state)).upload_completion
        saved = await checkpoints.read()
        fillable = {
            name: torch.empty_like(value).zero_()
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
            and name not in ("expanded", "conj", "conj transposed", "neg", "sparse")
        }
        await checkpoints.load(fillable, strict=False)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert_same({name: on_host(saved[name])}, {name: on_host(value)})
    for name, value in fillable.items():
        assert_same({name: on_host(value)}, {name: on_host(state[name])})


async def test_pending_copies_into_pinned_host_tensors_are_waited_for(
    tmp_path: Path, device: torch.device
) -> None:
    """As a moving average that is kept on the host, or a state_dict() that offloads."""
    if device.type != "cuda":
        pytest.skip("nothing else pins")
    weights = torch.ones(64 * elements(device), device=device)
    average = torch.zeros(64 * elements(device), pin_memory=True)
    async with engine(tmp_path) as checkpoints:
        keep_busy(device, 200)
        average.copy_(weights, non_blocking=True)
        await (await checkpoints.save({"average": average})).upload_completion
        saved = await checkpoints.read()
    assert saved["average"].eq(1).all()


async def test_generators_of_the_device_come_back(tmp_path: Path, device: torch.device) -> None:
    async with engine(tmp_path) as checkpoints:
        await (await checkpoints.save({"rng": RNGState()})).upload_completion
        expected = torch.randn(9, device=device), torch.randn(9)
        await checkpoints.load({"rng": RNGState()})
        assert_equal((torch.randn(9, device=device), torch.randn(9)), expected)
        synchronize(device)
