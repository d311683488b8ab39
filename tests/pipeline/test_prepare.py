"""``prepare``: what the first save finds done, what it leaves in the storage, how it ends."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, EngineStateError, Limits, SaveError, Stager, StagingOptions, sync
from dcp_async.planning import compile_plan
from dcp_async.staging.memory.arena import Arena
from dcp_async.staging.memory.bounce import BOUNCE_BYTES
from tests.support.accelerator import FakeAccelerator
from tests.support.doubles import (
    PATIENCE,
    FaultyStorage,
    TrainingRun,
    assert_same,
    committed,
    frozen,
    mapped_arena_bytes,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

SLOT = 64 * 1024


class Watch:
    """Counts what only a first save should have to do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans = 0
        self.arenas = 0
        real_arena = Arena.__init__

        def counted_plan(*args: Any, **kwargs: Any) -> Any:
            self.plans += 1
            return compile_plan(*args, **kwargs)

        def make_arena(arena: Arena, num_slots: int, slot_bytes: int) -> None:
            self.arenas += 1
            real_arena(arena, num_slots, slot_bytes)

        monkeypatch.setattr("dcp_async.save.plan_agreement.compile_plan", counted_plan)
        monkeypatch.setattr(Arena, "__init__", make_arena)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def _state(value: float = 1.0) -> dict[str, Any]:
    return {"w": torch.full((300, 700), value), "small": [torch.full((9,), value)] * 5, "step": int(value)}


@pytest.mark.parametrize("overlap", [False, True])
async def test_first_save_finds_plan_and_memory(root: Path, watch: Watch, overlap: bool) -> None:
    staging = StagingOptions(part_bytes=SLOT, overlap=overlap, budget_bytes=None)
    async with CheckpointEngine(root, staging=staging) as engine:
        await engine.prepare(_state())
        assert (watch.plans, watch.arenas) == (1, 1)
        response = await engine.save(_state(2.0), step=3)
        await response.upload_completion
        assert (watch.plans, watch.arenas) == (1, 1)
        # what was staged ahead of time is not what is saved
        assert_same(await engine.read(3), frozen(_state(2.0)))


async def test_nothing_is_written_and_no_step_is_used_up(faulty: FaultyStorage, root: Path) -> None:
    async with CheckpointEngine(faulty) as engine:
        before = faulty.calls
        await engine.prepare(_state())
        assert faulty.calls == before
        assert engine.pending == ()
        assert committed(root) == []
        response = await engine.save(_state())
        assert response.step == 0
        await response.upload_completion


async def test_training_state_is_as_it_was(root: Path, training: Any) -> None:
    run: TrainingRun = training(1)
    run.step(2)
    before = frozen(run.state)
    async with CheckpointEngine(root) as engine:
        await engine.prepare(run.state)
        assert_same(frozen(run.state), before)
        await (await engine.save(run.state, step=1)).upload_completion
        run.step(1)
        await engine.prepare(run.state)  # at any time
        assert_same((await engine.read())["model"], before["model"])


async def test_memory_of_all_pending_saves_is_there(root: Path) -> None:
    before = mapped_arena_bytes()
    async with CheckpointEngine(
        root, staging=StagingOptions(part_bytes=SLOT), limits=Limits(pending_saves=3)
    ) as engine:
        await engine.prepare(_state())
        slots = -(-300 * 700 * 4 // SLOT)
        assert mapped_arena_bytes() - before >= 3 * slots * SLOT


@pytest.mark.parametrize("overlap", [False, True])
async def test_small_budget_is_kept(root: Path, overlap: bool) -> None:
    budget = 2 * SLOT + (8 << 20 if overlap else 0)
    staging = StagingOptions(part_bytes=SLOT, budget_bytes=budget, overlap=overlap)
    before = mapped_arena_bytes()
    async with CheckpointEngine(root, staging=staging) as engine:
        await engine.prepare(_state())
        assert mapped_arena_bytes() - before == 2 * SLOT
        await (await engine.save(_state(4.0))).upload_completion
        assert_same(await engine.read(), frozen(_state(4.0)))


async def test_goes_on_beside_a_save_in_flight(faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, staging=StagingOptions(part_bytes=SLOT)) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(_state(1.0), step=1)
            await gate.until_arrived()
            preparing = asyncio.create_task(engine.prepare(_state() | {"more": torch.ones(100_000)}))
        await response.upload_completion
        await asyncio.wait_for(preparing, PATIENCE)
        await (await engine.save(_state(2.0) | {"more": torch.ones(100_000)}, step=2)).upload_completion
        assert_same(await engine.read(1), frozen(_state(1.0)))


class Broken:
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no state today")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing is loaded")


