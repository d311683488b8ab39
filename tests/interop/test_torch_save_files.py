"""Checkpoints as files of torch.save: torch.load reads them, in the structure that was saved."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import CheckpointEngine, CorruptCheckpointError
from dcp_async.interop import dcp_to_torch_save
from tests.support.doubles import assert_same, data_files, flip

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)


def state_of_all_kinds() -> dict[str, Any]:
    weight = torch.randn(300, 700)
    return {
        "model": {
            "a": weight,
            "tied": weight,
            "turned": torch.randn(500, 400).t(),
            "scalar": torch.tensor(3),
        },
        "kinds": {
            str(dtype): torch.ones(5, dtype=dtype)
            for dtype in (torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16)
        },
        "plain": {7: [1, "x", {}, None]},
        "empty": torch.empty(0, 3),
        "sparse": torch.eye(4).to_sparse(),
    }


async def saved(root: Path, state: dict[str, Any]) -> Path:
    async with CheckpointEngine(root) as engine:
        await engine.save(state, step=1)
    return root / "step-00000001"


@pytest.mark.parametrize("budget_bytes", [1 << 10, 64 << 20])
async def test_torch_loads_what_was_saved(tmp_path: Path, budget_bytes: int) -> None:
    state = state_of_all_kinds()
    source, path = await saved(tmp_path / "run", state), tmp_path / "all.pt"
    await dcp_to_torch_save(source, path, budget_bytes=budget_bytes)
    loaded = torch.load(path, weights_only=True)
    assert_same(loaded, state)
    assert loaded["model"]["a"].data_ptr() == loaded["model"]["tied"].data_ptr()
    assert loaded["model"]["turned"].stride() == (1, 400)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "run"] == ["all.pt"]


async def test_stocks_checkpoints_are_written_too(tmp_path: Path) -> None:
    state = {"w": torch.arange(1000.0), "n": {"step": 3}}
    dcp.save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    await dcp_to_torch_save(tmp_path / "stock", tmp_path / "w.pt", budget_bytes=100)
    assert_same(torch.load(tmp_path / "w.pt", weights_only=True), state)


async def test_a_damaged_checkpoint_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    source = await saved(tmp_path / "run", {"w": torch.zeros(100_000)})
    flip(data_files(source)[0], 200_000)
    (tmp_path / "w.pt").write_bytes(b"older")
    with pytest.raises(CorruptCheckpointError):
        await dcp_to_torch_save(source, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 2
