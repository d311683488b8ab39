"""Pinned memory against a fake device: who registers what, when it is undone, what a refusal leaves."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dcp_async import CheckpointEngine, Stager, StagingOptions
from dcp_async.staging.memory.arena import Arena
from dcp_async.staging.memory.buffer_pool import BufferPool
from dcp_async.staging.memory.pinning import Pinner
from tests.support.accelerator import FakeAccelerator
from tests.support.doubles import PATIENCE

KIB = 1024
SLOT = 64 * KIB


class Observed(FakeAccelerator):
    """Notes the threads of pin and unpin; a test may hold up the first."""

    def __init__(self, num_devices: int = 1) -> None:
        super().__init__(num_devices)
        self.threads: set[str] = set()
        self.unpinned: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.has_begun = threading.Event()
        self.has_unpinned = threading.Event()
        self.before_pin: Callable[[int], None] = lambda address: None

    def pin(self, device: torch.device, address: int, nbytes: int) -> bool:
        self.threads.add(threading.current_thread().name)
        self.has_begun.set()
        assert self.gate.wait(PATIENCE)
        self.before_pin(address)
        return super().pin(device, address, nbytes)

    def unpin(self, device: torch.device, address: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.unpinned.append(address)
        super().unpin(device, address)
        self.has_unpinned.set()


def _pinned(pinner: Pinner, arena: Arena, fake: FakeAccelerator, index: int = 0) -> bool:
    return pinner.want(arena, fake.all_devices[index]).result(PATIENCE)


def test_arena_is_registered_in_chunks_of_whole_slots() -> None:
    fake = FakeAccelerator()
    pinner = Pinner(fake, chunk_bytes=5 * SLOT // 2)
    arena = Arena(5, SLOT)
    assert not arena.is_pinned(0, SLOT)
    assert _pinned(pinner, arena, fake)
    assert [(address - arena.tensor.data_ptr(), nbytes) for _, address, nbytes in fake.pin_calls] == [
        (0, 2 * SLOT),
        (2 * SLOT, 2 * SLOT),
        (4 * SLOT, SLOT),
    ]
    pinner.close()
    assert fake.pinned == {}
    assert not arena.is_pinned(0, SLOT)


def test_range_in_two_registrations_is_not_pinned() -> None:
    # CUDA refuses a copy that reaches over the end of a registration
    fake = FakeAccelerator()
    pinner = Pinner(fake, chunk_bytes=2 * SLOT)
    arena = Arena(4, SLOT)
    assert _pinned(pinner, arena, fake)
    assert arena.is_pinned(SLOT, 2 * SLOT)
    assert not arena.is_pinned(SLOT, 2 * SLOT + 1)
    pinner.close()


def test_run_of_slots_lies_in_one_registration() -> None:
    # else it would go through the bounce buffers, and all that is queued would be waited for
    fake = FakeAccelerator()
    pinner = Pinner(fake, chunk_bytes=4 * SLOT)
    arena = Arena(10, SLOT)
    arena.taken[0:2] = b"\1\1"
    assert arena.free_run(4) == (2, 4)
    assert _pinned(pinner, arena, fake)
    assert arena.free_run(4) == (4, 4)
    arena.taken[4:8] = b"\1\1\1\1"
    assert arena.free_run(4) == (2, 2)
    pinner.close()


def test_first_chunk_is_usable_while_the_second_is_registered() -> None:
    fake = Observed()
    pinner = Pinner(fake, chunk_bytes=SLOT)
    arena = Arena(2, SLOT)
    first, second = threading.Event(), threading.Event()

    def stop_at_the_second(address: int) -> None:
        if address != arena.tensor.data_ptr():
            first.set()
            assert second.wait(PATIENCE)

    fake.before_pin = stop_at_the_second
    done = pinner.want(arena, fake.all_devices[0])
    assert first.wait(PATIENCE)
    assert arena.is_pinned(0, SLOT)
    assert not arena.is_pinned(SLOT, 2 * SLOT)
    assert not done.done()
    second.set()
    done.result(PATIENCE)
    assert arena.is_pinned(SLOT, 2 * SLOT)
    pinner.close()


def test_one_thread_of_its_own_makes_all_calls() -> None:
    """B1, A5: no context on device 0, no last error in a thread that launches kernels."""
    fake = Observed(num_devices=3)
    pinner = Pinner(fake)
    arena = Arena(2, SLOT)
    assert _pinned(pinner, arena, fake, 2)
    pinner.close()
    assert fake.contexts == {fake.all_devices[2]}
    assert fake.threads == {"dcp_async-pin-0"}


async def test_context_is_made_on_the_device_of_the_state_alone(root: Path) -> None:
    """B1."""
    fake = FakeAccelerator(num_devices=4)
    own = fake.all_devices[3]
    with fake.on_device(3):
        state = {"w": fake.tensor(torch.ones(1000))}
        async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
            await (await engine.save(state)).upload_completion
    assert fake.contexts == {own}
    assert {device for device, *_ in fake.pin_calls} == {own}


@pytest.mark.parametrize("pinned", [None, True])
async def test_host_state_pins_nothing_and_starts_no_thread(root: Path, pinned: bool | None) -> None:
    """B2."""
    fake, before = FakeAccelerator(), set(threading.enumerate())
    async with (
        Stager(StagingOptions(pinned=pinned), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        await (await engine.save({"w": torch.ones(1000), "n": 3})).upload_completion
        started = set(threading.enumerate()) - before
    assert not [thread for thread in started if "dcp_async-pin" in thread.name]
    assert fake.pin_calls == []
    assert fake.contexts == set()


async def test_pool_is_pinned_once_for_all_saves(root: Path) -> None:
    """B3."""
    fake = FakeAccelerator()
    state = {"w": fake.tensor(torch.ones(1000))}
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        for step in range(5):
            await (await engine.save(state, step=step)).upload_completion
    assert len(fake.pin_calls) == 1
    assert fake.pinned == {}


async def test_pool_of_an_option_that_forbids_it_is_not_pinned(root: Path) -> None:
    fake = FakeAccelerator()
    async with (
        Stager(StagingOptions(pinned=False), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        await (await engine.save({"w": fake.tensor(torch.ones(1000))})).upload_completion
    assert fake.pin_calls == []


async def test_load_before_the_first_save_pins_what_it_reads_into(root: Path) -> None:
    fake = FakeAccelerator()
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"w": torch.arange(100_000.0)})).upload_completion
    target = fake.tensor(torch.zeros(100_000))
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await engine.load({"w": target})
        (arena,) = stager.pool.arenas
        await asyncio.wrap_future(stager.pinner.want(arena, fake.all_devices[0]))
        assert len(fake.pin_calls) == 1
    assert torch.equal(target, torch.arange(100_000.0))
    assert fake.pinned == {}


def test_refused_pin_is_remembered_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """B4."""
    fake = FakeAccelerator()
    fake.refuses_pins = True
    pinner = Pinner(fake)
    arenas = [Arena(2, SLOT), Arena(3, SLOT)]
    with caplog.at_level(logging.INFO, "dcp_async.staging.memory.pinning"):
        for arena in (*arenas, *arenas, *arenas):
            assert not _pinned(pinner, arena, fake)
    assert len(fake.pin_calls) == len(arenas)
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert "ulimit -l" in caplog.text
    pinner.close()


async def test_refused_pin_is_asked_once_in_all_saves(root: Path) -> None:
    """B4: each ask may lock and unlock all of the pool before it fails."""
    fake = FakeAccelerator()
    fake.refuses_pins = True
    state = {"w": fake.tensor(torch.ones(500_000))}
    async with (
        Stager(StagingOptions(part_bytes=SLOT), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        for _ in range(3):
            await (await engine.save(state)).upload_completion
        assert torch.equal((await engine.read())["w"], torch.ones(500_000))
    assert len(fake.pin_calls) == 1


def test_refusal_is_a_warning_for_who_has_asked_for_it(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeAccelerator()
    fake.refuses_pins = True
    stager = Stager(StagingOptions(pinned=True), backend=fake)
    with caplog.at_level(logging.INFO, "dcp_async.staging.memory.pinning"):
        assert not _pinned(stager.pinner, Arena(2, SLOT), fake)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    stager.pinner.close()


def test_chunks_before_a_refused_one_stay_pinned() -> None:
    fake = Observed()
    pinner = Pinner(fake, chunk_bytes=SLOT)
    arena = Arena(3, SLOT)

    def refuse_the_third(address: int) -> None:
        fake.refuses_pins = address == arena.tensor.data_ptr() + 2 * SLOT

    fake.before_pin = refuse_the_third
    assert not _pinned(pinner, arena, fake)
    assert arena.is_pinned(SLOT, 2 * SLOT)
    assert not arena.is_pinned(2 * SLOT, 3 * SLOT)
    pinner.close()
    assert fake.pinned == {}


def test_arena_that_is_dropped_is_unregistered_before_it_is_unmapped() -> None:
    """B6: a Stager that nobody closed."""
    fake = Observed()
    pinner = Pinner(fake)
    arena = Arena(2, SLOT)
    assert _pinned(pinner, arena, fake)
    address = arena.tensor.data_ptr()
    mapped: list[bool] = []
    real = fake.unpin

    def look(device: torch.device, address: int) -> None:
        mapped.append(_is_mapped(address))
        real(device, address)

    fake.unpin = look  # type: ignore[method-assign]  # looked at from outside
    del arena, pinner
    gc.collect()
    assert fake.has_unpinned.wait(PATIENCE)
    assert mapped == [True]
    assert fake.unpinned == [address]


def test_view_that_outlives_its_arena_keeps_the_memory_and_not_the_registration() -> None:
    """B6."""
    fake = Observed()
    pinner = Pinner(fake)
    arena = Arena(2, SLOT)
    view = arena.tensor[:10]
    assert _pinned(pinner, arena, fake)
    del arena
    assert fake.has_unpinned.wait(PATIENCE)
    view.fill_(7)  # mapped still
    assert _is_mapped(view.data_ptr())
    pinner.close()


def test_arena_of_a_reference_cycle_is_unregistered_by_the_collector() -> None:
    """B6: whichever thread collects, the pinning one makes the call."""
    fake = Observed()
    pinner = Pinner(fake)
    arena = Arena(2, SLOT)
    assert _pinned(pinner, arena, fake)
    cycle: list[object] = [arena]
    cycle.append(cycle)
    del arena, cycle
    assert not fake.unpinned
    gc.collect()
    assert fake.has_unpinned.wait(PATIENCE)
    assert fake.threads == {"dcp_async-pin-0"}
    pinner.close()


def test_arena_that_is_leased_at_the_end_is_unregistered_when_the_lease_goes() -> None:
    fake = Observed()
    pinner = Pinner(fake)
    arena = Arena(2, SLOT)
    arena.taken[0] = 1
    assert _pinned(pinner, arena, fake)
    pinner.close()
    assert fake.unpinned == []  # a copy may be running
    del arena
    assert fake.has_unpinned.wait(PATIENCE)


@pytest.mark.parametrize("when", ["before", "after"])
def test_slot_that_a_copy_may_never_leave_keeps_memory_and_registration(when: str) -> None:
    """A thread or a device that hangs may write into it as long as the process lives."""
    fake = Observed()
    pool = BufferPool(slot_bytes=SLOT, budget_bytes=None)
    pool.reserve(pool, 2)
    lease = asyncio.run(pool.lease(1))
    pinner = Pinner(fake)
    if when == "before":
        pool.release(lease, 0, lost=True)
    assert _pinned(pinner, lease.arena, fake)
    if when == "after":
        pool.release(lease, 0, lost=True)
    arena, address = weakref.ref(lease.arena), lease.arena.tensor.data_ptr()
    pool.close()
    del lease
    pinner.close()
    gc.collect()
    assert arena() is not None
    assert _is_mapped(address)
    assert fake.unpinned == []
    assert address in fake.pinned


async def test_stager_that_is_opened_again_pins_again(root: Path) -> None:
    fake = FakeAccelerator()
    state = {"w": fake.tensor(torch.ones(1000))}
    stager = Stager(backend=fake)
    for count in (1, 2):
        async with stager, CheckpointEngine(root, staging=stager) as engine:
            await engine.prepare(state)
            assert len(fake.pin_calls) == count
        assert fake.pinned == {}


@pytest.mark.parametrize("is_known", [True, False])
def test_close_does_not_wait_for_ever_for_a_registration_that_hangs(is_known: bool) -> None:
    fake = Observed()
    fake.gate.clear()
    pinner = Pinner(fake, patience=0.0)
    arena = Arena(2, SLOT)
    done = pinner.want(arena, fake.all_devices[0])
    assert fake.has_begun.wait(PATIENCE)
    if is_known:
        pinner.abandon()
    pinner.close()
    address, gone = arena.tensor.data_ptr(), weakref.ref(arena)
    del arena
    gc.collect()
    assert gone() is not None  # the call holds it
    fake.gate.set()  # it comes back after all, and nothing is left behind
    done.result(PATIENCE)
    assert fake.has_unpinned.wait(PATIENCE)
    assert fake.unpinned == [address]


_AT_EXIT = """
import sys, threading
import torch
from dcp_async.staging.memory.arena import Arena
from dcp_async.staging.memory.pinning import Pinner
from tests.support.accelerator import FakeAccelerator

class Fake(FakeAccelerator):
    def unpin(self, device, address):
        print("unpinned", flush=True)

fake = Fake()
pinner = Pinner(fake)
arena = Arena(4, 65536)
assert pinner.want(arena, fake.all_devices[0]).result(60)
kept = [arena, pinner]
kept.append(kept)
print("end", flush=True)
"""


def test_process_that_ends_with_pinned_memory_ends_in_silence() -> None:
    """The device goes with the process: no call to one that may hang, no copy of a daemon left without
    memory."""
    ended = subprocess.run(
        [sys.executable, "-c", _AT_EXIT], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")


def _is_mapped(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        ranges = [line.split(maxsplit=1)[0].split("-") for line in maps]
    return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)
