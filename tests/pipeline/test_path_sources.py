"""A path of a checkpoint or of a model works where a name does, wherever it lies."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from safetensors.torch import save_file

from dcp_async import (
    CheckpointEngine,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LoadError,
    open_checkpoint,
    sync,
)
from dcp_async.storage import MemoryStorage
from tests.support.doubles import assert_same

MODEL = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.arange(3.0)}


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((3,), value), "n": int(value)}


async def saved(root: Path, *steps: int) -> None:
    async with CheckpointEngine(root) as engine:
        for step in steps:
            await engine.save(state(step), step=step)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "models" / "tiny"
    directory.mkdir(parents=True)
    save_file(MODEL, directory / "model.safetensors")
    return directory


async def test_a_checkpoint_of_another_run_is_a_source_of_every_verb(tmp_path: Path) -> None:
    await saved(tmp_path / "other", 4, 5)
    await saved(tmp_path / "own", 1)
    path = tmp_path / "other" / "step-00000004"
    async with CheckpointEngine(tmp_path / "own") as engine:
        target = state(0)
        report = await engine.load(target, path)
        assert (report.checkpoint_id, report.step) == (os.fspath(path), 4)
        assert_same(target, state(4))
        assert_same(await engine.read(f"{path}/"), state(4))
        assert (await engine.verify(path)).ok
        async with engine.checkpoint(path) as checkpoint:
            assert_same(await checkpoint.read("w"), {"w": state(4)["w"]})
            await checkpoint.load(state(0))
            again = state(0)
            await engine.load(again, checkpoint.info)  # what was told of it names it too
            assert_same(again, state(4))
            metadata = await checkpoint.info.metadata()
            assert metadata.state_dict_metadata.keys() == target.keys()
        latest = await engine.latest()
        assert latest is not None
        assert latest.step == 1  # of the root alone
        await engine.save(state(9))
        assert [info.step async for info in engine.checkpoints()] == [1, 2]


async def test_stocks_checkpoints_and_models_are_sources_too(tmp_path: Path, model: Path) -> None:
    stock.save(state(7), checkpoint_id=tmp_path / "stock-7", no_dist=True)
    async with CheckpointEngine("memory://path-sources") as engine:
        target = state(0)
        report = await engine.load(target, tmp_path / "stock-7")
        assert report.step == 7
        assert_same(target, state(7))
        info = engine.checkpoint(tmp_path / "stock-7")
        async with info as checkpoint:
            assert checkpoint.info.time > 0
        for source in (model, model / "model.safetensors"):
            filled = {name: torch.zeros_like(value) for name, value in MODEL.items()}
            assert (await engine.load(filled, source)).checkpoint_id == os.fspath(source)
            assert_same(filled, MODEL)
            assert_same(await engine.read(source), MODEL)
            assert set((await engine.verify(source)).unrecorded) == set(MODEL)
        async with engine.checkpoint(os.fspath(model)) as checkpoint:
            assert torch.equal(await checkpoint.tensor("w", 1), MODEL["w"][1])


async def test_the_blocking_twin_takes_paths(tmp_path: Path, model: Path) -> None:
    with sync.CheckpointEngine(tmp_path / "own") as engine:
        assert_same(engine.read(model), MODEL)


async def test_a_relative_path_is_meant_where_the_call_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await saved(tmp_path / "runs" / "a", 7)
    monkeypatch.chdir(tmp_path)
    async with CheckpointEngine(tmp_path / "own") as engine:
        assert_same(await engine.read("runs/a/step-00000007"), state(7))
        checkpoint = engine.checkpoint("./runs/a/../a/step-00000007")
        async with checkpoint:
            assert checkpoint.info.checkpoint_id == os.fspath(tmp_path / "runs" / "a" / "step-00000007")
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    async with CheckpointEngine(tmp_path / "own") as engine:
        assert_same(await engine.read("~/runs/a/step-00000007"), state(7))


async def test_a_name_without_a_slash_is_one_of_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await saved(tmp_path / "own", 1)
    await saved(tmp_path, 1, 2)
    monkeypatch.chdir(tmp_path)
    async with CheckpointEngine(tmp_path / "own") as engine:
        report = await engine.load(state(0), "step-00000001")
        assert report.checkpoint_id == "step-00000001"
        with pytest.raises(CheckpointNotFoundError, match=r"by its path, such as '\./step-00000002'"):
            await engine.load(state(0), "step-00000002")
        assert (await engine.load(state(0), "./step-00000002")).step == 2


async def test_a_path_into_the_root_waits_for_the_save_of_it(tmp_path: Path) -> None:
    async with CheckpointEngine(tmp_path / "own") as engine:
        response = await engine.save(state(3), step=3)
        assert_same(await engine.read(tmp_path / "own" / "step-00000003"), state(3))
        assert response.upload_completion.done()


async def test_what_is_not_there_is_told_with_what_was_looked_for(tmp_path: Path, model: Path) -> None:
    await saved(tmp_path / "run", 1, 2)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    async with CheckpointEngine(tmp_path / "own") as engine:
        for path, words in (
            (tmp_path / "absent", "no checkpoint at '.*/absent': there is no such file or directory"),
            (tmp_path / "empty", "neither a .metadata nor safetensors files"),
            (tmp_path / "pipe", "it is no directory"),
            (tmp_path / "run", "a directory of checkpoints, of which step-00000001, step-00000002"),
            (model / "absent.safetensors", "there is no such file"),
        ):
            for verb in (engine.read, engine.verify, lambda path: engine.load({}, path)):
                with pytest.raises(CheckpointNotFoundError, match=words):
                    await verb(path)
            with pytest.raises(CheckpointNotFoundError, match=words):
                async with engine.checkpoint(path):
                    pass
        with pytest.raises(ValueError, match=r"is a URL, which dcp_async\.open_checkpoint"):
            await engine.load({}, "memory://run/step-00000001")


async def test_a_damaged_one_is_told_and_nothing_older_is_loaded_for_it(tmp_path: Path) -> None:
    await saved(tmp_path / "run", 1)
    path = tmp_path / "run" / "step-00000001"
    (path / ".metadata").write_bytes(b"?")
    await saved(tmp_path / "own", 1)
    async with CheckpointEngine(tmp_path / "own") as engine:
        with pytest.raises(CorruptCheckpointError, match=str(path)):
            await engine.load(state(0), path)


async def test_a_directory_may_be_a_link_and_its_files_may_not_lead_out_of_it(tmp_path: Path) -> None:
    await saved(tmp_path / "run", 1)
    (tmp_path / "link").symlink_to(tmp_path / "run" / "step-00000001")
    async with CheckpointEngine(tmp_path / "own") as engine:
        assert_same(await engine.read(tmp_path / "link"), state(1))
        data = next((tmp_path / "run" / "step-00000001").glob("*.distcp"))
        os.rename(data, tmp_path / "elsewhere")
        data.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(LoadError, match="links are not followed"):
            await engine.read(tmp_path / "link")


async def test_paths_of_many_roots_take_no_threads_of_their_own(tmp_path: Path) -> None:
    for number in range(5):
        await saved(tmp_path / str(number), number)
    storage = MemoryStorage("many-roots")
    async with CheckpointEngine(storage) as engine:
        await engine.read(tmp_path / "0" / "step-00000000")
        before = threading.active_count()
        for number in range(5):
            assert_same(await engine.read(tmp_path / str(number) / f"step-0000000{number}"), state(number))
        assert threading.active_count() <= before
    await storage.close()


async def test_the_callers_thread_looks_at_no_file(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead mount must not stop the trainer's loop."""
    caller, looked = threading.get_ident(), []

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == caller:
                looked.append((name, args))
            return real(*args, **kwargs)

        return call

    await saved(tmp_path / "run", 1)
    async with CheckpointEngine(tmp_path / "own") as engine:
        for name in ("listdir", "scandir", "open", "stat", "lstat", "readlink"):
            monkeypatch.setattr(os, name, watched(name))
        await engine.read(model)
        await engine.read(tmp_path / "run" / "step-00000001")
        async with open_checkpoint(model) as checkpoint:
            await checkpoint.read()
        monkeypatch.undo()
    assert looked == []


async def test_an_index_beside_a_checkpoint_is_named_by_its_path(tmp_path: Path, model: Path) -> None:
    index = model / "other.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(MODEL, "model.safetensors")}))
    async with CheckpointEngine(tmp_path / "own") as engine:
        assert_same(await engine.read(index), MODEL)
