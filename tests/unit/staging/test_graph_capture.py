"""save() while the caller records a graph: what is queued then would run at each replay, and not now."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcp_async import CheckpointEngine, Limits, SaveError, Stager, StagingOptions
from tests.support.accelerator import FakeAccelerator
from tests.support.doubles import assert_same
from tests.support.saves import saved


@pytest.mark.parametrize("overlap", [False, True])
async def test_a_save_inside_of_a_capture_is_refused_by_name_and_leaves_nothing(
    root: Path, overlap: bool
) -> None:
    fake = FakeAccelerator()
    weight = torch.nn.Parameter(fake.tensor(torch.ones(100, 100)))
    weight.grad = torch.zeros(100, 100)
    optim = torch.optim.SGD([weight], lr=0.1)
    state = {"w": weight, "small": fake.tensor(torch.ones(3)), "optim": optim}
    stream = fake.new_stream(fake.all_devices[0])
    async with (
        Stager(StagingOptions(overlap=overlap), backend=fake) as stager,
        CheckpointEngine(root, staging=stager, limits=Limits(pending_saves=1)) as engine,
    ):
        with fake.on_stream(stream), fake.capturing(stream):
            with pytest.raises(SaveError, match="graph is being captured") as refused:
                await engine.save(state, step=0)
            assert not stream.queue, "something of ours was recorded"
            optim.step()  # waits for nobody
        assert refused.value.phase == "capture"
        with fake.on_stream(stream):  # its place is free
            await saved(engine, state, step=0)
        assert_same((await engine.read())["w"], torch.ones(100, 100))


@pytest.mark.parametrize("overlap", [False, True])
async def test_tensors_on_the_host_are_saved_inside_of_a_capture(root: Path, overlap: bool) -> None:
    fake = FakeAccelerator()
    stream = fake.new_stream(fake.all_devices[0])
    async with (
        Stager(StagingOptions(overlap=overlap), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        with fake.on_stream(stream), fake.capturing(stream):
            await saved(engine, {"w": torch.ones(5)})
        assert_same(await engine.read(), {"w": torch.ones(5)})
