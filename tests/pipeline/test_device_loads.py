"""Loads onto devices: in order with the trainer's queues, through the pinned pool, never a slot given back
early. On the fake accelerator, whose streams run as late as they may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from dcp_async import AppState, CheckpointEngine, LoadError, Stager, StagingOptions
from dcp_async.staging import Lease
from tests.support.accelerator import FakeAccelerator
from tests.support.saves import PART, saved


def numbers(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) * 200).to(dtype)


W = numbers(100, 100)


@asynccontextmanager
async def engine_on(
    fake: FakeAccelerator, root: Path, *, part_bytes: int = PART, budget_bytes: int | None = None
) -> AsyncIterator[CheckpointEngine]:
    options = StagingOptions(part_bytes=part_bytes, budget_bytes=budget_bytes)
    async with Stager(options, backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        yield engine
        assert stager.pool.leased == 0


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """What the device's memory holds now, whatever is queued."""
    return tensor.detach().clone()


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("atomic", [False, True])
async def test_order_what_was_queued_before_a_load_does_not_land_after_it(root: Path, atomic: bool) -> None:
    fake = FakeAccelerator()
    (device,) = fake.all_devices
    async with engine_on(fake, root) as engine:
        await saved(engine, {"w": W})
        target = fake.tensor(torch.zeros(100, 100))
        with fake.on_stream(fake.new_stream(device)):
            fake.fill(target, 7.0)
            await engine.load({"w": target}, atomic=atomic)
    assert torch.equal(on_host(target), W)  # done when load() returned, for whatever stream comes next
    fake.finish()
    assert torch.equal(on_host(target), W)


@pytest.mark.parametrize("atomic", [False, True])
async def test_order_every_kind_of_target_is_written_behind_the_callers_queue(
    root: Path, atomic: bool
) -> None:
    fake = FakeAccelerator(2)
    names = {
        "plain": fake.tensor(torch.zeros(100, 100)),
        "turned": fake.tensor(torch.zeros(100, 100)).t(),
        "gappy": fake.tensor(torch.zeros(200, 100))[::2],
        "other": fake.tensor(torch.zeros(100, 100), fake.all_devices[1]),
        "small": fake.tensor(torch.zeros(3)),
        "scalar": fake.tensor(torch.zeros(())),
        "bytes": fake.tensor(torch.zeros(5, dtype=torch.uint8)),
        "parameter": torch.nn.Parameter(fake.tensor(torch.zeros(100, 100))),
        "host": torch.zeros(100, 100),
    }
    wanted = {
        name: numbers(*tensor.shape, seed=index, dtype=tensor.dtype)
        for index, (name, tensor) in enumerate(names.items())
    }
    async with engine_on(fake, root) as engine:
        await saved(engine, wanted)
        for name, tensor in names.items():
            if name != "host":
                fake.fill(tensor.detach(), 7.0)
        await engine.load(names, atomic=atomic)
    fake.finish()
    for name, tensor in names.items():
        assert torch.equal(on_host(tensor), wanted[name]), name


