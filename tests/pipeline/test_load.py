"""load and read: which checkpoint is meant, what must fit, and what the report says."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_async import (
    CheckpointEngine,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompatibleStateError,
    LoadError,
    LoadReport,
)
from tests.support.doubles import (
    TrainingRun,
    assert_same,
    data_files,
    flip,
    frozen,
    manifest_file,
    random_tensor,
)
from tests.support.saves import SMALL, saved

A = random_tensor(torch.float32, (30, 40), 1)
B = random_tensor(torch.int64, (70,), 2)


# --- which one ------------------------------------------------------------------------------------


async def test_a_checkpoint_can_be_named_in_four_ways(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        first = await saved(engine, {"n": 1}, step=1)
        await saved(engine, {"n": 2}, step=2)
        assert (await engine.read())["n"] == 2
        assert (await engine.read("latest"))["n"] == 2
        assert (await engine.read("step-00000001"))["n"] == 1
        assert (await engine.read(1))["n"] == 1
        assert (await engine.read(first))["n"] == 1
        state = {"n": 0}
        for source in ("step-00000001", 1, first):
            state["n"] = 0
            report = await engine.load(state, source)
            assert (state["n"], report.checkpoint_id, report.step) == (1, "step-00000001", 1)


@pytest.mark.parametrize("source", ["latest", "missing", 7, "step-00000007", "../elsewhere", ""])
async def test_a_checkpoint_that_is_not_there_is_not_found(root: Path, source: Any) -> None:
    async with CheckpointEngine(root) as engine:
        if source != "latest":
            await saved(engine, {"n": 1}, step=1)
        with pytest.raises(CheckpointNotFoundError) as caught:
            await engine.load({"n": 0}, source)
        assert isinstance(caught.value, FileNotFoundError)
        with pytest.raises(CheckpointNotFoundError):
            await engine.read(source)
        await saved(engine, {"n": 1}, step=2)


async def test_an_uncommitted_directory_is_no_checkpoint(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"n": 1}, step=1)
        (root / "step-00000009").mkdir()
        (root / "step-00000009" / "__0_0.distcp").write_bytes(b"stock was here")
        assert [info.step async for info in engine.checkpoints()] == [1]
        latest = await engine.latest()
        assert latest is not None
        assert latest.step == 1
        with pytest.raises(CheckpointNotFoundError):
            await engine.load({"n": 0}, 9)


async def test_checkpoints_come_in_the_order_of_steps(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        for step in (30, 4, 100, 7):
            await saved(engine, {"n": step}, step=step)
        assert [info.step async for info in engine.checkpoints()] == [4, 7, 30, 100]
        latest = await engine.latest()
        assert latest is not None
        assert latest.step == 100
    async with CheckpointEngine(root) as engine:
        assert [info.step async for info in engine.checkpoints()] == [4, 7, 30, 100]
        assert (await engine.read())["n"] == 100


async def test_the_step_of_the_manifest_outranks_the_name(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"n": 1}, step=50)
        await saved(engine, {"n": 2}, checkpoint_id="final-7", step=60)
        latest = await engine.latest()
        assert latest is not None
        assert latest.checkpoint_id == "final-7"
        assert (await engine.read(60))["n"] == 2


async def test_foreign_things_in_the_root_are_ignored(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"n": 1}, step=1)
        (root / "notes.txt").write_text("hello")
        (root / "logs").mkdir()
        (root / "logs" / "x.log").write_text("hello")
        os.symlink("nowhere", root / "dangling")
        assert [info.step async for info in engine.checkpoints()] == [1]
        await saved(engine, {"n": 2}, step=2)
    assert (root / "notes.txt").read_text() == "hello"
    assert (root / "logs" / "x.log").read_text() == "hello"
    assert (root / "dangling").is_symlink()


async def test_listing_survives_directories_that_vanish_meanwhile(root: Path) -> None:
    """Another save is aborted, or another process sweeps, between the listing of a name and a look at it."""
    stop = threading.Event()

    def come_and_go() -> None:
        names = [root / f"step-{n:08d}" for n in range(100, 140)]
        while not stop.is_set():
            for name in names:
                name.mkdir()
            for name in names:
                name.rmdir()

    async with CheckpointEngine(root) as engine:
        await saved(engine, {"n": 1}, step=1)
        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            for _ in range(200):
                latest = await engine.latest()
                assert latest is not None
                assert latest.step == 1
        finally:
            stop.set()
            thread.join()


async def test_reading_makes_no_directory(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        assert await engine.latest() is None
        assert [info async for info in engine.checkpoints()] == []
    assert not root.exists() or list(root.iterdir()) == []


# --- the report -----------------------------------------------------------------------------------


async def test_the_report_says_what_was_loaded(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"a": A, "b": B, "n": 1}, step=41)
        report = await engine.load({"a": torch.zeros_like(A), "b": torch.zeros_like(B), "n": 0})
    assert isinstance(report, LoadReport)
    assert (report.checkpoint_id, report.step, report.next_step) == ("step-00000041", 41, 42)
    assert (report.missing, report.unexpected, report.mismatched, report.skipped) == ((), (), (), ())
    assert report.nbytes >= A.nbytes + B.nbytes
    assert report.seconds > 0


async def test_next_step_of_a_checkpoint_without_step_is_an_error(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"n": 1}, checkpoint_id="best")
        report = await engine.load({"n": 0}, "best")
        assert report.step is None
        with pytest.raises(LoadError):
            _ = report.next_step


# --- strict and not -------------------------------------------------------------------------------


MISFITS: dict[str, tuple[dict[str, Any], dict[str, tuple[str, ...]]]] = {
    "missing": (
        {"m": {"a": torch.zeros_like(A), "b": torch.zeros_like(B), "c": torch.zeros(3)}},
        {"missing": ("m.c",)},
    ),
    "missing_leaf": (
        {"m": {"a": torch.zeros_like(A), "b": torch.zeros_like(B), "n": 5}},
        {"missing": ("m.n",)},
    ),
    "unexpected": ({"m": {"a": torch.zeros_like(A)}}, {"unexpected": ("m.b",)}),
    "shape": (
        {"m": {"a": torch.zeros(40, 30), "b": torch.zeros_like(B)}},
        {"mismatched": ("m.a",)},
    ),
    "rank": ({"m": {"a": torch.zeros(1200), "b": torch.zeros_like(B)}}, {"mismatched": ("m.a",)}),
    "dtype": (
        {"m": {"a": torch.zeros_like(A, dtype=torch.float16), "b": torch.zeros_like(B)}},
        {"mismatched": ("m.a",)},
    ),
    "all": (
        {"m": {"a": torch.zeros(2, 2), "z": torch.zeros(1)}},
        {"missing": ("m.z",), "unexpected": ("m.b",), "mismatched": ("m.a",)},
    ),
}


def misfitting(name: str) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """A state of the test's own, and what does not fit in it."""
    state, misfits = MISFITS[name]
    inner = {
        key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state["m"].items()
    }
    return {"m": inner}, misfits


