"""Copies from devices: queued ahead and beside each other, packed, never into a slot that was given back."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, Limits, SaveCancelled, SaveError, Stager, StagingOptions
from dcp_async.save import SavePipeline
from dcp_async.staging.copier import Copier
from dcp_async.staging.memory import buffer_pool
from tests.support.accelerator import FakeAccelerator
from tests.support.device_queue import FakeEvent, FakeStream
from tests.support.doubles import data_files, random_tensor

KIB = 1024
PART = 64 * KIB

Order = Any


class CountingPool(buffer_pool.BufferPool):
    """Looks at each lease: no queued copy names memory that is handed out."""

    def __init__(self, fake: FakeAccelerator, **options: Any) -> None:
        super().__init__(**options)
        self._fake = fake
        self.most = 0

    def _try_lease(self, wanted: int) -> buffer_pool.Lease | None:
        lease = super()._try_lease(wanted)
        if lease is not None:
            start = lease.arena.tensor.data_ptr() + lease.offset
            self._fake.assert_idle(start, lease.count * lease.slot_bytes)
        self.most = max(self.most, self.leased)
        return lease

    def pin(self, stager: Stager) -> None:
        """Until the pool is pinned, copies are waited for one by one."""
        for arena in self._arenas:
            assert stager.pinner.want(arena, self._fake.all_devices[0]).result(60)


def counting(stager: Stager, fake: FakeAccelerator) -> CountingPool:
    pool = CountingPool(fake, slot_bytes=PART, budget_bytes=stager.options.pool_bytes)
    stager.pool = pool
    return pool


@asynccontextmanager
async def engine_on(
    fake: FakeAccelerator, root: Path, *, pending_saves: int = 1, **options: Any
) -> AsyncIterator[CheckpointEngine]:
    staging = StagingOptions(part_bytes=PART, **options)
    async with (
        Stager(staging, backend=fake) as stager,
        CheckpointEngine(root, staging=stager, limits=Limits(pending_saves=pending_saves)) as engine,
    ):
        yield engine
    assert fake.violations == []


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def floats(fake: FakeAccelerator, count: int, size: int) -> dict[str, Any]:
    """``count`` tensors of ``size`` elements each."""
    return {
        f"w{number:04d}": fake.tensor(random_tensor(torch.float32, (size,), seed=number))
        for number in range(count)
    }


def mixed_state(fake: FakeAccelerator | None) -> dict[str, Any]:
    """Small and large tensors in turn, of several dtypes, some strided, some on the host."""
    generator = torch.Generator().manual_seed(5)

    def placed(tensor: torch.Tensor, device: int = 0) -> torch.Tensor:
        return tensor if fake is None else fake.tensor(tensor, fake.all_devices[device])

    state: dict[str, Any] = {"step": 3, "host": torch.arange(100)}
    for number in range(40):
        size = (7, 300, 20_000, 1, 16_384, 40_000)[number % 6]
        values = torch.randn(size, generator=generator)
        dtype = (torch.float32, torch.bfloat16, torch.float64)[number % 3]
        state[f"w{number:02d}"] = placed(values.to(dtype), number % 2)
    state["strided"] = placed(torch.randn(300, 200, generator=generator)).t()
    state["empty"] = placed(torch.zeros(0, 4))
    return state


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget", [None, 20 * 1024 * KIB])
@pytest.mark.parametrize("order", ["late", "trainer first", "package first"])
async def test_a_file_of_device_tensors_is_the_file_of_the_same_on_the_host(
    tmp_path: Path, order: Order, budget: int | None, overlap: bool
) -> None:
    async with CheckpointEngine(tmp_path / "host", staging=StagingOptions(part_bytes=PART)) as engine:
        await (await engine.save(mixed_state(None), step=0)).upload_completion
    wanted = [file.read_bytes() for file in data_files(tmp_path / "host" / "step-00000000")]
    fake = FakeAccelerator(2, order=order)
    state = mixed_state(fake)
    async with engine_on(fake, tmp_path / "device", budget_bytes=budget, overlap=overlap) as engine:
        for step in range(3):  # the second finds a plan, the third a scratch that was used
            await (await engine.save(state, step=step)).upload_completion
            held = [file.read_bytes() for file in data_files(tmp_path / "device" / f"step-{step:08d}")]
            assert held == wanted


async def test_small_tensors_travel_by_stretches_and_not_one_by_one(root: Path) -> None:
    fake = FakeAccelerator()
    state = {
        f"w{number:04d}": fake.tensor(random_tensor(torch.float32, (64,), seed=number))
        for number in range(1000)
    }
    async with engine_on(fake, root) as engine:
        for step in range(2):
            await (await engine.save(state, step=step)).upload_completion
        saved = await engine.read(1)
    parts = -(-sum(file.stat().st_size for file in data_files(root / "step-00000001")) // PART)
    batches = fake.stream(fake.all_devices[0], "save").copies
    # a scratch is filled with constants once, then each save gathers once, and each run is one transfer
    assert Counter(batches)[1000] == 2
    assert len(batches) <= 1 + 2 * (1 + parts)
    assert all(same_bits(saved[name], fake.values(state[name])) for name in state)


@pytest.mark.parametrize("order", ["late", "trainer first", "package first"])
async def test_what_overlap_copies_of_small_tensors_is_the_state_of_the_call(
    root: Path, order: Order
) -> None:
    fake = FakeAccelerator(order=order)
    state = {f"w{number:03d}": fake.tensor(torch.zeros(64)) for number in range(200)}
    stream = fake.current_stream(fake.all_devices[0])
    async with engine_on(fake, root, overlap=True) as engine:
        for step in range(4):
            for tensor in state.values():
                fake.fill(tensor, float(step))
            before = len(stream.copies)
            response = await engine.save(state, step=step)
            queued = stream.copies[before:]
            for tensor in state.values():  # at once: no net catches what was copied in save()
                fake.fill(tensor, 100.0)
            await response.upload_completion
            saved = await engine.read(step)
            assert all(torch.equal(values, torch.full((64,), float(step))) for values in saved.values())
            # one batch per dtype, not an allocation and a launch for each
            assert queued == [200]


async def test_two_saves_in_flight_do_not_share_a_scratch(root: Path) -> None:
    fake = FakeAccelerator()
    state = {f"w{number}": fake.tensor(torch.zeros(64)) for number in range(50)}
    async with engine_on(fake, root, overlap=True, pending_saves=3) as engine:
        await (await engine.save(state, step=0)).upload_completion
        responses = []
        for step in range(1, 4):
            for tensor in state.values():
                fake.fill(tensor, float(step))
            responses.append(await engine.save(state, step=step))
        for response in responses:
            await response.upload_completion
        for step in range(1, 4):
            saved = await engine.read(step)
            assert all(torch.equal(values, torch.full((64,), float(step))) for values in saved.values())


class FullDevice(FakeAccelerator):
    """No memory is left for us."""

    def allocate(self, like: Any, stream: FakeStream) -> torch.Tensor:
        if stream in self._own.values() or self.is_full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().allocate(like, stream)

    is_full = False


@pytest.mark.parametrize("overlap", [False, True])
async def test_a_full_device_costs_speed_and_no_save(root: Path, overlap: bool) -> None:
    fake = FullDevice()
    state = {f"w{number}": fake.tensor(torch.full((64,), float(number))) for number in range(50)}
    fake.is_full = True
    async with engine_on(fake, root, overlap=overlap) as engine:
        for step in range(3):
            await (await engine.save(state, step=step)).upload_completion
        saved = await engine.read()
    assert all(same_bits(saved[name], fake.values(state[name])) for name in state)


async def test_all_devices_copy_beside_each_other(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeAccelerator(3)
    state = {
        f"w{number}": fake.tensor(torch.ones(PART), device) for number, device in enumerate(fake.all_devices)
    }
    options = StagingOptions(part_bytes=PART)
    waits: list[list[int]] = []

    def synchronize(event: FakeEvent) -> None:
        waits.append(
            [stream.device.index for stream in fake.streams if stream.queue and stream.name == "save"]
        )
        fake.run_until(event)

    async with Stager(options, backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        pool = counting(stager, fake)
        await (await engine.save(state, step=0)).upload_completion
        pool.pin(stager)
        monkeypatch.setattr(FakeEvent, "synchronize", synchronize)
        await (await engine.save(state, step=1)).upload_completion
    assert waits[0] == [0, 1, 2]


async def test_without_a_budget_every_copy_is_queued_before_the_first_wait(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeAccelerator()
    state = floats(fake, 20, PART // 4 + 16)
    stream = fake.stream(fake.all_devices[0], "save")
    queued_at_wait: list[int] = []

    def synchronize(event: FakeEvent) -> None:
        queued_at_wait.append(sum(stream.copies))
        fake.run_until(event)

    options = StagingOptions(part_bytes=PART)
    async with Stager(options, backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        pool = counting(stager, fake)
        await (await engine.save(state, step=0)).upload_completion
        pool.pin(stager)
        stream.copies.clear()
        monkeypatch.setattr(FakeEvent, "synchronize", synchronize)
        await (await engine.save(state, step=1)).upload_completion
        assert len(queued_at_wait) >= 3
        assert set(queued_at_wait) == {sum(stream.copies)}


@pytest.mark.parametrize("after", [0, 1, 3])
async def test_a_batch_that_raises_half_way_gives_no_slot_back_under_a_copy(root: Path, after: int) -> None:
    fake = FakeAccelerator()
    state = floats(fake, 12, PART // 2)
    stream = fake.stream(fake.all_devices[0], "save")
    async with (
        Stager(StagingOptions(part_bytes=PART), backend=fake) as stager,
        CheckpointEngine(root, staging=stager, limits=Limits(pending_saves=1)) as engine,
    ):
        pool = counting(stager, fake)
        await (await engine.save(state, step=0)).upload_completion
        pool.pin(stager)
        stream.fail_copy_after = after
        with pytest.raises(SaveError, match="out of memory"):
            await engine.save(state, step=1)
        assert pool.leased == 0
        assert not stream.queue  # nothing runs any more that would write into them
        await (await engine.save(state, step=2)).upload_completion
        saved = await engine.read(2)
    assert all(same_bits(saved[name], fake.values(state[name])) for name in state)
    assert fake.violations == []


async def test_slots_of_a_device_that_does_not_answer_are_lost(root: Path) -> None:
    fake = FakeAccelerator()
    state = {"w": fake.tensor(random_tensor(torch.float32, (PART,), seed=1))}
    async with (
        Stager(StagingOptions(part_bytes=PART), backend=fake) as stager,
        CheckpointEngine(root, staging=stager, limits=Limits(pending_saves=1)) as engine,
    ):
        pool = counting(stager, fake)
        await (await engine.save(state, step=0)).upload_completion
        pool.pin(stager)
        fake.lose(fake.all_devices[0])
        with pytest.raises(SaveError, match="device"):
            await engine.save(state, step=1)
        # what is on the host can still be saved, in other slots
        await (await engine.save({"h": torch.arange(9)}, step=2)).upload_completion
        assert torch.equal((await engine.read(2))["h"], torch.arange(9))
        assert pool.leased == 0


async def test_a_cancelled_save_waits_for_the_copies_that_are_queued(root: Path) -> None:
    fake = FakeAccelerator()
    state = floats(fake, 8, PART // 4 + 16)
    stream = fake.stream(fake.all_devices[0], "save")
    async with (
        Stager(StagingOptions(part_bytes=PART, overlap=True), backend=fake) as stager,
        CheckpointEngine(root, staging=stager, limits=Limits(pending_saves=1)) as engine,
    ):
        pool = counting(stager, fake)
        await (await engine.save(state, step=0)).upload_completion
        pool.pin(stager)
        for step in range(1, 6):
            response = await engine.save(state, step=step)
            response.cancel()
            with pytest.raises(SaveCancelled):
                await response.upload_completion
            assert pool.leased == 0
            assert not stream.queue
    assert fake.violations == []


async def test_under_a_budget_runs_are_in_flight_beside_each_other(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeAccelerator()
    state = floats(fake, 60, PART // 4 + 16)
    options = StagingOptions(part_bytes=PART, budget_bytes=32 * PART)
    waiting: list[int] = []

    def synchronize(event: FakeEvent) -> None:
        waiting.append(sum(isinstance(entry, FakeEvent) for entry in event.stream.queue))
        fake.run_until(event)

    async with Stager(options, backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        pool = counting(stager, fake)
        await (await engine.save(state, step=0)).upload_completion
        pool.pin(stager)
        monkeypatch.setattr(FakeEvent, "synchronize", synchronize)
        await (await engine.save(state, step=1)).upload_completion
        assert max(waiting) >= 2
        assert pool.most <= 32
    assert fake.violations == []


def test_streams_are_made_once_per_device_and_purpose() -> None:
    fake = FakeAccelerator(2)
    made: Sequence[FakeStream] = [fake.stream(device, "save") for device in fake.all_devices * 3]
    assert len(set(map(id, made))) == 2


async def test_saves_that_wait_for_staging_beside_each_other_do_not_share_a_scratch(root: Path) -> None:
    fake = FakeAccelerator()
    states = [
        {f"w{number}": fake.tensor(torch.full((1000,), float(value))) for number in range(400)}
        for value in range(2)
    ]
    async with engine_on(fake, root, budget_bytes=4 * PART, pending_saves=2) as engine:
        await (await engine.save(states[0], step=0)).upload_completion
        for step in range(2, 8, 2):
            saves = [engine.save(state, step=step + value) for value, state in enumerate(states)]
            for response in await asyncio.gather(*saves):
                await response.upload_completion
            for value in range(2):
                saved = await engine.read(step + value)
                assert all(torch.equal(held, torch.full((1000,), float(value))) for held in saved.values())


async def test_a_change_of_what_the_first_save_had_no_time_to_copy_is_refused(root: Path) -> None:
    fake = FakeAccelerator()
    # more than overlap copies aside before there is a plan
    state = {f"w{number:03d}": fake.tensor(torch.zeros(8 * KIB)) for number in range(600)}
    async with engine_on(fake, root, overlap=True) as engine:
        response = await engine.save(state, step=0)
        for tensor in state.values():
            fake.fill(tensor, 1.0)
        with pytest.raises(SaveError, match="w599"):
            await response.upload_completion


class Counting(FakeAccelerator):
    """Knows what of its memory is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[weakref.ref[torch.Tensor]] = []

    def allocate(self, like: Any, stream: FakeStream) -> torch.Tensor:
        made = super().allocate(like, stream)
        if stream in self._own.values():
            self.allocated.append(weakref.ref(made))
        return made


