"""Checkpoints as files of torch.save: torch.load reads them, in the structure that was saved."""

from __future__ import annotations

import os
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import CheckpointEngine, CheckpointNotFoundError, CorruptCheckpointError, sync
from dcp_async.interop import dcp_to_torch_save
from tests.support.doubles import assert_same, data_files, flip
from tests.support.processes import run_in_process

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


@pytest.mark.parametrize("budget_bytes", [1 << 14, 64 << 20])
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


def convert_until_killed(source: Path, path: Path, function: str, call: int) -> None:
    """Convert, and die at the ``call``-th call of ``os``'s ``function``."""
    whole, calls = getattr(os, function), []

    def dies(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **options)

    setattr(os, function, dies)
    sync.dcp_to_torch_save(source, path, budget_bytes=1 << 16)


def signal_that_ended(*arguments: Any) -> int:
    """What ended ``convert_until_killed(*arguments)``, in a process of its own."""
    if (child := os.fork()) == 0:
        convert_until_killed(*arguments)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.mark.usefixtures("process_server")
@pytest.mark.parametrize(
    ("function", "call", "older"),
    [
        ("pwrite", 1, None),
        ("pwrite", 30, None),
        ("fsync", 1, None),
        ("pwrite", 30, b"old"),
        ("replace", 1, b"old"),
    ],
)
async def test_a_kill_leaves_what_was_there(
    tmp_path: Path, function: str, call: int, older: bytes | None
) -> None:
    source, path = await saved(tmp_path / "run", state_of_all_kinds()), tmp_path / "all.pt"
    if older is not None:
        path.write_bytes(older)
    assert run_in_process(signal_that_ended, source, path, function, call) == signal.SIGKILL
    assert (path.read_bytes() if path.exists() else None) == older


async def test_the_blocking_twin_replaces_a_file(tmp_path: Path) -> None:
    state = {"w": torch.arange(1000.0)}
    source, path = await saved(tmp_path / "run", state), tmp_path / "w.pt"
    path.write_bytes(b"older")
    sync.dcp_to_torch_save(source, path)
    assert_same(torch.load(path, weights_only=True), state)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("budget_bytes", [0, -1, 1.5, None])
async def test_a_budget_that_is_none_is_refused(tmp_path: Path, budget_bytes: Any) -> None:
    with pytest.raises(ValueError, match=r"budget_bytes=.* whole number"):
        await dcp_to_torch_save(tmp_path, tmp_path / "x.pt", budget_bytes=budget_bytes)


async def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    source = await saved(tmp_path / "run", {"w": torch.ones(3)})
    with pytest.raises(ValueError, match="is a directory"):
        await dcp_to_torch_save(source, tmp_path / "run")
    with pytest.raises(TypeError, match="path=7"):
        await dcp_to_torch_save(source, 7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is an address"):
        await dcp_to_torch_save("s3://bucket/run", tmp_path / "x.pt")
    with pytest.raises(CheckpointNotFoundError):
        await dcp_to_torch_save(tmp_path / "nothing", tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError):
        await dcp_to_torch_save(source, tmp_path / "no" / "x.pt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
