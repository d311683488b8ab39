"""Pinned tensors on the host that a non-blocking copy is still filling, or reading, when save() or load() is
called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, Stager, StagingOptions
from tests.support.accelerator import FakeAccelerator
from tests.support.doubles import assert_same
from tests.support.saves import saved


def pinned(fake: FakeAccelerator, numel: int) -> torch.Tensor:
    """Pinned host memory of zeros."""
    memory = fake.pinned_buffer(fake.all_devices[0], 4 * numel)
    assert memory is not None
    return memory.view(torch.float32).fill_(0)


def copy_later(fake: FakeAccelerator, target: torch.Tensor, value: float, device: int = 0) -> None:
    """``target.copy_(on_device, non_blocking=True)`` on the current stream."""
    on = fake.all_devices[device]
    fake.current_stream(on).copy([target], [fake.tensor(torch.full(target.shape, value), on)])
    torch.autograd.graph.increment_version([target])


@pytest.mark.parametrize("numel", [10, 300_000], ids=["small", "large"])
@pytest.mark.parametrize("beside", [False, True], ids=["host only", "beside a device"])
@pytest.mark.parametrize("overlap", [False, True])
async def test_a_copy_that_is_queued_into_host_memory_is_waited_for(
    root: Path, overlap: bool, beside: bool, numel: int
) -> None:
    fake = FakeAccelerator()
    state: dict[str, Any] = {"ema": pinned(fake, numel)}
    if beside:
        state["w"] = fake.tensor(torch.ones(1000))
    side = fake.new_stream(fake.all_devices[0])
    async with (
        Stager(StagingOptions(overlap=overlap), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        for step in (1, 2):
            with fake.on_stream(side):
                copy_later(fake, state["ema"], float(step))
                assert state["ema"][0] == step - 1
                await saved(engine, state, step=step)
            assert_same((await engine.read(step))["ema"], torch.full((numel,), float(step)))


async def test_a_tensor_that_is_replaced_by_a_pinned_one_is_waited_for(root: Path) -> None:
    # as Tensor.to("cpu", non_blocking=True) does in each step
    fake = FakeAccelerator()
    state = {"ema": torch.zeros(1000)}
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        fake.tensor(torch.zeros(1))
        for step in range(3):
            await saved(engine, state, step=step)
            assert_same((await engine.read(step))["ema"], torch.full((1000,), float(step)))
            state["ema"] = pinned(fake, 1000)
            copy_later(fake, state["ema"], step + 1.0)


async def test_the_current_device_is_waited_for_beside_those_of_the_state(root: Path) -> None:
    fake = FakeAccelerator(2)
    state = {"ema": pinned(fake, 1000), "w": fake.tensor(torch.ones(1000), fake.all_devices[0])}
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        with fake.on_device(1):
            copy_later(fake, state["ema"], 1.0, device=1)
            await saved(engine, state)
        assert_same((await engine.read())["ema"], torch.ones(1000))


async def test_a_queue_is_not_waited_for_where_nothing_is_pinned(root: Path) -> None:
    fake = FakeAccelerator()
    fake.launch(lambda: None)
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await saved(engine, {"w": torch.ones(1000)})
    assert fake.current_stream(fake.all_devices[0]).queue


@pytest.mark.parametrize("overlap", [False, True])
async def test_pinned_tensors_are_saved_inside_of_a_capture(root: Path, overlap: bool) -> None:
    fake = FakeAccelerator()
    ema = pinned(fake, 1000).fill_(1)
    stream = fake.new_stream(fake.all_devices[0])
    async with (
        Stager(StagingOptions(overlap=overlap), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        with fake.on_stream(stream), fake.capturing(stream):
            await saved(engine, {"ema": ema})
        assert_same((await engine.read())["ema"], torch.ones(1000))
        assert not stream.queue


async def test_which_tensors_are_pinned_is_asked_once_for_a_structure(root: Path) -> None:
    asked = []

    class Counted(FakeAccelerator):
        def pinned_among(self, tensors: Sequence[torch.Tensor]) -> list[int]:
            asked.append(len(tensors))
            return super().pinned_among(tensors)

    fake = Counted()
    state = {"ema": pinned(fake, 1000), "w": torch.ones(10)}
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        for step in range(3):
            await saved(engine, state, step=step)
    assert asked == [2]


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("beside", [False, True], ids=["host only", "beside a device"])
async def test_a_load_waits_for_what_is_queued_from_and_into_the_host_memory_that_it_fills(
    root: Path, beside: bool, atomic: bool
) -> None:
    fake = FakeAccelerator()
    side = fake.new_stream(fake.all_devices[0])
    into: dict[str, Any] = {"ema": pinned(fake, 1000), "offloaded": pinned(fake, 1000).fill_(5)}
    if beside:
        into["w"] = fake.tensor(torch.zeros(10))
    used = fake.tensor(torch.zeros(1000))
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await saved(engine, {name: torch.full_like(value, 3.0) for name, value in into.items()})
        with fake.on_stream(side):
            copy_later(fake, into["ema"], 7.0)
            fake.current_stream(fake.all_devices[0]).copy([used], [into["offloaded"]])
            await engine.load(into, atomic=atomic)
    fake.finish()
    for value in into.values():
        assert_same(value.clone(), torch.full(value.shape, 3.0))
    assert_same(used.clone(), torch.full((1000,), 5.0))


async def test_a_load_into_host_memory_that_is_not_pinned_waits_for_no_queue(root: Path) -> None:
    fake = FakeAccelerator()
    fake.launch(lambda: None)
    into = {"w": torch.zeros(1000)}
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await saved(engine, {"w": torch.ones(1000)})
        await engine.load(into)
    assert_same(into["w"], torch.ones(1000))
    assert fake.current_stream(fake.all_devices[0]).queue