class Counting(FakeAccelerator):
    """Counts what is allocated on its devices."""

    allocated = 0

    def empty(
        self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> torch.Tensor:
        made = super().empty(*shape, dtype=dtype, device=device)
        self.allocated += made.nbytes
        return made


async def test_memory_an_atomic_load_is_staged_in_the_hosts(root: Path) -> None:
    fake = Counting()
    async with engine_on(fake, root) as engine:
        await saved(engine, {"w": W})
        target = fake.tensor(torch.zeros(100, 100))
        fake.allocated = 0
        await engine.load({"w": target}, atomic=True)
    assert fake.allocated == 0
    assert torch.equal(on_host(target), W)


async def test_capture_a_load_inside_of_a_graph_capture_is_refused_by_name(root: Path) -> None:
    fake = FakeAccelerator()
    target = fake.tensor(torch.zeros(100, 100))
    async with engine_on(fake, root) as engine:
        await saved(engine, {"w": W})
        with fake.capturing(fake.current_stream(fake.all_devices[0])):
            with pytest.raises(LoadError, match="captured"):
                await engine.load({"w": target})
            with pytest.raises(LoadError, match="captured"):
                await engine.read(device="cuda")
        await engine.load({"w": target})
    assert torch.equal(on_host(target), W)


async def test_conversion_to_another_dtype_is_done_on_the_device(root: Path) -> None:
    fake = FakeAccelerator()
    target = fake.tensor(torch.zeros(100, 100, dtype=torch.bfloat16))
    part = fake.tensor(torch.zeros(7, dtype=torch.float64))
    small = numbers(7, seed=2)
    async with engine_on(fake, root) as engine:
        await saved(engine, {"w": W, "s": small})
        fake.fill(target, 7.0)
        await engine.load({"w": target, "s": part}, dtypes="convert")
    fake.finish()
    assert torch.equal(on_host(target), W.bfloat16())
    assert torch.equal(on_host(part), small.double())


# --- contexts ---------------------------------------------------------------------------------------


async def test_contexts_a_load_of_host_tensors_touches_no_device(root: Path) -> None:
    fake = FakeAccelerator()
    target = torch.zeros(100, 100)
    async with engine_on(fake, root) as engine:
        await saved(engine, {"w": W})
        await engine.load({"w": target})
        assert torch.equal((await engine.read())["w"], W)
    assert torch.equal(target, W)
    assert fake.contexts == set()
    assert fake.pin_calls == []


@pytest.mark.parametrize("atomic", [False, True])
async def test_contexts_a_load_touches_the_devices_of_its_targets_alone(root: Path, atomic: bool) -> None:
    fake = FakeAccelerator(3)
    target = fake.tensor(torch.zeros(100, 100), fake.all_devices[2])
    async with engine_on(fake, root) as engine:
        await saved(engine, {"w": W})
        await engine.load({"w": target}, atomic=atomic)
    assert torch.equal(on_host(target), W)
    assert fake.contexts == {fake.all_devices[2]}


# --- fresh tensors --------------------------------------------------------------------------------


async def test_device_read_makes_tensors_on_the_callers_device(root: Path) -> None:
    fake = FakeAccelerator(3)
    async with engine_on(fake, root) as engine:
        await saved(engine, {"w": W, "n": 1})
        with fake.on_device(2):
            read = await engine.read(device="cuda")
        assert fake.device_of(read["w"]) == fake.all_devices[2]
        assert fake.contexts == {fake.all_devices[2]}
        explicit = await engine.read(device="cuda:1")
        assert fake.device_of(explicit["w"]) == fake.all_devices[1]
    assert torch.equal(on_host(read["w"]), W)
    assert torch.equal(on_host(explicit["w"]), W)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="some of them could be read to")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "xpu", "nonsense"])
async def test_device_that_is_not_there_is_told_as_a_load_error(root: Path, device: str) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"w": W})
        with pytest.raises(LoadError, match=device):
            await engine.read(device=device)


async def test_lifetime_a_tensor_that_was_read_is_not_given_out_again_under_the_callers_kernels(
    root: Path,
) -> None:
    fake = FakeAccelerator()
    (device,) = fake.all_devices
    out = fake.tensor(torch.zeros(100, 100))
    async with engine_on(fake, root) as engine:
        await saved(engine, {"w": W})
        with fake.on_stream(fake.new_stream(device)):
            read = await engine.read(device="cuda")
            fake.current_stream(device).copy([out], [read["w"]])
            read.clear()  # freed while the caller's kernel is still queued
        again = await engine.read(device="cuda")
        again["w"].zero_()
        fake.finish()
    assert torch.equal(on_host(out), W)


