"""A mapping's key may be an infinity or NaN, for which JSON has no word: it comes back as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from dcp_async import CheckpointEngine
from tests.support.doubles import manifest_file
from tests.support.saves import Value


def no_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize(
    "key", [math.inf, -math.inf, math.nan, np.float64("inf"), np.float64("nan"), (1, math.inf)], ids=repr
)
async def test_a_key_without_a_word_in_json_comes_back(root: Path, key: Any) -> None:
    bins = {key: torch.ones(2), 0.5: 1, "z": {key: 5}}
    async with CheckpointEngine(root) as engine:
        info = await (await engine.save({"s": Value(bins), "d": {key: 7}}, step=1)).upload_completion
        json.loads(manifest_file(root / info.checkpoint_id).read_text(), parse_constant=no_constant)
        target: dict[str, Any] = {"s": Value({}), "d": {key: 0}}
        await engine.load(target)
        found = target["s"].value
        assert [(type(each), repr(each)) for each in found] == [(type(each), repr(each)) for each in bins]
        assert [repr(each) for each in found["z"]] == [repr(key)]
        assert next(iter(found.values())).tolist() == [1, 1]
        assert list(target["d"].values()) == [7]
        fresh = await engine.read()
        assert [repr(each) for each in fresh["d"]] == [repr(key)]
