"""A file-system call hangs past `Timeouts.storage` and returns late: the save has failed, and stays failed.

What the late call does to the disk must not make the name half a checkpoint, nor harm the one that was there.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.faults.harness import Child, Nursery
from tests.faults.states import versions

TOGETHER = 8
"""Processes that wait at once."""
QUIET = 0.1
"""Seconds without a report after which whatever went on beside the call has probably ended."""
SILENT = 1.0
"""Seconds without a report after which no outcome is expected any more."""


@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
@pytest.mark.timeout(300)
def test_save_whose_call_returns_too_late_leaves_old_or_new(
    nursery: Nursery, root: Path, replace: bool, kills: int
) -> None:
    nursery.run("save", root=root / "base", version=1, step=5)
    shutil.copytree(root / "base", root / "count")
    step, name = (5, "step-00000005") if replace else (6, "step-00000006")
    save = {"version": 2, "step": step, "replace": replace}
    count = nursery.run("save", root=root / "count", **save)["count"]
    every = range(1, count + 1)
    # Publishing is where a late call does most harm: the last calls are always looked at.
    some = set(random.Random(f"stuck {replace}").sample(every, min(count, kills))) | set(every[-8:])
    points = list(every) if kills >= 50 else sorted(some)
    outcomes = set()
    for start in range(0, len(points), TOGETHER):
        children = {}
        for at in points[start : start + TOGETHER]:
            shutil.copytree(root / "base", root / str(at))
            children[at] = nursery.start("save", root=root / str(at), pause_at=at, is_late=True, **save)
        for child in children.values():
            child.expect("paused")
            while not child.silent(within=QUIET):
                child.next()
            child.grant()
        for at, child in children.items():
            outcomes.add(check_late_return(nursery, child, root / str(at), name, replace))
            shutil.rmtree(root / str(at))
    assert "failed" in outcomes, "no deadline has passed"


def check_late_return(nursery: Nursery, child: Child, here: Path, name: str, replace: bool) -> str:
    """The outcome of its save."""
    stopped = child.said("paused")[0]["call"]
    # Nobody can take back a link that the kernel carries out late; before it, a save can still stop.
    beyond_recall = bool(child.said("published")) or "/.metadata'" in stopped
    # A call inside open() or close() may hang there without an outcome of its own.
    while not (child.said("outcome") or child.ended(within=0.0)) and not child.silent(within=SILENT):
        child.next()
    child.open_gate()
    child.rest()
    child.wait()
    outcome = child.said("outcome")[-1]["outcome"] if child.said("outcome") else "none"
    left = nursery.run("inspect", root=here, kind="numbers", then_save=True)
    where = f"{outcome} after a late {stopped}"
    found = versions(left, when=where)
    if replace:
        assert found in ({name: 1}, {name: 2}), where
    else:
        assert found in ({"step-00000005": 1}, {"step-00000005": 1, name: 2}), where
    if outcome == "committed":
        assert found[name] == 2, where
    elif outcome == "failed" and not replace and not beyond_recall:
        assert name not in found, f"a failed save appeared: {where}"
    assert left["swept"]["leftovers"] == [], where
    nursery.forget(child)
    return str(outcome)


@pytest.mark.parametrize("style", ["one run", "sync"])
def test_save_returns_while_the_uploads_of_two_others_are_stuck(
    nursery: Nursery, root: Path, style: str
) -> None:
    # Three may be pending and the budget holds three states, so nothing has to wait for the disk.
    child = nursery.start("leave_open", root=root, style=style, saves=3, hold="at the gate", exit_grace=600.0)
    child.expect("main ends")
    child.open_gate()
    child.finish()
    left = nursery.run("inspect", root=root, kind="numbers")
    assert versions(left) == {f"step-{step:08}": step for step in range(3)}