async def test_meta_modules_are_made_on_the_default_device(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeAccelerator(2)
    model = torch.nn.Linear(5, 5)
    with torch.device("meta"):
        empty = torch.nn.Linear(5, 5)
    async with engine_on(fake, root) as engine:
        await saved(engine, {"m": model})
        monkeypatch.setattr(torch, "get_default_device", lambda: fake.all_devices[1])
        await engine.load({"m": empty})
    assert fake.device_of(empty.weight) == fake.all_devices[1]
    assert torch.equal(on_host(empty.weight), model.weight)


def optimized(fake: FakeAccelerator, dtype: torch.dtype) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    model = torch.nn.Linear(4, 3).to(dtype)
    for name, parameter in list(model.named_parameters()):
        setattr(model, name, torch.nn.Parameter(fake.tensor(parameter.detach())))
    return model, torch.optim.AdamW(model.parameters(), amsgrad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [True, False], ids=["app", "bare"])
async def test_device_entries_of_an_empty_optimizer_are_made_where_their_parameters_lie(
    root: Path, wrapped: bool, dtype: torch.dtype
) -> None:
    fake = FakeAccelerator()
    (device,) = fake.all_devices
    model, optimizer = optimized(fake, dtype)
    torch.autograd.backward([model.forward(torch.ones(2, 4, dtype=dtype)).sum()])
    optimizer.step()
    other, fresh = optimized(fake, dtype)
    async with engine_on(fake, root) as engine:
        await saved(engine, {"a": AppState(model, optimizer)} if wrapped else {"m": model, "o": optimizer})
        fake.fill(other.weight.detach(), 7.0)
        await engine.load({"a": AppState(other, fresh)} if wrapped else {"m": other, "o": fresh})
    fake.finish()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(on_host(mine), on_host(theirs))
        entry, was = fresh.state[theirs], optimizer.state[mine]
        assert entry.keys() == was.keys()
        for key, value in was.items():
            assert entry[key].dtype == value.dtype
            assert torch.equal(on_host(entry[key]), on_host(value)), key
            # as after step(): counts are in host memory, since none of it is fused or capturable
            assert fake.device_of(entry[key]) == (None if key == "step" else device), key
        assert entry["exp_avg"].stride() == was["exp_avg"].stride()


async def test_memory_a_full_device_takes_small_tensors_one_by_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeAccelerator()
    stream = fake.stream(fake.all_devices[0], "load")
    state = {f"w{index}": numbers(16, 16, seed=index) for index in range(20)}
    targets = {name: fake.tensor(torch.zeros(16, 16)) for name in state}

    def empty(shape: object, dtype: object, strides: object = None) -> torch.Tensor:
        raise torch.OutOfMemoryError("nothing is left")

    monkeypatch.setattr(stream, "empty", empty)
    async with engine_on(fake, root) as engine:
        await saved(engine, state)
        await engine.load(targets)
    for name, target in targets.items():
        assert torch.equal(on_host(target), state[name])


# --- slots ----------------------------------------------------------------------------------------


async def test_batches_many_small_tensors_take_one_transfer_for_each_part(root: Path) -> None:
    fake = FakeAccelerator()
    state = {f"w{index}": numbers(16, 16, seed=index) for index in range(200)}
    targets = {name: fake.tensor(torch.zeros(16, 16)) for name in state}
    async with engine_on(fake, root, part_bytes=8 * PART) as engine:
        await saved(engine, state)
        await engine.load(targets)
    copies = fake.stream(fake.all_devices[0], "load").copies
    assert copies == [1, 200]  # the whole run of the file, and out of it all at once
    for name, target in targets.items():
        assert torch.equal(on_host(target), state[name])


@pytest.mark.parametrize("seed", [None, 3])
async def test_slots_are_not_given_back_while_a_copy_may_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    fake = FakeAccelerator(seed=seed)
    state = {f"w{index}": numbers(150, 150, seed=index) for index in range(20)}
    targets = {name: fake.tensor(torch.zeros(150, 150)) for name in state}
    num_released = 0
    async with Stager(StagingOptions(part_bytes=PART, budget_bytes=2 * PART), backend=fake) as stager:
        async with CheckpointEngine(root, staging=stager) as engine:
            await saved(engine, state)
            # else each copy ends before its call returns
            stager.pool.reserve(fake, 2)
            lease = await stager.pool.lease(1)
            assert await asyncio.wrap_future(stager.pinner.want(lease.arena, fake.all_devices[0]))
            stager.pool.release(lease, 0)
            released = stager.pool.release

            def release(lease: Lease, index: int, *, lost: bool = False) -> None:
                nonlocal num_released
                num_released += 1
                start = lease.arena.tensor.data_ptr() + lease.offset
                assert not [memory for memory in fake.in_flight if start <= memory.address < start + PART]
                released(lease, index, lost=lost)

            monkeypatch.setattr(stager.pool, "release", release)
            await engine.load(targets)
        assert stager.pool.leased == 0
    assert num_released > 20
    for name, target in targets.items():
        assert torch.equal(on_host(target), state[name])


async def test_slots_serve_a_load_before_any_save_and_beside_one_under_a_small_budget(root: Path) -> None:
    fake = FakeAccelerator()
    state = {"w": numbers(400, 400, seed=1)}
    target = fake.tensor(torch.zeros(400, 400))
    async with CheckpointEngine(root) as engine:
        await saved(engine, state, step=1)
    async with engine_on(fake, root, budget_bytes=PART) as engine:
        await engine.load({"w": target})
        assert torch.equal(on_host(target), state["w"])
        response = await engine.save({"w": target}, step=2)
        await engine.load({"w": target}, 1)
        await response.upload_completion
        assert torch.equal((await engine.read(2))["w"], state["w"])


async def test_slots_that_a_load_used_are_filled_anew_by_the_next_save(root: Path) -> None:
    fake = FakeAccelerator()
    state = {"w": fake.tensor(numbers(400, 400, seed=1))}
    async with engine_on(fake, root) as engine:
        await saved(engine, state, step=1)
        await engine.load({"w": fake.tensor(torch.zeros(400, 400))})
        await saved(engine, state, step=2)
        assert torch.equal((await engine.read(2))["w"], on_host(state["w"]))


@pytest.mark.parametrize("queued", [0, 1])
async def test_failure_in_the_middle_of_a_batch_drains_the_stream_first(root: Path, queued: int) -> None:
    fake = FakeAccelerator()
    stream = fake.stream(fake.all_devices[0], "load")
    state = {f"w{index}": numbers(600, 600, seed=index) for index in range(2)}
    targets = {name: fake.tensor(torch.zeros(600, 600)) for name in state}
    async with engine_on(fake, root, part_bytes=64 * PART) as engine:
        await saved(engine, state)
        stream.fail_copy_after = queued
        with pytest.raises(LoadError, match="out of memory"):
            await engine.load(targets)
        assert not stream.queue
        await engine.load(targets)
    for name, target in targets.items():
        assert torch.equal(on_host(target), state[name])


async def test_failure_of_the_device_loses_the_slots_that_it_may_still_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeAccelerator()
    target = fake.tensor(torch.zeros(100, 100))
    is_lost: list[bool] = []
    # not pinned, for what is lost would stay so for as long as the process lives
    async with Stager(StagingOptions(part_bytes=PART, pinned=False), backend=fake) as stager:
        async with CheckpointEngine(root, staging=stager) as engine:
            await saved(engine, {"w": W})
            released = stager.pool.release

            def release(lease: Lease, index: int, *, lost: bool = False) -> None:
                is_lost.append(lost)
                released(lease, index, lost=lost)

            monkeypatch.setattr(stager.pool, "release", release)
            fake.stream(fake.all_devices[0], "load").broken = True
            with pytest.raises(LoadError, match="the device is lost"):
                await engine.load({"w": target})
        assert stager.pool.leased == 0
    assert is_lost == [True]
