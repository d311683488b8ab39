"""A parameter group of an AppState gets the options of the group that had its parameters, and of no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from dcp_async import AppState, CheckpointEngine, LoadReport


def build() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in "ab"})


def grouped(model: nn.ModuleDict, **options: dict[str, Any]) -> SGD:
    return SGD([{"params": model[name].parameters(), **own} for name, own in options.items()], lr=0.1)


async def handed_over(root: Path, saved: AppState, loaded: AppState, *, strict: bool = True) -> LoadReport:
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"app": saved})).upload_completion
        return await engine.load({"app": loaded}, strict=strict)


async def test_options_that_were_not_saved_stay_with_their_own_group(root: Path) -> None:
    model, other = build(), build()
    saved = grouped(model, a={"lr": 0.5}, b={"lr": 0.25, "tag": "saved"})
    live = grouped(other, b={"initial_lr": 2.0, "tag": "b"}, a={"initial_lr": 1.0, "tag": "a"})
    report = await handed_over(root, AppState(model, saved), AppState(other, live))
    found = [(group["lr"], group["initial_lr"], group["tag"]) for group in live.param_groups]
    assert found == [(0.25, 2.0, "saved"), (0.5, 1.0, "a")]
    assert set(report.missing) == {
        "app.optim.param_groups.0.initial_lr",
        "app.optim.param_groups.1.initial_lr",
        "app.optim.param_groups.1.tag",
    }


async def test_optimizers_in_another_order_keep_to_their_own_options(root: Path) -> None:
    def optimizers(model: nn.ModuleDict) -> list[Optimizer]:
        return [Adam(model["a"].parameters()), SGD(model["b"].parameters(), momentum=0.9)]

    model, other = build(), build()
    fresh = optimizers(other)
    wanted = [set(optimizer.param_groups[0]) for optimizer in fresh]
    report = await handed_over(root, AppState(model, optimizers(model)), AppState(other, fresh[::-1]))
    assert [set(optimizer.param_groups[0]) for optimizer in fresh] == wanted
    assert report.missing == ()


async def test_without_strict_groups_that_were_split_take_their_options_from_the_one_before(
    root: Path,
) -> None:
    model, other = build(), build()
    saved = grouped(model, a={"lr": 0.5}, b={"lr": 0.25})
    live = SGD([{"params": [parameter]} for parameter in other.parameters()], lr=0.1)
    report = await handed_over(root, AppState(model, saved), AppState(other, live), strict=False)
    assert [group["lr"] for group in live.param_groups] == [0.5, 0.5, 0.25, 0.25]
    assert "app.optim.param_groups.3.lr" in report.missing


async def test_without_strict_every_group_that_was_saved_is_considered(root: Path) -> None:
    model, other = build(), build()
    rates = (0.1, 0.2, 0.3, 0.4)
    saved = SGD([{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), rates, strict=True)])
    live = grouped(other, a={"lr": 9.0}, b={"lr": 9.0})
    report = await handed_over(root, AppState(model, saved), AppState(other, live), strict=False)
    assert [group["lr"] for group in live.param_groups] == [0.1, 0.3]
    assert "app.optim.param_groups.2.lr" in report.unexpected


async def test_a_rate_in_a_tensor_is_not_read_into_that_of_another_group(root: Path) -> None:
    model, other = build(), build()
    saved = SGD([{"params": model["a"].parameters(), "lr": torch.tensor(0.5)}])
    live = SGD([{"params": other["b"].parameters(), "lr": torch.tensor(5.0)}])
    await handed_over(root, AppState(model, saved), AppState(other, live), strict=False)
    assert float(live.param_groups[0]["lr"]) == 5.0
