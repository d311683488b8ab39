"""A save is killed at each of its file-system calls in turn: what was there before, or the new one, is always
whole.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Child, Nursery
from tests.faults.states import files_of, versions

MOST_CALLS = 400
"""A bound for the sweep; a save of four parts makes far fewer."""


def committed(child: Child) -> bool:
    return any(report.get("event") == "SaveCommitted" for report in child.heard)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One kill: before which call, what a fresh process reads then, what is left over after its save."""

    where: str
    left: dict[str, int]
    strays: list[str]
    files: dict[str, Any]
    """What each checkpoint has attached, and what lies beside its own files."""
    later_files: dict[str, Any]
    """The same after another save."""


def killed_at_each_call(
    nursery: Nursery,
    base: Path,
    work: Path,
    *,
    replace: bool,
    attach: bool = False,
    stride: int = 1,
    first: int = 1,
) -> list[Point]:
    """One point for each call (of every ``stride``-th from the ``first`` on), after the checks that hold for
    all."""

    def start(at: int) -> Child:
        shutil.copytree(base, work / str(at))
        step = 1 if replace else 2
        return nursery.start(
            "save", root=work / str(at), version=2, step=step, replace=replace, die_at=at, attach=attach
        )

    name = "step-00000001" if replace else "step-00000002"
    points = []
    following = start(first)
    for at in range(first, MOST_CALLS, stride):
        # The next save runs beside the inspection of this one.
        child, following = following, start(at + stride)
        child.rest()
        status = child.wait()
        where = child.said("dies")[-1]["call"] if child.said("dies") else "the end"
        assert status == (0 if where == "the end" else -9), f"status {status} at {where}\n{child.stderr()}"
        left = nursery.run("inspect", root=work / str(at), kind="numbers", then_save=True)
        before = versions(left, when=f"killed at {where}")
        after = versions(left["swept"], when=f"swept after a kill at {where}")
        assert after == before | {"step-00000900": 0}, f"a later save changed what was left at {where}"
        if committed(child):
            assert before[name] == 2, f"reported as committed, killed at {where}"
        points.append(
            Point(
                where=where,
                left=before,
                strays=left["swept"]["leftovers"],
                files=left["files"],
                later_files=left["swept"]["files"],
            )
        )
        nursery.forget(child)
        shutil.rmtree(work / str(at))
        if where == "the end":
            return points
    raise AssertionError("the save never came to its end")


@pytest.mark.timeout(300)
def test_fresh_save_killed_at_each_call_is_whole_or_absent(
    nursery: Nursery, root: Path, tell: Callable[[object], None]
) -> None:
    base, work = root / "base", root / "work"
    nursery.run("save", root=base, version=1, step=1)

    points = killed_at_each_call(nursery, base, work, replace=False)

    tell(f"killed at {len(points) - 1} calls")
    old, new = {"step-00000001": 1}, {"step-00000002": 2}
    for point in points:
        assert point.left in (old, old | new), point.where
    assert points[0].left == old
    assert points[-1].left == old | new
    assert {point.where: point.strays for point in points if point.strays} == {}


@pytest.mark.timeout(300)
def test_replacing_save_killed_at_each_call_leaves_old_or_new(
    nursery: Nursery, root: Path, tell: Callable[[object], None]
) -> None:
    base, work = root / "base", root / "work"
    nursery.run("save", root=base, version=1, step=1)
    # Files of an earlier replacement that died half-way: the sweep runs under fire too.
    half = nursery.start("save", root=base, version=7, step=1, replace=True, hold=True)
    half.expect("paused")
    half.kill()
    assert nursery.run("inspect", root=base, kind="numbers")["leftovers"] != []

    points = killed_at_each_call(nursery, base, work, replace=True)

    tell(f"killed at {len(points) - 1} calls")
    old, new = {"step-00000001": 1}, {"step-00000001": 2}
    for point in points:
        assert point.left in (old, new), point.where
    assert points[0].left == old
    assert points[-1].left == new
    assert {point.where: point.strays for point in points if point.strays} == {}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
def test_attached_files_are_those_of_the_checkpoint_wherever_a_save_is_killed(
    nursery: Nursery, root: Path, replace: bool, kills: int
) -> None:
    base, work = root / "base", root / "work"
    nursery.run("save", root=base, version=1, step=1, attach=True)
    stride = 1 if kills >= 50 else 9
    first = random.Random(kills + replace).randint(1, stride)

    points = killed_at_each_call(
        nursery, base, work, replace=replace, attach=True, stride=stride, first=first
    )

    assert points[-1].where == "the end"
    for point in points:
        for name, version in point.left.items():
            files = {name: str(content) for name, content in files_of(version).items()}
            assert point.files[name]["attached"] == files, point.where
            assert point.later_files[name] == {"attached": files, "by_name": files}, point.where
    assert {point.where: point.strays for point in points if point.strays} == {}


