"""Optimizers wait for an overlapped copy wherever a Stateful holds them, and where nothing holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from dcp_async import CheckpointEngine, StagingOptions
from dcp_async.state.optimizers.stepping import stepped_by
from tests.support.doubles import FaultyStorage, assert_same, frozen
from tests.support.saves import HELD

WIDTH = 1024  # more than the budget, so that staging waits for the gate


class Job:
    """A Stateful of the trainer's own, without a ``step()``."""

    def __init__(self, model: nn.Module, **attributes: Any) -> None:
        self.model = model
        vars(self).update(attributes)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.model.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)


class Slotted:
    __slots__ = ("name", "optim")

    def __init__(self, optim: Optimizer) -> None:
        self.name, self.optim = "slotted", optim


PLACES: dict[str, Callable[[nn.Module, Optimizer], Any]] = {
    "second in a dict": lambda model, optim: {"model": model, "opt": optim},
    "behind None in a list": lambda model, optim: [None, optim],
    "last in a tuple": lambda model, optim: (model, "adamw", optim),
    "in a set": lambda model, optim: {optim},
    "in an object that does not step": lambda model, optim: SimpleNamespace(optimizer=optim),
    "in a slot of one": lambda model, optim: Slotted(optim),
    "in one of several objects": lambda model, optim: [0, SimpleNamespace(optims=[optim])],
    "two objects deep": lambda model, optim: SimpleNamespace(
        optimizer="adamw", inner=SimpleNamespace(_optimizer=optim)
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_optimizer_is_found_wherever_it_lies(place: str) -> None:
    model = nn.Linear(2, 2)
    optim = AdamW(model.parameters())
    assert stepped_by(Job(model, context=PLACES[place](model, optim))) == [optim]


def test_a_long_list_is_looked_at_in_part() -> None:
    class Sample:
        looked_at = 0

        def __getattribute__(self, name: str) -> Any:
            Sample.looked_at += 1
            return super().__getattribute__(name)

    assert stepped_by(Job(nn.Linear(2, 2), samples=[Sample() for _ in range(5000)])) == []
    assert 0 < Sample.looked_at < 500


def build() -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH)
    optim = AdamW(model.parameters(), lr=0.1, fused=True)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optim.step()
    return model, optim


def _moments(optim: Optimizer) -> dict[str, Any]:
    return {str(at): entry["exp_avg"] for at, entry in enumerate(optim.state.values())}


STATES: dict[str, Callable[[nn.Module, Optimizer], dict[str, Any]]] = {
    "the parameters": lambda model, optim: {"job": Job(model)},
    "rows of them": lambda model, optim: {"rows": [row.detach() for row in model.weight.split(WIDTH // 2)]},  # type: ignore[operator]
    "the optimizer's moments": lambda model, optim: {"moments": _moments(optim)},
    "both, in a second save": lambda model, optim: {"job": Job(model), "moments": _moments(optim)},
}


@pytest.mark.parametrize("kind", STATES)
async def test_an_optimizer_that_nothing_holds_waits(root: Path, faulty: FaultyStorage, kind: str) -> None:
    """The step is fused and the samples of the bytes are few: the checkpoint would be torn or refused."""
    model, optim = build()
    state = STATES[kind](model, optim)
    gates: list[Any] = []

    def release(*_: Any) -> None:
        gates.pop().release()

    first = torch_optimizer.register_optimizer_step_pre_hook(release)  # before the engine's
    try:
        async with CheckpointEngine(faulty, staging=HELD) as engine:
            if kind == "both, in a second save":
                await (await engine.save({"optim": optim}, step=1)).upload_completion
            before = frozen(state)
            with faulty.hold("put") as gate:
                gates.append(gate)
                response = await engine.save(state, step=2)
                assert not response.staging_completion.done()
                optim.step()
                assert response.staging_completion.done()
            await response.upload_completion
            assert_same(await engine.read(2), before)
    finally:
        first.remove()
    with pytest.raises(AssertionError):
        assert_same(frozen(state), before)


async def test_an_optimizer_of_other_tensors_does_not_wait(root: Path, faulty: FaultyStorage) -> None:
    model, _ = build()
    _, others = build()
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put"):
            response = await engine.save({"job": Job(model)}, step=1)
            others.step()
            others.step()
            assert not response.staging_completion.done()
        await response.upload_completion


async def test_no_hook_stays_behind(root: Path) -> None:
    model, optim = build()
    hooks = torch_optimizer._global_optimizer_pre_hooks
    before = len(hooks)
    async with CheckpointEngine(root, staging=StagingOptions(overlap=True)) as engine:
        for step in range(3):
            await (await engine.save({"job": Job(model)}, step=step)).upload_completion
        optim.step()
        assert len(hooks) == before + 1
    assert len(hooks) == before
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"job": Job(model)}, step=9)).upload_completion
        assert len(hooks) == before
