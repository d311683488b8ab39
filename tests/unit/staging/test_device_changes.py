"""What a trainer writes on a device behind an overlapped save without moving a counter: a replayed graph, a
kernel of its own, foreach operations on DTensors. On a fake that runs late."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dcp_async import CheckpointEngine, Stager, StagingOptions, StateMutatedError
from dcp_async.staging.watch import byte_sample
from tests.support.accelerator import FakeAccelerator
from tests.support.device_memory import Memory
from tests.support.doubles import FaultyStorage, assert_same
from tests.support.saves import HELD, saved

ROWS = 512


@pytest.fixture
def fake() -> FakeAccelerator:
    return FakeAccelerator(2)


@pytest.fixture
async def stager(fake: FakeAccelerator) -> AsyncIterator[Stager]:
    async with Stager(HELD, backend=fake) as stager:
        yield stager


def write(fake: FakeAccelerator, tensor: torch.Tensor) -> None:
    """Launch a kernel that autograd knows nothing of."""
    memory = Memory.of(tensor)
    launch_add(fake, memory)


def launch_add(fake: FakeAccelerator, memory: Memory) -> None:
    def work() -> None:
        memory.tensor().add_(1)

    fake.launch(work, fake.device_at(memory.address))


def zeros(fake: FakeAccelerator, *shape: int, device: int = 0) -> torch.Tensor:
    return fake.tensor(torch.zeros(shape), fake.all_devices[device])


async def written_while_staged(
    faulty: FaultyStorage, stager: Stager, state: dict[str, Any], change: Callable[[], Any]
) -> None:
    """Save ``state``; in the middle of its staging the device runs what ``change`` launches."""
    fake = stager.backend
    assert isinstance(fake, FakeAccelerator)
    async with CheckpointEngine(faulty, staging=stager) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(state)
            await gate.until_arrived()
            assert not response.staging_completion.done()
            change()
            fake.finish()
        try:
            await response.upload_completion
        except StateMutatedError:
            assert await engine.latest() is None
            raise


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "row-major": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.t(),
    "every other column": lambda tensor: tensor[:, ::2],
    "of rows that are long": lambda tensor: tensor.view(4, -1),
    "of columns that are short": lambda tensor: tensor.view(-1, 4).t(),
    "bfloat16": lambda tensor: tensor.view(torch.bfloat16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_write_that_moves_no_counter_on_a_device_is_seen(
    faulty: FaultyStorage, stager: Stager, fake: FakeAccelerator, layout: str
) -> None:
    tensor = zeros(fake, 2 * ROWS, 2 * ROWS)
    state = {"first": zeros(fake, ROWS, ROWS), "w": LAYOUTS[layout](tensor)}
    with pytest.raises(StateMutatedError, match=r"\bw\b"):
        await written_while_staged(faulty, stager, state, lambda: write(fake, tensor))


async def test_a_write_on_each_of_several_devices_is_seen(
    faulty: FaultyStorage, stager: Stager, fake: FakeAccelerator
) -> None:
    state = {f"w{device}": zeros(fake, 2 * ROWS, 2 * ROWS, device=device) for device in (0, 1)}
    with pytest.raises(StateMutatedError, match=r"\bw1\b"):
        await written_while_staged(faulty, stager, state, lambda: write(fake, state["w1"]))


async def test_a_foreach_write_to_dtensors_on_a_device_is_seen(
    faulty: FaultyStorage, stager: Stager, fake: FakeAccelerator, mesh: DeviceMesh
) -> None:
    weights = [
        DTensor.from_local(zeros(fake, ROWS, 2 * ROWS), mesh, [Shard(0)], run_check=False) for _ in range(3)
    ]

    def foreach() -> None:  # moves no counter, neither of the wrapper nor of the local part
        for weight in weights:
            write(fake, weight._local_tensor)

    with pytest.raises(StateMutatedError, match=r"\bw\.0\b"):
        await written_while_staged(faulty, stager, {"w": weights}, foreach)


async def test_what_was_launched_before_the_save_is_no_change(root: Path, fake: FakeAccelerator) -> None:
    """The sample is taken in the order of the caller's queue, and so is every copy."""
    weights = zeros(fake, ROWS, ROWS)
    side = fake.new_stream(fake.all_devices[0])
    async with (
        Stager(StagingOptions(overlap=True), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        for step in range(3):
            with fake.on_stream(side):
                write(fake, weights)
                await saved(engine, {"w": weights}, step=step)
        fake.finish()
        for step in range(3):
            assert_same(await engine.read(step), {"w": torch.full((ROWS, ROWS), step + 1.0)})


async def test_a_write_to_what_was_copied_already_is_welcome_on_a_device(
    faulty: FaultyStorage, stager: Stager, fake: FakeAccelerator
) -> None:
    """What is compared is what was staged."""
    state = {"first": zeros(fake, ROWS, 2 * ROWS), "second": zeros(fake, 2 * ROWS, 2 * ROWS)}
    small = stager.pool.slot_bytes * 8
    assert small < state["first"].nbytes  # only the first run is staged when its writes are held
    rows = Memory.of(state["first"][: small // (8 * ROWS) - 16])

    def change() -> None:
        launch_add(fake, rows)

    with pytest.raises(StateMutatedError):  # but a torn tensor is one: its later rows were written, too
        await written_while_staged(faulty, stager, state, lambda: write(fake, state["first"]))
    await written_while_staged(faulty, stager, state, change)


async def test_host_tensors_beside_a_device_are_sampled(
    faulty: FaultyStorage, stager: Stager, fake: FakeAccelerator
) -> None:
    state = {"on_device": zeros(fake, ROWS, ROWS), "on_host": torch.zeros(2 * ROWS, 2 * ROWS)}
    with pytest.raises(StateMutatedError, match="on_host"):
        await written_while_staged(faulty, stager, state, lambda: state["on_host"].data.add_(1))


async def test_the_kernel_is_never_asked_for_memory_of_a_device(
    root: Path, fake: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    read = byte_sample._read

    def recorded(places: Any, pointers: Any) -> Any:
        asked.extend(pointers)
        return read(places, pointers)

    monkeypatch.setattr(byte_sample, "_read", recorded)
    state = {"on_device": zeros(fake, ROWS, ROWS), "on_host": torch.zeros(ROWS, ROWS)}
    async with (
        Stager(StagingOptions(overlap=True), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        await saved(engine, state)
    assert {fake.device_at(address) for address in asked} == {None}


@pytest.mark.parametrize("count", [100, 300])
async def test_a_sample_is_one_batch_however_many_tensors_there_are(
    root: Path, fake: FakeAccelerator, count: int
) -> None:
    side = fake.new_stream(fake.all_devices[0])
    state = {f"w{number}": zeros(fake, 200, 100) for number in range(count)}
    async with (
        Stager(StagingOptions(overlap=True), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        with fake.on_stream(side):
            await saved(engine, state)
    assert side.copies == [4 * 64]


async def test_a_nan_of_whatever_bits_is_no_change(root: Path, fake: FakeAccelerator, stager: Stager) -> None:
    bits = torch.full((ROWS, 100), 0x7FFF, dtype=torch.int16)
    state = {"w": fake.tensor(bits.view(torch.bfloat16))}
    async with CheckpointEngine(root, staging=stager) as engine:
        await saved(engine, state)
        assert torch.equal((await engine.read())["w"].view(torch.int16), bits)
