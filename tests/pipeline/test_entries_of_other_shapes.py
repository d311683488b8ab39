"""What an optimizer kept for a parameter that has another shape now is refused, or left out and reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import StateDictOptions

from dcp_async import AppState, CheckpointEngine, IncompatibleStateError, LoadReport
from tests.support.doubles import assert_same, frozen

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
KINDS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "Adam": optim.Adam,
    "SGD": lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9),
    "RMSprop": optim.RMSprop,
    "Adagrad": optim.Adagrad,
    "Rprop": optim.Rprop,
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def build(outputs: int, make: Callable[[Any], optim.Optimizer], *, steps: int = 0) -> tuple[Any, Any]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, outputs))
    made = model, make(model.parameters())
    for _ in range(steps):
        step(*made)
    return made


def step(model: nn.Module, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()


async def handed_over(
    root: Path, saved: dict[str, Any], loaded: dict[str, Any], *, strict: bool = True
) -> LoadReport:
    async with CheckpointEngine(root) as engine:
        await (await engine.save(saved)).upload_completion
        return await engine.load(loaded, strict=strict)


@every_kind
async def test_a_bare_optimizer_refuses_entries_of_a_smaller_head(
    root: Path, make: Callable[[Any], optim.Optimizer]
) -> None:
    (_, saved), (_, live) = build(2, make, steps=1), build(5, make)
    before = frozen(live)
    with pytest.raises(IncompatibleStateError, match=r"o\.state\.2\.\w+ is of a parameter that is \(5, 4\)"):
        await handed_over(root, {"o": saved}, {"o": live})
    assert_same(frozen(live), before)


@every_kind
@pytest.mark.parametrize("form", ["bare", "AppState", "flat AppState"])
@pytest.mark.parametrize("steps", [0, 1])
async def test_without_strict_the_other_entries_are_loaded_and_training_goes_on(
    root: Path, make: Callable[[Any], optim.Optimizer], form: str, steps: int
) -> None:
    def put(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
        if form == "bare":
            return {"m": model, "o": optimizer}
        return {"a": AppState(model, optimizer, options=FLAT if form.startswith("flat") else None)}

    (model, saved), (other, live) = build(2, make, steps=2), build(5, make, steps=steps)
    own = frozen(live)["state"]
    report = await handed_over(root, put(model, saved), put(other, live), strict=False)
    state, given = frozen(live)["state"], frozen(saved)["state"]
    assert_same({number: state[number] for number in (0, 1)}, {number: given[number] for number in (0, 1)})
    assert_same({n: entry for n, entry in state.items() if n > 1}, {n: e for n, e in own.items() if n > 1})
    assert any(".state." in name for name in report.mismatched)
    assert report.unexpected == ()
    step(other, live)


async def test_an_app_state_judges_optimizers_of_any_class(root: Path) -> None:
    class Others(optim.Adafactor):
        pass

    (model, saved), (other, live) = build(2, Others, steps=1), build(5, Others)
    report = await handed_over(
        root, {"a": AppState(model, saved)}, {"a": AppState(other, live)}, strict=False
    )
    assert "a.optim.state.1.weight.row_var" in report.mismatched
    assert len(live.state) == 2
    step(other, live)


@pytest.mark.parametrize(
    "make", [optim.Adafactor, lambda parameters: optim.LBFGS(list(parameters))], ids=["Adafactor", "LBFGS"]
)
@pytest.mark.parametrize("form", ["bare", "AppState"])
async def test_entries_that_never_had_their_parameters_shape_are_taken(
    root: Path, make: Callable[[Any], optim.Optimizer], form: str
) -> None:
    model, saved = build(2, make)
    other, live = build(2, make)

    def closure() -> torch.Tensor:
        saved.zero_grad()
        loss: torch.Tensor = model(torch.ones(2, 3)).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    saved.step(closure)
    states = [
        {"m": each, "o": own} if form == "bare" else {"a": AppState(each, own)}
        for each, own in ((model, saved), (other, live))
    ]
    await handed_over(root, *states)
    assert_same(frozen(live)["state"], frozen(saved)["state"])
