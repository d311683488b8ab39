"""How the pool's memory grows, becomes one arena again, and goes."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch

from dcp_async import CheckpointEngine, Stager, StagingOptions
from dcp_async.errors import StorageError
from dcp_async.staging.memory.arena import Arena
from dcp_async.staging.memory.buffer_pool import BufferPool, Lease
from dcp_async.sync import CheckpointEngine as SyncEngine
from tests.support.accelerator import FakeAccelerator
from tests.support.doubles import PATIENCE
from tests.support.processes import run_in_process

SLOT = 64 * 1024


def _pool(*reserved: int, budget_slots: int | None = None) -> BufferPool:
    pool = BufferPool(slot_bytes=SLOT, budget_bytes=None if budget_slots is None else budget_slots * SLOT)
    for number, num_slots in enumerate(reserved):
        pool.reserve(number, num_slots)
    return pool


def _release(pool: BufferPool, *leases: Lease) -> None:
    for lease in leases:
        pool.release_all(lease)


async def test_pool_that_grew_while_slots_were_out_is_one_arena_at_the_next_idle_time() -> None:
    """B3: with two arenas each would be pinned anew for each batch, and runs end where one does."""
    pool = _pool(4)
    first = await pool.lease(4)
    pool.reserve(0, 10)
    second = await pool.lease(6)
    assert second.arena is not first.arena
    _release(pool, first, second)
    whole = await pool.lease(10)
    assert whole.count == 10
    assert pool.num_slots == 10
    _release(pool, whole)
    again = await pool.lease(10)
    assert again.count == 10  # and stays one
    _release(pool, again)


async def test_arena_that_is_large_enough_outlives_a_smaller_one_beside_it() -> None:
    """What a load or another engine wanted for a while costs no new mapping, and no new pin, of all the
    rest."""
    pool = _pool(10)
    whole = await pool.lease(10)
    arena = whole.arena
    pool.reserve("a load", 4)
    beside = await pool.lease(4)
    small = weakref.ref(beside.arena)
    pool.forget("a load")
    _release(pool, whole, beside)
    again = await pool.lease(10)
    assert (again.arena, again.count) == (arena, 10)
    assert small() is None
    assert pool.arenas == (arena,)
    _release(pool, again)


async def test_old_memory_is_gone_before_the_new_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """B5."""
    alive: weakref.WeakSet[Arena] = weakref.WeakSet()
    at_birth: list[int] = []
    real = Arena.__init__

    def noted(self: Arena, num_slots: int, slot_bytes: int) -> None:
        at_birth.append(len(alive))
        real(self, num_slots, slot_bytes)
        alive.add(self)

    monkeypatch.setattr(Arena, "__init__", noted)
    pool = _pool(4)
    kept: list[Lease] = []
    for num_slots in (4, 7, 9, 12):
        pool.reserve(0, num_slots)
        lease = await pool.lease(num_slots)
        _release(pool, lease)
        kept.append(lease)  # as a save that commits does
        del lease
    assert at_birth == [0, 0, 0, 0]
    assert len(alive) == 1


async def test_memory_that_left_the_pool_is_kept_by_no_view(tmp_path: Path) -> None:
    """B5: the views of the last plans kept the arenas that they lay in."""
    alive: list[weakref.ref[Arena]] = []
    async with Stager(StagingOptions(part_bytes=SLOT)) as stager:
        async with CheckpointEngine(tmp_path / "root", staging=stager) as engine:
            for step, numel in enumerate((100_000, 200_000, 300_000, 400_000)):
                await (await engine.save({"w": torch.ones(numel)}, step=step)).upload_completion
                lease = await stager.pool.lease(1)
                alive.append(weakref.ref(lease.arena))
                stager.pool.release_all(lease)
        gc.collect()
        assert [reference() is not None for reference in alive] == [False, False, False, True]


async def test_growth_in_flight_pins_each_arena_once(tmp_path: Path) -> None:
    """B3: a state that grew while a save was in flight, as after the optimizer's first step."""
    fake = FakeAccelerator()
    small = {"w": fake.tensor(torch.ones(40_000))}
    large = {"w": small["w"], "m": fake.tensor(torch.ones(200_000))}
    async with Stager(StagingOptions(part_bytes=SLOT), backend=fake) as stager:
        async with CheckpointEngine(tmp_path / "root", staging=stager) as engine:
            await (await engine.save(small)).upload_completion
            in_flight = await stager.pool.lease(1)
            await (await engine.save(large)).upload_completion
            stager.pool.release_all(in_flight)
            for _ in range(5):
                await (await engine.save(large)).upload_completion
        # the first, the one beside it, and the one that took the place of both
        assert len(fake.pin_calls) == 3
    assert fake.pinned == {}


