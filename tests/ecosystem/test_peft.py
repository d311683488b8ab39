"""peft: a model with two adapters, of which one is trained at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.optim import AdamW

from dcp_async import AppState, CheckpointEngine

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def build(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="first")
    model.add_adapter("second", config)
    adapters = [weight for name, weight in model.named_parameters() if "lora" in name]
    return model, AdamW(adapters, lr=0.1)


def step(model: Any, optim: Any, adapter: str) -> None:
    model.set_adapter(adapter)
    optim.zero_grad()
    model(torch.arange(8.0)).square().sum().backward()
    optim.step()


@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
@pytest.mark.parametrize("active", ["first", "second"])
@pytest.mark.parametrize("taken", [0, 1])
async def test_the_moments_of_both_adapters_come_back(
    tmp_path: Path, options: Any, active: str, taken: int
) -> None:
    one, other = build(1), build(2)
    for adapter in ("first", "second", "first"):
        step(*one, adapter)
    for _ in range(taken):
        step(*other, "first")
    one[0].set_adapter(active)
    other[0].set_adapter(active)  # which freezes the other one
    async with CheckpointEngine(tmp_path / "run") as engine:
        await (await engine.save({"app": AppState(*one, options=options)})).upload_completion
        report = await engine.load({"app": AppState(*other, options=options)})
    assert (report.missing, report.unexpected) == ((), ())
    assert len(other[1].state) == len(one[1].state) == 8
    for run in (one, other):
        for adapter in ("second", "first"):
            step(*run, adapter)
    for name, weight in other[0].named_parameters():
        mine = one[0].get_parameter(name)
        assert torch.equal(weight, mine)
        if weight in other[1].state:
            for key, value in other[1].state[weight].items():
                assert torch.equal(value, one[1].state[mine][key])
