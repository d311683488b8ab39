"""`overlap=True`: save() returns after capture, and three nets keep the checkpoint what it was then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_async import CheckpointEngine, SaveCancelled, SaveError, StagingOptions, StateMutatedError
from tests.support.doubles import (
    ASIDE_BYTES,
    KIB,
    MIB,
    PATIENCE,
    FaultyStorage,
    TrainingRun,
    assert_holds_only,
    assert_same,
    faulty_storage,
    frozen,
    on_thread,
    random_tensor,
)
from tests.support.saves import HELD, PART, step_while_staging

pytestmark = pytest.mark.usefixtures("both_loops")

WIDTH = 600  # the net's weights are 1.4 MB each: more than the budget, so that staging waits for the gate


def adamw(**options: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda params, lr: torch.optim.AdamW(params, lr=lr, **options)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "for_loop": adamw(foreach=False),
    "foreach": adamw(foreach=True),
    "fused": adamw(fused=True),
    "adam_amsgrad": lambda params, lr: torch.optim.Adam(params, lr=lr, amsgrad=True),
    "sgd_momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
async def test_a_step_right_after_save_is_not_in_the_checkpoint(
    root: Path, faulty: FaultyStorage, kind: str
) -> None:
    run = TrainingRun(1, width=WIDTH, make_optim=OPTIMIZERS[kind])
    run.step(2)
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        before = run.picture()
        await step_while_staging(engine, faulty, run.state, run.optim)
        assert_same(await engine.read(), before)
    with pytest.raises(AssertionError):
        assert_same(run.picture()["model"], before["model"])


async def test_training_needs_no_await_at_all(root: Path) -> None:
    run = TrainingRun(1, width=128)
    pictures = []
    async with CheckpointEngine(root, staging=StagingOptions(overlap=True)) as engine:
        for step in range(6):
            pictures.append(run.picture())
            await engine.save(run.state, step=step)
            run.step()
        await engine.wait()
        for step, picture in enumerate(pictures):
            assert_same(await engine.read(step), picture)


async def test_an_optimizer_in_a_nested_container_is_guarded(root: Path, faulty: FaultyStorage) -> None:
    run = TrainingRun(1, width=WIDTH)
    run.step()
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        before = run.picture()
        with faulty.hold("put") as gate:
            run.optim.register_step_pre_hook(lambda *_: gate.release())
            response = await engine.save({"all": {"model": run.model, "optims": [run.optim]}})
            run.optim.step()
        await response.upload_completion
        assert_same((await engine.read())["all"]["model"], before["model"])


async def test_a_step_waits_for_staging_also_on_another_thread(root: Path, faulty: FaultyStorage) -> None:
    run = TrainingRun(1, width=WIDTH)
    run.step()
    before = run.picture()

    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put") as gate:
            run.optim.register_step_pre_hook(lambda *_: gate.release())
            response = await engine.save(run.state)
            await on_thread(run.optim.step)
        await response.upload_completion
        assert_same(await engine.read(), before)


async def test_a_failed_save_releases_the_step_and_does_not_raise_there(
    root: Path, faulty: FaultyStorage
) -> None:
    run = TrainingRun(1, width=WIDTH)
    run.step()
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put", times=1) as gate:
            faulty.fail("put", OSError("broken"), nth=1)
            run.optim.register_step_pre_hook(lambda *_: gate.release())
            response = await engine.save(run.state)
            run.optim.step()
        with pytest.raises(SaveError):
            await response.upload_completion
        with pytest.raises(SaveError):
            await response.staging_completion
        faulty.heal()
        await (await engine.save(run.state)).upload_completion


async def test_a_cancelled_save_releases_the_step(root: Path, faulty: FaultyStorage) -> None:
    run = TrainingRun(1, width=WIDTH)
    run.step()
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put"):
            response = await engine.save(run.state)
            response.cancel()
            run.optim.step()
            with pytest.raises(SaveCancelled):
                await response.upload_completion


async def test_the_hook_is_registered_once_and_gone_after_close(root: Path) -> None:
    run = TrainingRun(1)
    run.step()
    hooks = run.optim._optimizer_step_pre_hooks
    async with CheckpointEngine(root, staging=StagingOptions(overlap=True)) as engine:
        for _ in range(3):
            await (await engine.save(run.state)).upload_completion
        assert len(hooks) == 1
    assert len(hooks) == 0
    run.step()


async def test_the_hook_is_gone_after_abort(root: Path) -> None:
    run = TrainingRun(1)
    run.step()
    engine = await CheckpointEngine(root, staging=StagingOptions(overlap=True)).open()
    await (await engine.save(run.state)).upload_completion
    await engine.abort()
    assert len(run.optim._optimizer_step_pre_hooks) == 0


async def test_the_hook_keeps_no_optimizer_alive(root: Path) -> None:
    import gc
    import weakref

    run = TrainingRun(1)
    run.step()
    async with CheckpointEngine(root, staging=StagingOptions(overlap=True)) as engine:
        await (await engine.save(run.state)).upload_completion
        watch = weakref.ref(run.optim)
        del run
        gc.collect()
        assert watch() is None


async def test_batch_norms_forward_during_staging_changes_nothing(root: Path, faulty: FaultyStorage) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    model.train()
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        before = frozen(model)
        with faulty.hold("put") as gate:
            response = await engine.save({"model": model})
            await gate.until_arrived()
            with torch.no_grad():
                model(torch.randn(8, WIDTH))
            assert not response.staging_completion.done()
        await response.upload_completion
        assert_same((await engine.read())["model"], before)
    with pytest.raises(AssertionError):
        assert_same(frozen(model), before)


async def test_a_small_tensor_may_be_changed_at_once(root: Path, faulty: FaultyStorage) -> None:
    state = {"small": torch.zeros(64 * KIB // 4), "scalar": torch.tensor(1.0), "large": torch.zeros(MIB)}
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put"):
            response = await engine.save(state)
            state["small"].add_(1)
            state["scalar"].add_(1)
            assert not response.staging_completion.done()
        await response.upload_completion
        result = await engine.read()
    assert_same([result["small"], result["scalar"]], [torch.zeros(64 * KIB // 4), torch.tensor(1.0)])


async def test_a_mutated_tensor_fails_the_save_and_nothing_is_committed(
    root: Path, faulty: FaultyStorage
) -> None:
    tensor = torch.zeros(MIB // 4)
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save({"x": tensor}, step=5)
            await gate.until_arrived()
            assert not response.staging_completion.done()
            tensor.add_(1)
        with pytest.raises(StateMutatedError, match=r"\bx\b") as caught:
            await response.upload_completion
        with pytest.raises(StateMutatedError):
            await response.staging_completion
        assert (caught.value.checkpoint_id, caught.value.step) == ("step-00000005", 5)
        assert await engine.latest() is None
        await (await engine.save({"x": tensor}, step=6)).upload_completion
        assert_same(await engine.read(), {"x": torch.ones(MIB // 4)})
    assert_holds_only(root, ["step-00000006"])


async def test_a_mutation_of_one_tensor_among_many_is_named(root: Path, faulty: FaultyStorage) -> None:
    state = {"model": {f"w{i}": torch.zeros(MIB // 4) for i in range(4)}}
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(state)
            await gate.until_arrived()
            state["model"]["w3"][7] = 1.0
        with pytest.raises(StateMutatedError, match=r"model\.w3"):
            await response.upload_completion
        await engine.wait()
        assert await engine.latest() is None


async def test_a_mutation_after_staging_is_welcome(root: Path, faulty: FaultyStorage) -> None:
    tensor = torch.zeros(MIB // 4)
    async with CheckpointEngine(faulty, staging=StagingOptions(overlap=True)) as engine:
        with faulty.hold("seal"):
            response = await engine.save({"x": tensor})
            await response.staging_completion
            tensor.add_(1)
        await response.upload_completion
        assert_same(await engine.read(), {"x": torch.zeros(MIB // 4)})


async def test_a_mutation_through_a_view_is_seen(root: Path, faulty: FaultyStorage) -> None:
    base = torch.zeros(4, MIB // 4)
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save({"x": base[1:3]})
            await gate.until_arrived()
            base[2].add_(1)
        with pytest.raises(StateMutatedError):
            await response.upload_completion


async def test_a_load_into_tensors_that_are_being_staged_does_not_tear_the_checkpoint(
    root: Path, faulty: FaultyStorage
) -> None:
    """A trainer rolls back while its last save is still staging: bytes that are read in move no counter."""
    state = {f"w{i}": torch.zeros(MIB // 4) for i in range(6)}
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        await (await engine.save(state, step=0)).upload_completion
        for tensor in state.values():
            tensor.fill_(7)
        with faulty.hold("put") as gate:
            response = await engine.save(state, step=1)
            await gate.until_arrived()
            load = asyncio.ensure_future(engine.load(state, 0))
            for _ in range(2):  # as long as the load takes, unless it waits for staging, which it may
                await engine.read(0)
        await load
        try:
            await response.upload_completion
        except StateMutatedError:
            pass
        else:
            assert_same(await engine.read(1), {name: torch.full((MIB // 4,), 7.0) for name in state})
    assert_same(state, {name: torch.zeros(MIB // 4) for name in state})


async def test_a_step_waits_for_the_staging_of_two_engines(tmp_path: Path) -> None:
    run = TrainingRun(1, width=WIDTH)
    run.step()
    async with (
        faulty_storage(tmp_path / "a") as first,
        faulty_storage(tmp_path / "b") as second,
        CheckpointEngine(first, staging=HELD) as one,
        CheckpointEngine(second, staging=HELD) as two,
    ):
        before = run.picture()
        with first.hold("put") as gate, second.hold("put") as other_gate:

            def go_on(*_: object) -> None:
                gate.release()
                other_gate.release()

            run.optim.register_step_pre_hook(go_on)
            responses = [await one.save(run.state), await two.save(run.state)]
            run.optim.step()
        for response in responses:
            await response.upload_completion
        assert_same(await one.read(), before)
        assert_same(await two.read(), before)


async def test_exotic_tensors_are_what_they_were_or_the_save_fails(root: Path, faulty: FaultyStorage) -> None:
    base = torch.randn(300_000, dtype=torch.complex64)
    state = {
        "sparse": torch.ones(400, 400).to_sparse(),
        "conj": base.conj(),
        "turned": torch.ones(500, 600).t(),
    }
    expected = frozen(state)
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        for step, name in enumerate(state):
            with faulty.hold("put") as gate:
                response = await engine.save({**frozen(expected), name: state[name]}, step=step)
                await gate.until_arrived()
                state[name].mul_(0)
            try:
                await response.upload_completion
            except StateMutatedError:
                assert str(step) not in [path.name[-1] for path in root.glob("*/.metadata")]
            else:
                assert_same(await engine.read(step), expected)


async def test_save_returns_before_staging_ends(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put"):
            response = await engine.save({"x": random_tensor(torch.uint8, (4 * MIB,), 1)})
            assert not response.staging_completion.done()
            assert engine.pending == (response,)
        await response.upload_completion
        assert not engine.pending


async def test_leaves_are_captured_before_save_returns(root: Path, faulty: FaultyStorage) -> None:
    leaves: dict[str, Any] = {"epoch": 1, "history": [1, 2]}
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put"):
            response = await engine.save({"x": torch.zeros(MIB), "leaves": leaves})
            leaves["epoch"] = 2
            leaves["history"].append(3)
        await response.upload_completion
        assert_same((await engine.read())["leaves"], {"epoch": 1, "history": [1, 2]})


async def test_a_tensor_dropped_by_the_caller_is_still_saved(root: Path, faulty: FaultyStorage) -> None:
    state = {"x": random_tensor(torch.uint8, (4 * MIB,), 1)}
    expected = frozen(state)
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(state)
            await gate.until_arrived()
            del state
            scribble = [torch.full((4 * MIB,), 7, dtype=torch.uint8) for _ in range(3)]
        await response.upload_completion
        assert_same(await engine.read(), expected)
    assert len(scribble) == 3


async def test_tiny_budgets_do_not_stop_the_side_buffer_from_working(root: Path) -> None:
    staging = StagingOptions(part_bytes=PART, budget_bytes=ASIDE_BYTES + 2 * PART, overlap=True)
    state = {f"t{i}": random_tensor(torch.uint8, (60 * KIB + i,), i) for i in range(200)}
    async with CheckpointEngine(root, staging=staging) as engine:
        for _ in range(3):
            await asyncio.wait_for(_committed(engine, state), PATIENCE)
            assert_same(await engine.read(), state)


async def _committed(engine: CheckpointEngine, state: dict[str, Any]) -> None:
    await (await engine.save(state)).upload_completion
