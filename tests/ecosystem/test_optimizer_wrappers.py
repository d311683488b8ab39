"""The optimizers that Accelerate, Lightning and Fabric hand to a trainer, under an overlapped save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from dcp_async import AppState, CheckpointEngine, StagingOptions
from dcp_async.storage.local.storage import LocalStorage
from tests.support.doubles import FaultyStorage
from tests.support.saves import HELD


def accelerate(model: nn.Module, optim: Any) -> tuple[Any, Any]:
    return Accelerator(cpu=True).prepare(model, optim)  # type: ignore[no-any-return]  # it has no annotation


def fabric(model: nn.Module, optim: Any) -> tuple[Any, Any]:
    return Fabric(accelerator="cpu", devices=1).setup(model, optim)  # type: ignore[no-any-return]  # as above


def lightning(model: nn.Module, optim: Any) -> tuple[Any, Any]:
    return model, LightningOptimizer(optim)


WRAP: dict[str, Callable[[nn.Module, Any], tuple[Any, Any]]] = {
    "accelerate": accelerate,
    "fabric": fabric,
    "lightning": lightning,
}


def build(kind: str) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = nn.Linear(1024, 1024)
    optim = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optim.step()
    return *WRAP[kind](model, optim), optim


@pytest.mark.parametrize("kind", WRAP)
@pytest.mark.parametrize("bare", [True, False])
async def test_a_step_waits_for_the_copy(tmp_path: Path, kind: str, bare: bool) -> None:
    """The optimizer is fused: it moves no counter, so nothing else would stop a torn checkpoint."""
    model, wrapper, optim = build(kind)
    state = {"model": model, "optim": wrapper} if bare else {"app": AppState(model, wrapper)}
    before = [weight.detach().clone() for weight in model.parameters()]
    faulty = FaultyStorage(LocalStorage(tmp_path / "run"))
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put") as gate:
            optim.register_step_pre_hook(lambda *_: gate.release())
            response = await engine.save(state)
            assert not response.staging_completion.done()
            if kind == "lightning":  # it steps through a strategy, which is the trainer's
                optim.step()
            else:
                wrapper.step()
            assert response.staging_completion.done()
        await response.upload_completion
        found = await engine.read()
    weights = found["model"] if bare else found["app"]["model"]
    assert all(torch.equal(saved, mine) for saved, mine in zip(weights.values(), before, strict=True))
    assert not torch.equal(next(iter(model.parameters())), before[0])


@pytest.mark.parametrize("kind", WRAP)
async def test_a_wrapped_optimizer_comes_back(tmp_path: Path, kind: str) -> None:
    model, wrapper, optim = build(kind)
    other, other_wrapper, other_optim = build(kind)
    other_optim.step()
    async with CheckpointEngine(tmp_path / "run", staging=StagingOptions(overlap=True)) as engine:
        await (await engine.save({"app": AppState(model, wrapper)})).upload_completion
        await engine.load({"app": AppState(other, other_wrapper)})
        assert len(optim._optimizer_step_pre_hooks) == 1
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optim.state[mine].items():
            assert torch.equal(value, other_optim.state[theirs][key])
