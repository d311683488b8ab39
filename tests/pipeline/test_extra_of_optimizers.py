"""What an optimizer keeps beside its parameters' entries and its groups comes back as it was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from dcp_async import AppState, CheckpointEngine, IncompatibleStateError
from tests.support.doubles import assert_same

Put = Callable[[nn.Module, SGD], dict[str, Any]]
PUTS: dict[str, Put] = {
    "bare": lambda model, optimizer: {"o": optimizer},
    "AppState": lambda model, optimizer: {"o": AppState(model, optimizer)},
}


class Keeping(SGD):
    """Has more in its state, as soon as there is something."""

    more: dict[str, Any]

    def __init__(self, model: nn.Module, **more: Any) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self.more = more

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self.more

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.more = {k: v for k, v in state_dict.items() if k not in ("state", "param_groups")}
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})


async def handed_over(root: Path, saved: dict[str, Any], loaded: dict[str, Any]) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save(saved)).upload_completion
        await engine.load(loaded)


@pytest.mark.parametrize("put", PUTS.values(), ids=PUTS)
@pytest.mark.parametrize(
    ("now", "then"),
    [
        ({}, {"k": 7}),
        ({}, {"k": torch.ones(2)}),
        ({}, {"k": {"a": [1, torch.ones(2)]}, "l": None}),
        ({"k": torch.zeros(3)}, {"k": torch.ones(2)}),
        ({"k": torch.zeros(2)}, {"k": torch.ones(2, dtype=torch.int64)}),
        ({"k": torch.zeros(2)}, {"k": 5}),
        ({"k": 5}, {"k": torch.ones(2), "m.n": 1}),
    ],
    ids=["new", "new tensor", "new tree", "shape", "dtype", "number", "tensor"],
)
async def test_a_key_of_its_own_comes_back_whatever_it_is_now(
    root: Path, put: Put, now: dict[str, Any], then: dict[str, Any]
) -> None:
    models = nn.Linear(2, 1), nn.Linear(2, 1)
    saved, live = Keeping(models[0], **then), Keeping(models[1], **now)
    await handed_over(root, put(models[0], saved), put(models[1], live))
    assert_same(live.more, then)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(2, 1), lambda: nn.Sequential(nn.Linear(2, 1))], ids=["no dots", "dots"]
)
async def test_an_entry_of_no_parameter_comes_back_in_an_app_state(
    root: Path, make: Callable[[], nn.Module]
) -> None:
    models = make(), make()
    saved, live = (SGD(model.parameters(), lr=0.1) for model in models)
    saved.state["glob"] = {"k": torch.ones(2), "n": 3}  # type: ignore[index]  # a key that torch lets pass
    await handed_over(root, PUTS["AppState"](models[0], saved), PUTS["AppState"](models[1], live))
    assert_same(dict(live.state), {"glob": {"k": torch.ones(2), "n": 3}})


async def test_an_entry_of_a_parameter_that_is_gone_is_none_of_the_optimizers_own(root: Path) -> None:
    class Odd(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.ones(2)))

    model, other = Odd("a", "b"), Odd("a")
    saved, live = (SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, other))
    for parameter in model.parameters():
        parameter.grad = torch.ones(2)
    saved.step()
    with pytest.raises(IncompatibleStateError, match=r"o\.optim\.state\.b\.momentum_buffer"):
        await handed_over(root, PUTS["AppState"](model, saved), PUTS["AppState"](other, live))
    assert not live.state