async def test_state_that_cannot_be_captured_is_a_save_error_and_the_next_one_works(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=r"prepare\(\) failed while capturing.*no state today") as caught:
            await engine.prepare({"b": Broken()})
        assert caught.value.phase == "capture"
        assert caught.value.checkpoint_id == "prepare()"
        await engine.prepare(_state())
        await (await engine.save(_state())).upload_completion


async def test_memory_that_is_not_there_is_a_save_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nbytes: int) -> Any:
        raise MemoryError("not that much")

    async with CheckpointEngine(root) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Arena, "_map", staticmethod(refuse))
            with pytest.raises(SaveError, match=r"cannot reserve .* bytes of memory"):
                await engine.prepare(_state())
        await (await engine.save(_state())).upload_completion


async def test_cancelled_it_leaves_slots_and_engine_free(faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, staging=StagingOptions(part_bytes=SLOT)) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(_state(1.0), step=1)
            await gate.until_arrived()  # all slots are out: it has to wait
            preparing = asyncio.create_task(engine.prepare(_state()))
            await asyncio.sleep(0)
            preparing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await preparing
        await response.upload_completion
        await (await engine.save(_state(2.0), step=2)).upload_completion
        assert_same(await engine.read(2), frozen(_state(2.0)))


async def test_engine_that_is_closed_refuses(root: Path) -> None:
    engine = CheckpointEngine(root)
    with pytest.raises(EngineStateError):
        await engine.prepare(_state())
    async with engine:
        pass
    with pytest.raises(EngineStateError):
        await engine.prepare(_state())


def test_blocking_twin_prepares(root: Path, watch: Watch) -> None:
    with sync.CheckpointEngine(root) as engine:
        engine.prepare(_state())
        engine.save(_state(5.0)).upload_completion.result(PATIENCE)
        assert (watch.plans, watch.arenas) == (1, 1)
        assert_same(engine.read(), frozen(_state(5.0)))


def _bounced(fake: FakeAccelerator) -> bool:
    """Whether anything went through the buffers for memory that is not pinned."""
    return BOUNCE_BYTES in [nbytes for _, nbytes in fake.pinned.values()]


@pytest.mark.parametrize("overlap", [False, True])
async def test_device_state_is_pinned_before_the_first_save(root: Path, overlap: bool) -> None:
    fake = FakeAccelerator()
    weights, small = fake.tensor(torch.ones(200_000)), fake.tensor(torch.ones(100))
    state = {"w": weights, "small": small}
    staging = StagingOptions(part_bytes=SLOT, overlap=overlap)
    async with Stager(staging, backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await engine.prepare(state)
        (arena,) = stager.pool.arenas
        assert arena.is_pinned(0, arena.nbytes)
        assert not _bounced(fake)
        fake.fill(weights, 2.0)
        await (await engine.save(state)).upload_completion
        assert len(fake.pin_calls) == 1
        assert not _bounced(fake)
        saved = await engine.read()
    assert torch.equal(saved["w"], torch.full((200_000,), 2.0))
    assert torch.equal(saved["small"], torch.ones(100))


async def test_refused_pin_is_no_error(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeAccelerator()
    fake.refuses_pins = True
    state = {"w": fake.tensor(torch.ones(200_000))}
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        with caplog.at_level(logging.INFO, "dcp_async.staging"):
            await engine.prepare(state)
            await (await engine.save(state)).upload_completion
        assert torch.equal((await engine.read())["w"], torch.ones(200_000))
    assert len(fake.pin_calls) == 1
    assert caplog.text.count("ulimit -l") == 1


async def test_host_state_makes_no_context(root: Path) -> None:
    fake, before = FakeAccelerator(), set(threading.enumerate())
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await engine.prepare(_state())
        started = set(threading.enumerate()) - before
    assert fake.contexts == set()
    assert fake.pin_calls == []
    assert not [thread for thread in started if "dcp_async-pin" in thread.name]
