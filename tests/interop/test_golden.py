"""Checkpoints that stock wrote once and that are kept: each is read whole, loaded, and listed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine
from tests.interop.golden.make_golden import GOLDEN
from tests.interop.stock_states import (
    as_stock_returns,
    leaf_state,
    nested_state,
    sharded_whole,
    strided_state,
)
from tests.support.doubles import assert_same, blank

HERE = Path(__file__).parent / "golden"
STATES: dict[str, Any] = dict.fromkeys(GOLDEN, nested_state) | {
    "strided": strided_state,
    "leaves": leaf_state,
    "per_rank_2": sharded_whole,
    "sharded_4": sharded_whole,
    "torch_2_14_checkpointable_2": sharded_whole,
    "torch_2_15_strided": strided_state,
    "torch_2_15_sharded_2": sharded_whole,
}


@pytest.fixture
def golden(root: Path, request: pytest.FixtureRequest) -> Path:
    """A copy, so that no test can change what is kept."""
    shutil.copytree(HERE / request.param, root / request.param)
    return root


@pytest.mark.parametrize(("golden", "name"), [(name, name) for name in GOLDEN], indirect=["golden"])
async def test_a_golden_checkpoint_is_read_bit_for_bit(golden: Path, name: str) -> None:
    expected = as_stock_returns(STATES[name]())
    if name == "legacy_metadata":  # without planner_data nothing tells the tree
        expected = _flat(expected)
    async with CheckpointEngine(golden) as engine:
        assert_same(await engine.read(name), expected)


@pytest.mark.parametrize(("golden", "name"), [(name, name) for name in GOLDEN], indirect=["golden"])
async def test_a_golden_checkpoint_is_loaded_bit_for_bit(golden: Path, name: str) -> None:
    target = blank(STATES[name]())
    async with CheckpointEngine(golden) as engine:
        await engine.load(target, name)
    assert_same(target, STATES[name]())


@pytest.mark.parametrize(("golden", "name"), [(name, name) for name in GOLDEN], indirect=["golden"])
async def test_a_golden_checkpoint_is_listed_and_latest(golden: Path, name: str) -> None:
    files = list((golden / name).glob("*.distcp"))
    async with CheckpointEngine(golden) as engine:
        latest = await engine.latest()
        assert latest is not None
        assert [info async for info in engine.checkpoints()] == [latest]
        assert (latest.checkpoint_id, latest.producer) == (name, "stock")
        assert (latest.num_files, latest.nbytes) == (len(files), sum(file.stat().st_size for file in files))
        assert latest.world_size == (2 if name == "per_rank_2" else None)


def test_the_kept_files_are_what_the_readme_says() -> None:
    kept = {path.name for path in HERE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert kept == set(GOLDEN)
    assert all(f"`{name}`" in (HERE / "README.md").read_text() for name in GOLDEN)
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 400_000
    assert b"pathlib._local" in (HERE / "py313" / ".metadata").read_bytes()
    assert not (HERE / "per_rank_2" / ".metadata").exists()
    assert b"sharded_tensor.metadata" in (HERE / "legacy_metadata" / ".metadata").read_bytes()
    assert not (HERE / "legacy_items" / "__0_0.distcp").read_bytes().startswith(b"PK")


def _flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """By stock's names; a list of plain values is one of its leaves."""
    found: dict[str, Any] = {}
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        name = f"{prefix}{key}"
        is_plain = isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value)
        if isinstance(value, (dict, list)) and not is_plain:
            found |= _flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def test_the_formula_gives_each_tensor_other_values() -> None:
    tensors = [value for value in _flat(nested_state()).values() if isinstance(value, torch.Tensor)]
    assert len({bytes(tensor.float().numpy().tobytes()) for tensor in tensors}) == len(tensors)