@pytest.mark.parametrize("name", MISFITS)
async def test_strict_refuses_what_does_not_fit_and_touches_nothing(root: Path, name: str) -> None:
    state, misfits = misfitting(name)
    before = frozen(state)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"m": {"a": A, "b": B}}, step=1)
        with pytest.raises(IncompatibleStateError) as caught:
            await engine.load(state)
        assert caught.value.checkpoint_id == "step-00000001"
        for names in misfits.values():
            assert all(misfit in str(caught.value) for misfit in names)
    assert_same(state, before)


@pytest.mark.parametrize("name", MISFITS)
async def test_not_strict_loads_what_fits_and_lists_the_rest(root: Path, name: str) -> None:
    state, misfits = misfitting(name)
    before = frozen(state)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"m": {"a": A, "b": B}})
        report = await engine.load(state, strict=False)
    for kind in ("missing", "unexpected", "mismatched"):
        assert getattr(report, kind) == misfits.get(kind, ())
    for key, original in (("a", A), ("b", B)):
        if key in state["m"]:
            misfit = f"m.{key}" in misfits.get("mismatched", ())
            assert_same(state["m"][key], before["m"][key] if misfit else original)
    for key in ("c", "n", "z"):
        assert_same(state["m"].get(key), before["m"].get(key))


