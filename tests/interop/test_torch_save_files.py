"""Checkpoints as files of torch.save, and such files as checkpoints, in the structure that was saved."""

from __future__ import annotations

import os
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import (
    CheckpointEngine,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LoadError,
    SaveError,
    UntrustedCheckpointError,
    open_checkpoint,
    sync,
    verify,
)
from dcp_async.interop import dcp_to_torch_save, torch_save_to_dcp
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


# --- the other way round


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("budget_bytes", [1 << 20, 64 << 20])
async def test_a_file_becomes_a_checkpoint_of_ours(tmp_path: Path, budget_bytes: int, is_zip: bool) -> None:
    state, path = state_of_all_kinds(), tmp_path / "all.pt"
    state["large"] = torch.randn(1 << 19)
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    await torch_save_to_dcp(path, tmp_path / "step-7", budget_bytes=budget_bytes)
    async with open_checkpoint(tmp_path / "step-7") as checkpoint:
        loaded = await checkpoint.read()
        assert checkpoint.info.producer == "dcp_async"
    assert_same(loaded, state)
    assert loaded["model"]["a"] is loaded["model"]["tied"]
    assert loaded["model"]["turned"].stride() == (1, 400)
    assert (await verify(tmp_path / "step-7")).damage == ()
    target: dict[str, Any] = {"model": {"a": torch.zeros(300, 700)}, "large": torch.zeros(1 << 19)}
    dcp.load(target, checkpoint_id=tmp_path / "step-7", no_dist=True)
    assert torch.equal(target["model"]["a"], state["model"]["a"])
    assert torch.equal(target["large"], state["large"])


async def test_there_and_back_is_the_same_object(tmp_path: Path) -> None:
    state = state_of_all_kinds()
    torch.save(state, tmp_path / "one.pt")
    await torch_save_to_dcp(tmp_path / "one.pt", tmp_path / "step-7")
    await dcp_to_torch_save(tmp_path / "step-7", tmp_path / "two.pt")
    assert_same(torch.load(tmp_path / "two.pt", weights_only=True), state)


async def test_the_blocking_twin_replaces_a_checkpoint(tmp_path: Path) -> None:
    path, directory = tmp_path / "w.pt", tmp_path / "run" / "step-00000001"
    await saved(tmp_path / "run", {"w": torch.zeros(3), "old": 1})
    torch.save({"w": torch.ones(3)}, path)
    sync.torch_save_to_dcp(path, directory)
    with sync.open_checkpoint(directory) as checkpoint:
        assert_same(checkpoint.read(), {"w": torch.ones(3)})


class MakesDirectory:
    """Pickled as a call that leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


async def test_a_payload_does_not_run_and_leaves_the_checkpoint_that_was_there(tmp_path: Path) -> None:
    source = await saved(tmp_path / "run", {"w": torch.zeros(3)})
    torch.save({"w": torch.ones(3), "x": MakesDirectory(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(UntrustedCheckpointError, match="nothing of it was run"):
        await torch_save_to_dcp(tmp_path / "bad.pt", source)
    assert not (tmp_path / "ran").exists()
    async with open_checkpoint(source) as checkpoint:
        assert_same(await checkpoint.read(), {"w": torch.zeros(3)})


async def test_files_that_hold_no_state_are_refused(tmp_path: Path) -> None:
    path, directory = tmp_path / "x.pt", tmp_path / "step-1"
    with pytest.raises(FileNotFoundError):
        await torch_save_to_dcp(path, directory)
    for content in (b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(CorruptCheckpointError, match=r"no file of torch\.save's"):
            await torch_save_to_dcp(path, directory)
    torch.save([torch.ones(3)], path)
    with pytest.raises(LoadError, match="holds a list, not a dict"):
        await torch_save_to_dcp(path, directory)
    torch.save({1: torch.ones(3)}, path)
    with pytest.raises((SaveError, ValueError), match="keys must be str"):
        await torch_save_to_dcp(path, directory)
    with pytest.raises(ValueError, match=r"budget_bytes=.*at least 1 MiB"):
        await torch_save_to_dcp(path, directory, budget_bytes=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


async def test_a_file_whose_bytes_do_not_match_their_checksums_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "one.pt")
    flip(tmp_path / "one.pt", 2000)
    with pytest.raises(CorruptCheckpointError, match="does not match its CRC-32"):
        await torch_save_to_dcp(tmp_path / "one.pt", tmp_path / "out")
    assert os.listdir(tmp_path) == ["one.pt"]
