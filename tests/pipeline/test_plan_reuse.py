"""The cached plan is used only for the structure it was made for: every change between saves is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, Limits, PlanningOptions
from tests.support.doubles import (
    MIB,
    PATIENCE,
    FaultyStorage,
    TrainingRun,
    assert_same,
    frozen,
    random_tensor,
)
from tests.support.saves import PART, SMALL

W = random_tensor(torch.float32, (40, 30), 1)
B = random_tensor(torch.float32, (30,), 2)
TIED = random_tensor(torch.int16, (64,), 3)

CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "new_key": ({"m": {"w": W}}, {"m": {"w": W, "b": B}}),
    "new_empty_mapping": ({"m": {"w": W}}, {"m": {"w": W, "e": {}}}),
    "renamed_key": ({"m": {"w": W}}, {"m": {"v": W}}),
    "swapped_values": ({"a": W, "b": W + 1}, {"a": W + 1, "b": W}),
    "order_of_keys": ({"a": W, "b": B}, {"b": B, "a": W}),
    "dtype_of_same_size": ({"w": W}, {"w": W.view(torch.int32)}),
    "dtype_of_half_size": ({"w": W}, {"w": W.bfloat16()}),
    "shape_of_same_size": ({"w": W}, {"w": W.reshape(30, 40)}),
    "shape_grows": ({"w": W, "b": B}, {"w": random_tensor(torch.float32, (400, 300), 4), "b": B}),
    "shape_shrinks": ({"w": W, "b": B}, {"w": W[:2], "b": B}),
    "stride": (
        {"w": random_tensor(torch.float32, (30, 30), 5)},
        {"w": random_tensor(torch.float32, (30, 30), 6).t()},
    ),
    "offset": ({"w": W[:10]}, {"w": W[20:30]}),
    "other_storage": ({"w": W, "b": B}, {"w": W.clone() + 1, "b": B.clone() - 1}),
    "expanded": ({"w": torch.zeros(4, 4)}, {"w": torch.tensor(1.0).expand(4, 4)}),
    "leaf_becomes_tensor": ({"x": 1, "w": W}, {"x": B, "w": W}),
    "leaf_value": ({"x": 1, "w": W}, {"x": 2, "w": W}),
    "leaf_type": ({"x": 1, "w": W}, {"x": True, "w": W}),
    "leaf_outgrows_its_slot": ({"x": "", "w": W, "y": 1}, {"x": "x" * 9000, "w": W, "y": 2}),
    "leaf_grows_much": ({"x": b"", "w": W, "y": 1}, {"x": bytes(300_000), "w": W, "y": 2}),
    "leaf_grows_by_one_byte_at_a_time": (
        {f"x{n}": "x" * n for n in range(3000, 4200, 7)},
        {f"x{n}": "x" * (n + 1) for n in range(3000, 4200, 7)},
    ),
    "list_grows": ({"l": [W, 1]}, {"l": [W, 1, B]}),
    "list_becomes_tuple": ({"l": [1, 2]}, {"l": (1, 2)}),
    "kind_of_empty": ({"e": {"a": []}}, {"e": {"a": {}}}),
    "int_key_becomes_str": ({"d": {1: W}}, {"d": {"1": W}}),
    "tie_opens": ({"a": TIED, "b": TIED}, {"a": TIED, "b": TIED.clone() + 1}),
    "list_of_leaves_becomes_list_of_tensors": ({"l": [1, 2]}, {"l": [W, B]}),
    "dict_becomes_leaf": ({"d": {"a": W}}, {"d": 5}),
    "requires_grad": ({"w": W.clone()}, {"w": torch.nn.Parameter(W.clone())}),
    "conjugate": ({"c": torch.ones(4, dtype=torch.complex64) * 1j}, {"c": (torch.ones(4) * 1j).conj()}),
    "sparse": ({"s": torch.eye(4)}, {"s": torch.eye(4).to_sparse()}),
    "more_elements_of_nothing": ({"z": torch.zeros(0, 3)}, {"z": torch.zeros(3, 0)}),
    "everything_goes": ({"a": W, "b": {"c": 1}}, {"only": 1}),
}


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("change", CHANGES)
async def test_each_save_holds_what_it_was_given(root: Path, change: str, cache: bool) -> None:
    before, after = CHANGES[change]
    order = [before, after, after, before]
    async with CheckpointEngine(root, staging=SMALL, planning=PlanningOptions(cache=cache)) as engine:
        for step, state in enumerate(order):
            await (await engine.save(state, step=step)).upload_completion
        for step, state in enumerate(order):
            assert_same(await engine.read(step), {key: frozen(value) for key, value in state.items()})


def resized(model: torch.nn.Linear) -> None:
    model.weight.data = torch.randn(33, 20)


def rewritten(model: torch.nn.Linear) -> None:
    model.weight.data.mul_(2.0)


def halved(model: torch.nn.Linear) -> None:
    model.bfloat16()


def replaced(model: torch.nn.Linear) -> None:
    model.weight = torch.nn.Parameter(torch.randn(30, 20))


def moved(model: torch.nn.Linear) -> None:
    model.weight.data = model.weight.data.t().contiguous().t() + 1


def re_stored(model: torch.nn.Linear) -> None:
    with torch.no_grad():
        model.weight.set_(torch.randn(30, 20).untyped_storage(), 0, (30, 20), (20, 1))


@pytest.mark.parametrize("change", [resized, rewritten, halved, replaced, moved, re_stored])
async def test_a_changed_module_is_saved_as_it_is_now(
    root: Path, change: Callable[[torch.nn.Linear], None]
) -> None:
    model = torch.nn.Linear(20, 30)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await (await engine.save({"model": model})).upload_completion
        change(model)
        await (await engine.save({"model": model})).upload_completion
        assert_same((await engine.read())["model"], frozen(model))


async def test_freed_tensors_are_not_read_again(root: Path) -> None:
    async with CheckpointEngine(root, staging=SMALL) as engine:
        for step in range(6):
            state = {f"w{i}": random_tensor(torch.uint8, (PART + i,), 10 * step + i) for i in range(4)}
            await (await engine.save(state, step=step)).upload_completion
            expected = frozen(state)
            del state
            assert_same(await engine.read(step), expected)


async def test_the_engine_keeps_no_tensor_of_the_caller_alive(root: Path) -> None:
    import gc
    import weakref

    async with CheckpointEngine(root, staging=SMALL) as engine:
        tensor = torch.randn(100)
        watch = weakref.ref(tensor)
        await (await engine.save({"w": tensor})).upload_completion
        await engine.wait()
        del tensor
        gc.collect()
        assert watch() is None


async def test_saves_in_flight_of_one_plan_do_not_mix(root: Path, faulty: FaultyStorage) -> None:
    run = TrainingRun(1)
    run.step()
    async with CheckpointEngine(faulty, limits=Limits(pending_saves=3)) as engine:
        pictures = {}
        with faulty.hold("put") as gate:
            for step in range(3):
                pictures[step] = run.picture()
                await engine.save(run.state, step=step)
                run.step()
            await gate.until_arrived()
            assert len(engine.pending) == 3
        await engine.wait()
        for step, picture in pictures.items():
            assert_same(await engine.read(step), picture)


async def test_a_larger_state_is_staged_beside_a_smaller_one_in_flight(
    root: Path, faulty: FaultyStorage
) -> None:
    small, large = {"w": W}, {"w": random_tensor(torch.uint8, (40 * MIB,), 4)}
    async with CheckpointEngine(faulty, limits=Limits(pending_saves=2)) as engine:
        with faulty.hold("put") as gate:
            await engine.save(small, step=1)
            await gate.until_arrived()
            response = await asyncio.wait_for(engine.save(large, step=2), PATIENCE)
            assert response.staging_completion.done()
        await engine.wait()
        assert_same(await engine.read(2), large)


async def test_states_that_alternate_do_not_mix(root: Path) -> None:
    first, second = TrainingRun(1, width=16), TrainingRun(2, width=48)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        for step in range(6):
            run = (first, second)[step % 2]
            picture = run.picture()
            await (await engine.save(run.state, step=step)).upload_completion
            run.step()
            assert_same(await engine.read(step), picture)


async def test_two_engines_do_not_share_plans(tmp_path: Path) -> None:
    async with CheckpointEngine(tmp_path / "a") as one, CheckpointEngine(tmp_path / "b") as two:
        await (await one.save({"w": W, "n": 1})).upload_completion
        await (await two.save({"w": W.bfloat16(), "n": "x"})).upload_completion
        await (await one.save({"w": W, "n": 2})).upload_completion
        assert_same(await one.read(), {"w": W, "n": 2})
        assert_same(await two.read(), {"w": W.bfloat16(), "n": "x"})


async def test_an_optimizer_that_gets_its_state_later_is_saved_whole(root: Path) -> None:
    run = TrainingRun(3)
    async with CheckpointEngine(root) as engine:
        await (await engine.save(run.state, step=0)).upload_completion
        run.step()
        await (await engine.save(run.state, step=1)).upload_completion
        assert_same((await engine.read(0))["optim"]["state"], {})
        assert_same(await engine.read(1), run.picture())