async def test_engines_that_share_a_stager_end_with_one_arena(tmp_path: Path) -> None:
    async with (
        Stager(StagingOptions(part_bytes=SLOT)) as stager,
        CheckpointEngine(tmp_path / "one", staging=stager) as one,
        CheckpointEngine(tmp_path / "other", staging=stager) as other,
    ):
        for step in range(3):
            first = await one.save({"w": torch.ones(100_000)}, step=step)
            second = await other.save({"w": torch.ones(200_000)}, step=step)
            await first.upload_completion
            await second.upload_completion
        wanted = stager.pool.num_slots
        lease = await stager.pool.lease(wanted)
        assert lease.count == wanted
        stager.pool.release_all(lease)
        assert (await one.read())["w"].numel() == 100_000
        assert (await other.read())["w"].numel() == 200_000


async def test_lost_slots_stay_lost_and_are_not_replaced() -> None:
    pool = _pool(4, budget_slots=8)
    lease = await pool.lease(2)
    pool.release(lease, 0, lost=True)
    pool.release(lease, 1)
    pool.reserve(0, 8)
    rest = [await pool.lease(8)]
    rest.append(await pool.lease(8))
    # four slots beside the arena that keeps the lost one: never more than the budget
    assert sorted(part.count for part in rest) == [3, 4]
    assert pool.full
    assert pool.num_slots == 8
    _release(pool, *rest)
    assert {part.arena for part in [await pool.lease(4)]} != {lease.arena}


async def test_pool_of_lost_slots_alone_says_so() -> None:
    pool = _pool(2)
    lease = await pool.lease(2)
    pool.release(lease, 0, lost=True)
    pool.release(lease, 1, lost=True)
    with pytest.raises(StorageError, match="no staging buffer is left"):
        await pool.lease(1)


async def test_thread_that_hangs_keeps_the_arena_of_its_lease() -> None:
    pool = _pool(2)
    lease = await pool.lease(2)
    pool.release(lease, 0, lost=True)
    pool.release(lease, 1)
    assert bytes(lease.memory(0, 1)) == b"\0"  # it comes back, and looks at what it leased


def _mapped() -> tuple[int, int]:
    """The size of the pool's mappings, which have a name, and their memory, in MiB."""
    size = resident = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith("/dev/zero")
        elif inside and line.startswith("Size:"):
            size += int(line.split()[1])
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1])
    return size >> 10, resident >> 10


def _save_growing_states(root: Path) -> list[tuple[int, int, int]]:
    rows = []
    with SyncEngine(root, staging=StagingOptions(part_bytes=1 << 20)) as engine:
        for step, mib in enumerate((20, 36, 52, 68)):
            engine.save({"w": torch.zeros(mib << 18)}, step=step).upload_completion.result(PATIENCE)
            rows.append((mib, *_mapped()))
    return rows


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_growing_state_holds_its_own_size_and_not_the_sum_of_all_it_had(tmp_path: Path) -> None:
    """B5, in a process of its own: 160 -> 288 -> 416 -> 544 MiB held 1,408 MiB; here at an eighth of that."""
    rows = run_in_process(_save_growing_states, tmp_path)
    assert [row[0] for row in rows] == [20, 36, 52, 68]
    for mib, size, resident in rows:
        assert size <= mib + 2
        assert resident <= size