async def test_a_state_that_grows_keeps_no_scratch_of_what_it_was(root: Path) -> None:
    fake = Counting()
    state: dict[str, Any] = {}
    async with engine_on(fake, root) as engine:
        for step in range(3):
            state |= {f"w{step}.{number}": fake.tensor(torch.ones(64)) for number in range(50)}
            await (await engine.save(state, step=step)).upload_completion
        gc.collect()
        assert [scratch() is not None for scratch in fake.allocated] == [False, False, True]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
async def test_a_scratch_serves_saves_in_every_mode_of_autograd(root: Path, mode: Any) -> None:
    fake = FakeAccelerator()
    state = {f"w{number}": fake.tensor(torch.ones(64)).requires_grad_() for number in range(20)}
    async with engine_on(fake, root, overlap=True) as engine:
        for step, entered in enumerate((torch.enable_grad, mode, torch.enable_grad, mode)):
            with entered():
                response = await engine.save(state, step=step)
            await response.upload_completion
            assert all(torch.equal(values, torch.ones(64)) for values in (await engine.read(step)).values())


async def test_a_change_before_a_run_of_host_tensors_alone_has_ended_the_save_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeAccelerator(order="trainer first")
    # more than overlap copies aside before there is a plan; behind them, a run of the host alone
    state: dict[str, Any] = {f"w{number:03d}": fake.tensor(torch.zeros(8 * KIB)) for number in range(600)}
    state["x"] = torch.zeros(16 * PART)
    enqueue = Copier.enqueue

    def enqueue_and_train(copier: Copier, *arguments: Any) -> Any:
        runs = enqueue(copier, *arguments)
        fake.fill(state["w301"], 1.0)  # the packing kernel was queued, and has not run
        return runs

    async with (
        Stager(StagingOptions(part_bytes=PART, overlap=True), backend=fake) as stager,
        CheckpointEngine(root, staging=stager, limits=Limits(pending_saves=1)) as engine,
    ):
        pool = counting(stager, fake)
        larger = {
            "w": torch.zeros(16 << 20, dtype=torch.uint8),
            "v": torch.zeros(32 << 20, dtype=torch.uint8),
        }
        await (await engine.save(larger, step=0)).upload_completion
        pool.pin(stager)
        monkeypatch.setattr(Copier, "enqueue", enqueue_and_train)
        response = await engine.save(state, step=1)
        with pytest.raises(SaveError, match="w301"):
            await response.upload_completion
    assert fake.violations == []