def save_together(nursery: Nursery, root: Path, *, victim: int, die_at: int, **args: object) -> list[Child]:
    """Two ranks, of which one is killed at its n-th call and the other one as soon as that is known, as
    launchers do. Gives the victim first."""
    first = nursery.start("save", root=root, world=2, die_at=die_at if victim == 0 else 0, **args)
    port = first.expect("serving")["port"]
    other = nursery.start(
        "save", root=root, world=2, rank=1, port=port, die_at=die_at if victim == 1 else 0, **args
    )
    ranks = [first, other] if victim == 0 else [other, first]
    ranks[0].rest()
    if ranks[0].wait() != 0:
        ranks[1].kill()
    ranks[1].rest()
    return ranks


TWO_RANKS = [
    pytest.param(True, 0, id="replace, rank 0"),
    pytest.param(True, 1, id="replace, rank 1", marks=pytest.mark.faults_session),
    pytest.param(False, 0, id="fresh, rank 0", marks=pytest.mark.faults_session),
    pytest.param(False, 1, id="fresh, rank 1", marks=pytest.mark.faults_session),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("replace", "victim"), TWO_RANKS)
def test_save_of_two_ranks_of_which_one_is_killed_at_each_call_leaves_old_or_new(
    nursery: Nursery, root: Path, replace: bool, victim: int, kills: int, tell: Callable[[object], None]
) -> None:
    base, step = root / "base", 1 if replace else 2
    save_together(nursery, base, victim=0, die_at=0, version=1, step=1)
    assert len(list(base.glob("step-00000001/*.distcp"))) == 2, "one rank has nothing to write"
    old, new = {"step-00000001": 1}, {f"step-{step:08d}": 2}
    stride = 1 if kills >= 50 else 9
    for at in range(random.Random(kills).randint(1, stride), MOST_CALLS, stride):
        work = root / str(at)
        shutil.copytree(base, work)
        ranks = save_together(nursery, work, victim=victim, die_at=at, version=2, step=step, replace=replace)
        status, dies = ranks[0].wait(), ranks[0].said("dies")
        where = dies[0]["call"] if dies else "the end"
        assert status == (-9 if dies else 0), f"status {status} at {where}\n{ranks[0].stderr()}"
        left = nursery.run("inspect", root=work, kind="numbers", then_save=True)
        found = versions(left, when=f"killed at {where}")
        assert found in (old, old | new), where
        if not dies or any(committed(rank) for rank in ranks):
            assert found == old | new, f"reported as committed, killed at {where}"
        later = versions(left["swept"], when=f"swept after a kill at {where}")
        assert later == found | {"step-00000900": 0}, f"a later save changed what was left at {where}"
        assert left["swept"]["leftovers"] == [], where
        for rank in ranks:
            nursery.forget(rank)
        shutil.rmtree(work)
        if not dies:
            tell(f"killed at {at - 1} calls")
            return
    raise AssertionError("the save never came to its end")


@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_save_with_error_at_each_call_fails_whole_and_next_save_works(
    nursery: Nursery, root: Path, error: str, replace: bool, kills: int
) -> None:
    # Fresh names pile up and are read again each time: by default every fourth call, others for each error.
    stride = 1 if replace or kills >= 50 else 4
    first = 1 + 2 * (error == "EIO")
    child = nursery.start("fail_calls", root=root, replace=replace, error=error, first=first, stride=stride)
    child.finish()

    where = {report["at"]: report["call"] for report in child.said("fails")}
    for point in child.said("point"):
        call = f"{error} at {where.get(point['at'])}: {point.get('chain')}"
        assert point["whole"], call
        steps = {int(step): label for step, label in point["content"].items()}
        new = f"'version {point['at']}'"
        if replace:
            assert steps.get(1) in (new, f"'version {point['old']}'"), call
        else:
            assert steps.get(point["step"], new) == new, call
            assert steps.get(1) == "'version 0'", call
        if not point["failed"]:
            assert steps.get(point["step"]) == new, call
    assert all(retry["same"] for retry in child.said("retried"))
    failures = [point["chain"] for point in child.said("point") if point["failed"]]
    assert failures, "no call failed a save"
    assert all(any(link["errno"] == error for link in chain) for chain in failures)
    assert child.said("done")[0]["leftovers"] == []
