"""Each door through which stock reads, over each shape of state: what ours holds comes out bit for bit."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from dcp_async import CheckpointEngine
from tests.interop.stock_states import as_stock_returns, leaf_state, nested_state, ramp, strided_state
from tests.support.doubles import assert_same, blank, frozen, random_tensor
from tests.support.saves import SMALL

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is (disabled, )?unavailable or uninitialized:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

BASE = random_tensor(torch.float32, (60, 70), 1)

STATES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"w": BASE, "v": ramp((7,), torch.int16), "n": 3, "s": "text"},
    "nested": nested_state,
    "int_keys": lambda: {"d": {0: ramp((3,)), 1: {2: ramp((4,)), -3: "x"}}, "l": [ramp((2,)), {5: 1}]},
    "ties": lambda: {"a": BASE, "b": {"again": BASE, "part": BASE[10:20]}, "l": [BASE, 1]},
    "strided": strided_state,
    "leaves": leaf_state,
    "exotic": lambda: {
        "complex": ramp((5,), torch.complex64).conj(),
        "half_complex": ramp((3, 3), torch.complex128),
        "parameter": torch.nn.Parameter(ramp((4, 4))),
        "expanded": BASE[:, :1].expand(60, 9),
        "float8": ramp((9,)).to(torch.float8_e5m2),
        "unsigned": ramp((9,), torch.uint64),
        "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "tuple": (1, torch.ones(2)),
    },
}


async def write(root: Path, state: Any) -> Path:
    async with CheckpointEngine(root, staging=SMALL) as engine:
        info = await (await engine.save(state)).upload_completion
    return root / info.checkpoint_id


def _load(path: Path, target: dict[str, Any]) -> None:
    dcp.load(target, checkpoint_id=path, no_dist=True)


def _load_with_reader_and_planner(path: Path, target: dict[str, Any]) -> None:
    reader = FileSystemReader(path)
    dcp.load(target, storage_reader=reader, planner=DefaultLoadPlanner(), no_dist=True)


def _load_by_hand(path: Path, target: dict[str, Any]) -> None:
    """The reader's and the planner's verbs in the order in which stock calls them."""
    reader, planner = FileSystemReader(path), DefaultLoadPlanner()
    metadata = reader.read_metadata()
    planner.set_up_planner(target, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
    reader.read_data(planner.finish_plan(plan), planner).wait()


INTO_A_TARGET = {
    "load": _load,
    "reader_and_planner": _load_with_reader_and_planner,
    "by_hand": _load_by_hand,
}


@pytest.mark.parametrize("door", INTO_A_TARGET)
@pytest.mark.parametrize("kind", STATES)
async def test_stock_fills_a_target_as_from_its_own(root: Path, tmp_path: Path, kind: str, door: str) -> None:
    path = await write(root, STATES[kind]())
    dcp.save(STATES[kind](), checkpoint_id=tmp_path / "stock", no_dist=True)
    target, expected = blank(STATES[kind]()), blank(STATES[kind]())
    INTO_A_TARGET[door](path, target)
    INTO_A_TARGET[door](tmp_path / "stock", expected)
    assert_same(target, expected)
    if kind != "int_keys":  # of which stock puts values, but not tensors, beside the key, under its text
        assert_same(target, frozen(STATES[kind]()))


@pytest.mark.parametrize("kind", STATES)
async def test_stock_makes_a_torch_file_of_it(root: Path, tmp_path: Path, kind: str) -> None:
    dcp_to_torch_save(await write(root, STATES[kind]()), tmp_path / "whole.pt")
    result = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert_same(result, as_stock_returns(frozen(STATES[kind]())))


@pytest.mark.parametrize("kind", STATES)
async def test_stock_reads_all_of_it_without_a_template(root: Path, kind: str) -> None:
    path = await write(root, STATES[kind]())
    assert_same(_load_state_dict_from_keys(checkpoint_id=path), as_stock_returns(frozen(STATES[kind]())))


@pytest.mark.parametrize("kind", STATES)
async def test_stock_reads_each_key_by_itself(root: Path, kind: str) -> None:
    """A key takes all that lies below it, whether it is a container's or a value's."""
    path = await write(root, STATES[kind]())
    whole = as_stock_returns(frozen(STATES[kind]()))
    for key, value in whole.items():
        assert_same(_load_state_dict_from_keys(key, checkpoint_id=path), {key: value})
    assert_same(_load_state_dict_from_keys(set(whole), checkpoint_id=path), whole)


KEYS: dict[str, tuple[set[str], dict[str, Any]]] = {
    "exact": ({"model.weight"}, {"model": {"weight": nested_state()["model"]["weight"]}}),
    "scalar": ({"model.scalar"}, {"model": {"scalar": nested_state()["model"]["scalar"]}}),
    "leaf": ({"optim.param_groups.0.lr"}, {"optim": {"param_groups": [{"lr": 0.125}]}}),
    "prefix": (
        {"optim.state.0"},
        {"optim": {"state": {"0": nested_state()["optim"]["state"][0]}}},
    ),
    "two": ({"epoch", "model.half"}, {"epoch": 3, "model": {"half": nested_state()["model"]["half"]}}),
}


@pytest.mark.parametrize("kind", KEYS)
async def test_stock_reads_parts_by_name_or_prefix(root: Path, kind: str) -> None:
    keys, expected = KEYS[kind]
    path = await write(root, nested_state())
    assert_same(_load_state_dict_from_keys(keys, checkpoint_id=path), expected)
    assert_same(_load_state_dict_from_keys(keys, storage_reader=FileSystemReader(path)), expected)


@pytest.mark.parametrize("kind", STATES)
async def test_stock_describes_it_as_its_own(root: Path, tmp_path: Path, kind: str) -> None:
    path = await write(root, STATES[kind]())
    dcp.save(STATES[kind](), checkpoint_id=tmp_path / "stock", no_dist=True)
    ours = FileSystemReader(path).read_metadata()
    stock = FileSystemReader(tmp_path / "stock").read_metadata()
    assert set(ours.state_dict_metadata) == set(stock.state_dict_metadata)
    assert ours.planner_data == stock.planner_data
    assert set(ours.storage_data) == set(stock.storage_data)
    assert ours.version == stock.version