async def test_a_scratch_is_not_written_by_a_save_that_has_failed_before(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeAccelerator()
    (device,) = fake.all_devices
    state = {f"w{number}": fake.tensor(torch.zeros(64)) for number in range(50)}
    other, enqueue = fake.new_stream(device), Copier.enqueue

    def fill(value: float) -> None:
        for tensor in state.values():
            fake.fill(tensor, value)
        fake.current_stream(device).synchronize()

    async def fail(pipeline: SavePipeline) -> None:
        raise RuntimeError("before anything is staged")

    def enqueue_late(copier: Copier, *arguments: Any) -> Any:
        fill(2.0)
        other.synchronize()
        return enqueue(copier, *arguments)

    async with engine_on(fake, root, overlap=True) as engine:
        await (await engine.save(state, step=0)).upload_completion
        with monkeypatch.context() as patched, fake.on_stream(other):
            patched.setattr(SavePipeline, "_run", fail)
            response = await engine.save(state, step=1)
            with pytest.raises(SaveError, match="before anything"):
                await response.upload_completion
        fill(1.0)
        monkeypatch.setattr(Copier, "enqueue", enqueue_late)
        await (await engine.save(state, step=2)).upload_completion
        saved = await engine.read(2)
    assert all(torch.equal(values, torch.ones(64)) for values in saved.values())
