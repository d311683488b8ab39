"""Empty containers that stock drops, and kinds of mappings that it forgets, in what objects hold: they stay
as they are where a checkpoint of stock's is loaded, however deep they lie."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import CheckpointEngine
from tests.support.saves import Value

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

STATES: dict[str, Any] = {
    "at the top": {"a": {}, "n": 1},
    "a level down": {"a": {"b": {}, "n": 1}},
    "two levels down": {"a": {"b": {"c": {}, "l": []}, "n": 1}},
    "in a list": {"a": [{"b": {}, "n": 1}, 2]},
    "at the end of a list": {"a": [1, {}], "n": 1},
    "at the end of a list, deep": {"a": {"b": [1, {"c": {}}]}, "n": 1},
    "an ordered mapping, deep": {"a": {"b": {"c": OrderedDict(x=1, y=2)}}},
    "deep, beside a tensor": {"a": {"b": {"c": {}, "w": torch.ones(3)}}},
}


@pytest.mark.parametrize("name", STATES)
async def test_what_stock_drops_of_an_objects_state_stays(root: Path, name: str) -> None:
    whole = {"v": Value(STATES[name]), "n": 1}
    target: dict[str, Any] = {"v": Value(dict(STATES[name])), "n": 0}
    dcp.save(whole, checkpoint_id=root / "step-00000001", no_dist=True)
    async with CheckpointEngine(root) as engine:
        await engine.load(target)
    assert str(target["v"].value) == str(STATES[name])
    assert target["n"] == 1


async def test_containers_in_circles_are_looked_at_once(root: Path) -> None:
    class Held(Value):
        """Holds itself, beside what it gives."""

        def __init__(self, value: Any) -> None:
            super().__init__(value)
            self.circle: list[Any] = [1]
            self.circle.append(self.circle)

    dcp.save({"v": Held(3)}, checkpoint_id=root / "step-00000001", no_dist=True)
    target = Held(0)
    async with CheckpointEngine(root) as engine:
        await engine.load({"v": target})
    assert target.value == 3
