"""Power loss at every moment of a save, a replacement, a removal: all that a medium may have lost by then is
lost, and what is left is whole, and holds what was reported as durable.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcp_async import sync
from tests.faults.harness import Nursery
from tests.faults.jobs import STEPS_OF_ANOTHER, leftovers
from tests.faults.mounts import image_of, mounted_image, small_ext4
from tests.faults.power import CrashState, Medium, tree_of
from tests.faults.states import files_of, flat, numbers

SAMPLE = 16
"""About how many states of each kind are looked at where --kills is small; all of them else."""
SUBSETS = 1000
Found = dict[str, int]
"""Checkpoint -> version of what it holds."""
BOTH = pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])


def versions_in(engine: sync.CheckpointEngine, root: Path, wanted: dict[int, Any], where: str) -> Found:
    """What is committed, every leaf of it compared."""
    found = {}
    for info in engine.checkpoints():
        leaves = flat(engine.read(info))
        version = int(leaves["/'label'"].strip("'").split()[1])
        assert leaves == wanted[version], f"{info.checkpoint_id} is not what was saved: {where}"
        with engine.checkpoint(info) as checkpoint:
            attached = {name: bytes(checkpoint.file(name)) for name in checkpoint.files}
        assert attached in ({}, files_of(version)), f"{info.checkpoint_id} has other files: {where}"
        found[info.checkpoint_id] = version
    published = {path.parent.name for path in root.glob("*/.metadata")}
    assert published == set(found), f"a .metadata that is no checkpoint: {where}"
    return found


def look_at(
    medium: Medium, work: Path, kills: int, judge: Callable[[CrashState, Found], None]
) -> Counter[str]:
    """Looks at what is left in each state, saves once more, and looks again. Gives what there was to see."""
    rng = random.Random(f"power {kills}")
    # at every moment some of the subsets: 1,000 in all
    moments = len(medium.ops)
    states = list(medium.states(rng, subsets=SUBSETS // moments + 1 if kills >= 50 else 4))
    # evenly over the time, and always the last: how many states there are differs from run to run
    chosen = states if kills >= 50 else states[:: -max(1, len(states) // SAMPLE)]
    wanted = {version: flat(numbers(version)) for version in range(9)}
    counts: Counter[str] = Counter({"crash states": len(states), "looked at": len(chosen)})
    for state in chosen:
        root = state.lay_out(work)
        with sync.CheckpointEngine(root) as engine:
            found = versions_in(engine, root, wanted, state.where)
            judge(state, found)
            counts[str(found)] += 1
            engine.save(numbers(0), step=STEPS_OF_ANOTHER).upload_completion.result()
            later = versions_in(engine, root, wanted, f"{state.where}, after another save")
        assert later == found | {f"step-{STEPS_OF_ANOTHER:08d}": 0}, state.where
        assert leftovers(str(root)) == [], state.where
        shutil.rmtree(root)
    return counts


@BOTH
@pytest.mark.parametrize(
    "attach", [False, pytest.param(True, marks=pytest.mark.faults_session)], ids=["plain", "attached files"]
)
@pytest.mark.timeout(300)
def test_power_loss_in_a_save_leaves_the_old_one_or_the_new_one(
    nursery: Nursery,
    root: Path,
    tmp_path: Path,
    replace: bool,
    attach: bool,
    kills: int,
    tell: Callable[[object], None],
) -> None:
    nursery.run("save", root=root, version=1, step=1, attach=attach)
    before = tree_of(root)
    step, trace = 1 if replace else 2, tmp_path / "trace"
    nursery.run("save", root=root, version=2, step=step, replace=replace, trace=trace, attach=attach)
    old, new = {"step-00000001": 1}, {f"step-{step:08d}": 2}

    def judge(state: CrashState, found: Found) -> None:
        assert found in (old, old | new), state.where
        assert not state.durable or found == old | new, f"it was reported as durable: {state.where}"

    counts = look_at(Medium(root, before, trace), tmp_path / "work", kills, judge)

    tell(dict(counts))
    assert counts[str(old)] >= 1
    assert counts[str(old | new)] >= 1


@pytest.mark.timeout(300)
def test_power_loss_while_retention_removes_takes_nothing_that_is_kept(
    nursery: Nursery, root: Path, tmp_path: Path, kills: int, tell: Callable[[object], None]
) -> None:
    nursery.run("retain", root=root, first=1, count=2)
    before, trace = tree_of(root), tmp_path / "trace"
    nursery.run("retain", root=root, first=3, count=2, trace=trace)

    def judge(state: CrashState, found: Found) -> None:
        durable = state.durable or 2
        kept = {f"step-{step:08d}": step for step in (durable - 1, durable)}
        assert found.items() >= kept.items(), f"it was to be kept: {state.where}"
        assert max(found.values()) <= durable + 1, state.where

    counts = look_at(Medium(root, before, trace), tmp_path / "work", kills, judge)

    tell(dict(counts))
    assert len(counts) >= 5, "hardly anything was removed"


@BOTH
@pytest.mark.faults_session
@pytest.mark.timeout(600)
def test_ext4_that_loses_power_before_any_call_of_a_save_has_the_old_one_or_the_new_one(
    nursery: Nursery, tmp_path: Path, replace: bool, tell: Callable[[object], None]
) -> None:
    disk, copy, after = tmp_path / "disk", tmp_path / "copy.image", tmp_path / "after"
    disk.mkdir()
    after.mkdir()
    step, wanted = 1 if replace else 2, {version: flat(numbers(version)) for version in range(3)}
    old, new = {"step-00000001": 1}, {f"step-{step:08d}": 2}
    counts: Counter[str] = Counter()
    with small_ext4(disk, 32 << 20) as mounted:
        if not mounted:
            pytest.skip("no ext4 can be mounted here; the model of a medium stands for it")
        nursery.run("save", root=disk / "run", version=1, step=1)
        os.sync()
        child = nursery.start("save", root=disk / "run", version=2, step=step, replace=replace, halt=True)
        while (report := child.next()) is not None:
            if report["kind"] != "paused":
                continue
            # whatever the kernel has not yet sent to the device is lost, as if the power went now
            shutil.copyfile(image_of(disk), copy)
            committed = any(heard.get("event") == "SaveCommitted" for heard in child.heard)
            child.grant()
            with mounted_image(copy, after) as is_whole:
                assert is_whole, f"no file system any more: cut before {report['call']}"
                with sync.CheckpointEngine(after / "run") as engine:
                    found = versions_in(engine, after / "run", wanted, report["call"])
                    assert found in (old, old | new), report["call"]
                    assert not committed or found == old | new, f"was durable: {report['call']}"
                    engine.save(numbers(0), step=STEPS_OF_ANOTHER).upload_completion.result()
                assert leftovers(str(after / "run")) == [], report["call"]
            counts[str(found)] += 1
        assert child.wait() == 0, child.stderr()
    copy.unlink()
    tell(f"power cut before {counts.total()} calls: {dict(counts)}")
    assert counts[str(old)] >= 5
    assert counts[str(old | new)] >= 1