async def test_subtrees_that_the_state_does_not_name_are_not_unexpected(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": {"a": A}, "optim": {"b": B}, "n": 1})
        report = await engine.load({"model": {"a": torch.zeros_like(A)}})
    assert report.unexpected == ()


async def test_a_checkpoint_of_a_larger_model_is_refused_by_a_smaller_one(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
        target = nn.Sequential(nn.Linear(4, 4))
        before = frozen(target)
        with pytest.raises(IncompatibleStateError, match=r"model\.1\.weight"):
            await engine.load({"model": target})
        assert_same(frozen(target), before)
        report = await engine.load({"model": target}, strict=False)
        assert set(report.unexpected) == {"model.1.weight", "model.1.bias"}


async def test_a_tensor_target_for_a_saved_leaf_is_refused(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"x": 5, "a": A})
        target = {"x": torch.zeros(2), "a": torch.zeros_like(A)}
        with pytest.raises(IncompatibleStateError, match="x"):
            await engine.load(target)
        assert_same(target, {"x": torch.zeros(2), "a": torch.zeros_like(A)})


@pytest.mark.parametrize("steps", [1, 0], ids=["with state", "fresh"])
async def test_an_optimizer_for_other_parameters_is_refused_untouched(root: Path, steps: int) -> None:
    run = TrainingRun(1, width=16)
    run.step(2)
    other = TrainingRun(2, width=24)
    other.step(steps)
    before = other.picture()
    async with CheckpointEngine(root) as engine:
        await saved(engine, run.state)
        with pytest.raises(IncompatibleStateError):
            await engine.load(other.state)
    assert_same(other.picture(), before)


# --- falling back over corrupt ones ---------------------------------------------------------------


def break_payload(directory: Path) -> None:
    (file,) = data_files(directory)
    flip(file, file.stat().st_size // 3)


def cut_data(directory: Path) -> None:
    (file,) = data_files(directory)
    os.truncate(file, file.stat().st_size // 2)


def drop_data(directory: Path) -> None:
    data_files(directory)[0].unlink()


def drop_manifest(directory: Path) -> None:
    manifest_file(directory).unlink()


def cut_metadata(directory: Path) -> None:
    path = directory / ".metadata"
    os.truncate(path, path.stat().st_size // 2)


def empty_metadata(directory: Path) -> None:
    os.truncate(directory / ".metadata", 0)


def flip_metadata(directory: Path) -> None:
    path = directory / ".metadata"
    flip(path, path.stat().st_size // 2)


def flip_manifest(directory: Path) -> None:
    path = manifest_file(directory)
    path.write_text(path.read_text().replace("torch", "t0rch", 1))


def cut_manifest(directory: Path) -> None:
    path = manifest_file(directory)
    os.truncate(path, path.stat().st_size - 3)


DAMAGES = [
    break_payload, cut_data, drop_data, drop_manifest, cut_manifest, flip_manifest,
    cut_metadata, empty_metadata, flip_metadata,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
async def test_latest_falls_back_over_a_corrupt_checkpoint(root: Path, damage: Any) -> None:
    old, new = TrainingRun(1, width=64), TrainingRun(2, width=64)
    old.step(1)
    new.step(2)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await saved(engine, old.state, step=1)
        await saved(engine, new.state, step=2)
        damage(root / "step-00000002")
        target = TrainingRun(3, width=64)
        report = await engine.load(target.state)
        assert (report.checkpoint_id, report.step, report.skipped) == ("step-00000001", 1, ("step-00000002",))
        assert_same(target.picture(), old.picture())
        assert_same(await engine.read(), old.picture())
        await saved(engine, new.state, step=3)
        assert_same(await engine.read(), new.picture())
    assert (root / "step-00000002" / ".metadata").exists()


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_corrupt_checkpoint_by_name_is_an_error(root: Path, damage: Any) -> None:
    run = TrainingRun(1, width=64)
    target = TrainingRun(2, width=64)
    before = target.picture()
    async with CheckpointEngine(root, staging=SMALL) as engine:
        info = await saved(engine, run.state, step=1)
        await saved(engine, run.state, step=2)
        damage(root / "step-00000001")
        for source in ("step-00000001", info):
            with pytest.raises(CorruptCheckpointError, match="step-00000001") as caught:
                await engine.load(target.state, source)
            assert caught.value.checkpoint_id == "step-00000001"
            assert damage is break_payload or not caught.value.partially_loaded
            if not caught.value.partially_loaded:
                assert_same(target.picture(), before)
            with pytest.raises(CorruptCheckpointError):
                await engine.read(source)
        await engine.load(target.state, 2)
        assert_same(target.picture(), run.picture())


async def test_a_bad_block_among_tensors_says_that_targets_were_touched(root: Path) -> None:
    async with CheckpointEngine(root, staging=SMALL) as engine:
        info = await saved(engine, {"x": torch.ones(300_000), "y": torch.ones(300_000)}, step=1)
        (file,) = data_files(root / info.checkpoint_id)
        flip(file, 1_800_000)
        with pytest.raises(CorruptCheckpointError) as caught:
            await engine.load({"x": torch.zeros(300_000), "y": torch.zeros(300_000)}, 1)
    assert caught.value.partially_loaded
    assert caught.value.tensors == ("y",)


async def test_when_all_are_corrupt_latest_says_so(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        for step in range(3):
            await saved(engine, {"a": A}, step=step)
            break_payload(root / f"step-{step:08d}")
        with pytest.raises(CorruptCheckpointError):
            await engine.load({"a": torch.zeros_like(A)})


async def test_latest_passes_over_several_corrupt_ones(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        for step in range(4):
            await saved(engine, {"a": A + step}, step=step)
        for step, damage in ((3, break_payload), (2, drop_data)):
            damage(root / f"step-{step:08d}")
        target = {"a": torch.zeros_like(A)}
        report = await engine.load(target)
    assert report.checkpoint_id == "step-00000001"
    assert report.skipped == tuple(report.skip_reasons) == ("step-00000003", "step-00000002")
    assert "do not match" in report.skip_reasons["step-00000003"]
    assert "No such file" in report.skip_reasons["step-00000002"]
    assert_same(target["a"], A + 1)


async def test_latest_does_not_fall_back_for_a_state_that_does_not_fit(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"a": A}, step=1)
        await saved(engine, {"a": B}, step=2)
        with pytest.raises(IncompatibleStateError):
            await engine.load({"a": torch.zeros_like(A)})


# --- atomic ---------------------------------------------------------------------------------------


async def test_no_tensor_keeps_bytes_of_a_corrupt_checkpoint_unreported(root: Path) -> None:
    """The older checkpoint lacks a tensor that the corrupt one has overwritten: not strict is no excuse."""
    wide = torch.arange(1 << 16, dtype=torch.float32)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"x": {"old": wide}}, step=1)
        await saved(engine, {"x": {"old": wide, "young": wide}}, step=2)
        break_payload(root / "step-00000002")
        target = {"x": {"old": torch.zeros(1 << 16), "young": torch.zeros(1 << 16)}}
        with pytest.raises(CorruptCheckpointError) as caught:
            await engine.load(target, strict=False)
    assert caught.value.partially_loaded
    assert "x.young" in str(caught.value)


async def test_an_atomic_load_of_a_bad_block_touches_nothing(root: Path) -> None:
    run, target = TrainingRun(1, width=64), TrainingRun(2, width=64)
    run.step(2)
    before = target.picture()
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await saved(engine, run.state, step=1)
        break_payload(root / "step-00000001")
        with pytest.raises(CorruptCheckpointError) as caught:
            await engine.load(target.state, 1, atomic=True)
        assert not caught.value.partially_loaded
    assert_same(target.picture(), before)


async def test_an_atomic_load_loads(root: Path) -> None:
    run, target = TrainingRun(1, width=64), TrainingRun(2, width=64)
    run.step(2)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await saved(engine, run.state)
        await engine.load(target.state, atomic=True)
    assert_same(target.picture(), run.picture())
