"""The device path against a fake accelerator: order of queue, event and copy, pinning, what goes where."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from dcp_async import CheckpointEngine, LoadError, SaveError, Stager, StagingOptions
from tests.support.accelerator import FakeAccelerator


async def test_copies_follow_the_event_of_the_capture(root: Path) -> None:
    fake = FakeAccelerator()
    weights = fake.tensor(torch.zeros(100_000))
    on_host = torch.full((7,), 3.0)
    async with (
        Stager(StagingOptions(part_bytes=64 * 1024), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        fake.fill(weights, 1.0)  # queued before the capture: must be in the checkpoint
        response = await engine.save({"w": weights, "h": on_host})
        fake.fill(weights, 2.0)
        await response.upload_completion
        saved = await engine.read()
    assert torch.equal(saved["w"], torch.ones(100_000))
    assert torch.equal(saved["h"], on_host)
    assert fake.stream(fake.all_devices[0], "save").copies


@pytest.mark.parametrize("pinned", [True, False])
async def test_pool_is_pinned_once_and_unpinned_at_the_end(root: Path, pinned: bool) -> None:
    fake = FakeAccelerator()
    state = {"w": fake.tensor(torch.ones(1000))}
    options = StagingOptions(pinned=pinned)
    async with Stager(options, backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        for step in range(3):
            await (await engine.save(state, step=step)).upload_completion
    assert len(fake.pin_calls) == (1 if pinned else 0)
    assert {address for _, address, _ in fake.pin_calls}.isdisjoint(fake.pinned)


async def test_host_tensors_record_no_event(root: Path) -> None:
    fake = FakeAccelerator()
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await (await engine.save({"w": torch.ones(5)})).upload_completion
    assert fake.contexts == set()
    assert fake.pin_calls == []


async def test_small_tensors_of_several_dtypes_are_packed_whatever_the_size_of_the_last(root: Path) -> None:
    fake = FakeAccelerator()
    values = {"a": torch.ones(3, dtype=torch.int64), "b": torch.ones(7, dtype=torch.uint8)}
    state = {name: fake.tensor(value) for name, value in values.items()}
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await (await engine.save(state)).upload_completion
        saved = await engine.read()
    assert all(torch.equal(saved[name], value) for name, value in values.items())


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("moment", ["before the save", "while it is staged", "before the load"])
async def test_a_device_that_is_lost_fails_what_needs_it_and_nothing_else(
    root: Path, moment: str, seed: int | None
) -> None:
    fake = FakeAccelerator(2, seed=seed)
    lost, other = fake.all_devices
    state = {"w": fake.tensor(torch.ones(100_000), lost), "s": fake.tensor(torch.ones(5), lost)}
    rest = {"w": fake.tensor(torch.ones(100_000), other), "h": torch.ones(3)}
    async with (
        Stager(StagingOptions(part_bytes=64 * 1024, overlap=True), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        await (await engine.save(state, step=0)).upload_completion
        if moment == "before the save":
            fake.lose(lost)
        elif moment == "while it is staged":
            fake.stream(lost, "save").broken = True
        fails = pytest.raises(SaveError, match="lost")
        with contextlib.nullcontext() if moment == "before the load" else fails:
            await (await engine.save(state, step=1)).upload_completion
        fake.lose(lost)
        for atomic in (False, True):
            with pytest.raises(LoadError, match="lost"):
                await engine.load(state, 0, atomic=atomic)
        # into slots that were lost that device may still write, and there were no more of them
        fails = pytest.raises(SaveError, match="no staging buffer is left")
        with fails if moment == "while it is staged" else contextlib.nullcontext():
            await (await engine.save(rest, step=2)).upload_completion
            await engine.load(rest, 2)
        assert (await engine.read(0))["w"].eq(1).all()
    assert fake.violations == []
