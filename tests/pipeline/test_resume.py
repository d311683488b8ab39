"""A run that was interrupted and resumed ends bit-identical to one that was not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dcp_async import CheckpointEngine, RNGState, StagingOptions
from tests.support.doubles import ASIDE_BYTES, KIB, TrainingRun, assert_same, frozen
from tests.support.saves import SMALL

Make = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": torch.optim.AdamW,
    "adamw_fused": lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True),
    "adam_amsgrad": lambda params, lr: torch.optim.Adam(params, lr=lr, amsgrad=True),
    "sgd_momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "sgd_plain": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "lr_tensor": lambda params, lr: torch.optim.AdamW(params, lr=torch.tensor(lr)),
}


@pytest.mark.parametrize("make_optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
async def test_a_fresh_run_resumes_bit_for_bit(root: Path, make_optim: Make) -> None:
    whole = TrainingRun(1, make_optim=make_optim)
    whole.step(3)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await engine.save({**whole.state, "rng": RNGState()}, step=3)
        whole.step(4)
        await engine.wait()

        resumed = TrainingRun(99, make_optim=make_optim)
        torch.manual_seed(12345)
        report = await engine.load({**resumed.state, "rng": RNGState()})
    assert report.next_step == 4
    resumed.step(4)
    assert_same(resumed.picture(), whole.picture())


async def test_a_run_that_already_trained_resumes_bit_for_bit(root: Path) -> None:
    whole = TrainingRun(1)
    whole.step(3)
    async with CheckpointEngine(root) as engine:
        await engine.save({**whole.state, "rng": RNGState()}, step=3)
        whole.step(4)
        expected = whole.picture()
        await engine.wait()
        whole.step(2)
        await engine.load({**whole.state, "rng": RNGState()})
    whole.step(4)
    assert_same(whole.picture(), expected)


async def test_overlap_resumes_bit_for_bit(root: Path) -> None:
    whole = TrainingRun(1, width=128)
    staging = StagingOptions(part_bytes=64 * KIB, budget_bytes=ASIDE_BYTES + 512 * KIB, overlap=True)
    async with CheckpointEngine(root, staging=staging) as engine:
        for step in range(6):
            whole.step()
            await engine.save({**whole.state, "rng": RNGState()}, step=step)
        whole.step(2)
        await engine.wait()
        resumed = TrainingRun(99, width=128)
        await engine.load({**resumed.state, "rng": RNGState()}, 3)
    resumed.step(4)
    assert_same(resumed.picture(), whole.picture())


async def test_saving_does_not_change_the_run(root: Path) -> None:
    plain, saving = TrainingRun(1), TrainingRun(1)
    torch.manual_seed(5)
    plain.step(4)
    torch.manual_seed(5)
    async with CheckpointEngine(root) as engine:
        for step in range(4):
            saving.step()
            await engine.save({**saving.state, "rng": RNGState()}, step=step)
    assert_same(saving.picture(), plain.picture())


async def test_loading_keeps_parameters_and_optimizer_connected(root: Path) -> None:
    source, target = TrainingRun(1), TrainingRun(2)
    source.step(2)
    parameters = list(target.model.parameters())
    async with CheckpointEngine(root) as engine:
        await (await engine.save(source.state)).upload_completion
        await engine.load(target.state)
    assert all(a is b for a, b in zip(parameters, target.model.parameters(), strict=True))
    before = frozen(target.model)
    target.step()
    with pytest.raises(AssertionError):
        assert_same(frozen(target.model), before)


async def test_an_optimizer_takes_the_state_of_parameters_it_has_not_stepped(root: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: Any, optim: torch.optim.Optimizer, layers: list[int]) -> None:
        optim.zero_grad()
        for layer in layers:
            model[layer](torch.ones(4)).sum().backward()
        optim.step()

    model, optim = build()
    step(model, optim, [0, 1])
    other, other_optim = build()
    step(other, other_optim, [0])
    assert len(other_optim.state_dict()["state"]) < len(optim.state_dict()["state"])
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"model": model, "optim": optim})).upload_completion
        await engine.load({"model": other, "optim": other_optim})
    assert_same(frozen(other_optim), frozen(optim))
    assert_same(frozen(other), frozen(model))


@pytest.mark.parametrize("kind", ["step", "one_cycle", "sequential", "plateau", "lambda", "warm_restarts"])
async def test_schedulers_come_back(root: Path, kind: str) -> None:
    schedulers = torch.optim.lr_scheduler

    def build() -> tuple[torch.optim.Optimizer, Any]:
        optim = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.5, momentum=0.9)
        made: dict[str, Callable[[], Any]] = {
            "step": lambda: schedulers.StepLR(optim, 2),
            "one_cycle": lambda: schedulers.OneCycleLR(optim, max_lr=1.0, total_steps=20),
            "sequential": lambda: schedulers.SequentialLR(
                optim, [schedulers.LinearLR(optim), schedulers.ExponentialLR(optim, 0.9)], milestones=[3]
            ),
            "plateau": lambda: schedulers.ReduceLROnPlateau(optim),
            "lambda": lambda: schedulers.LambdaLR(optim, lambda epoch: 0.9**epoch),
            "warm_restarts": lambda: schedulers.CosineAnnealingWarmRestarts(optim, 4),
        }
        return optim, made[kind]()

    def advance(optim: torch.optim.Optimizer, scheduler: Any, count: int) -> None:
        for _ in range(count):
            optim.step()
            scheduler.step(*([1.0] if kind == "plateau" else []))

    optim, scheduler = build()
    advance(optim, scheduler, 5)
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"optim": optim, "scheduler": scheduler})).upload_completion
        fresh_optim, fresh_scheduler = build()
        await engine.load({"optim": fresh_optim, "scheduler": fresh_scheduler})
    assert_same(frozen(fresh_scheduler.state_dict()), frozen(scheduler.state_dict()))
    advance(optim, scheduler, 4)
    advance(fresh_optim, fresh_scheduler, 4)
    assert fresh_optim.param_groups[0]["lr"] == optim.param_groups[0]["lr"]


async def test_rng_state_restores_all_generators(root: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return (
            torch.randn(4).tolist(),
            random.random(),
            np.random.rand(3).tolist(),
            torch.nn.init.normal_(torch.empty(2)).tolist(),
        )

    async with CheckpointEngine(root) as engine:
        await (await engine.save({"rng": RNGState()})).upload_completion
        expected = draw()
        assert draw() != expected
        await engine.load({"rng": RNGState()})
    assert draw() == expected


async def test_rng_state_is_that_of_the_moment_of_save(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        response = await engine.save({"rng": RNGState()})
        expected = torch.randn(4)
        await response.upload_completion
        torch.manual_seed(4)
        await engine.load({"rng": RNGState()})
    assert_same(torch.randn(4), expected)


async def test_resuming_from_each_of_many_checkpoints(root: Path) -> None:
    run = TrainingRun(1)
    async with CheckpointEngine(root) as engine:
        for step in range(5):
            await engine.save({**run.state, "rng": RNGState()}, step=step)
            run.step()
        await engine.wait()
        async for info in engine.checkpoints():
            other = TrainingRun(50)
            report = await engine.load({**other.state, "rng": RNGState()}, info)
            other.step(5 - (report.next_step - 1))
            assert_same(other.picture(), run.picture())
