"""Two processes save below one root at once: one wins a fresh name, the last wins a replaced one, nobody
harms the other.

Besides barriers there is a sweep of interleavings: one process is stopped before its k-th call (or lock), the
other one does its whole save, then the first goes on. `--kills N` looks at N + 3 of the k, 50 at all of them.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.faults.harness import Child, Nursery
from tests.faults.states import versions


def outcome(child: Child) -> str:
    child.finish()
    return str(child.said("outcome")[-1]["outcome"])


def points(nursery: Nursery, root: Path, kills: int, seed: str, /, **save: object) -> list[int]:
    """The k to look at: how many calls there are is learnt from an undisturbed save."""
    shutil.copytree(root / "base", root / "count")
    count = int(nursery.run("save", root=root / "count", **save)["count"])
    shutil.rmtree(root / "count")
    # Locks are stopping points too and are not in the count.
    every = list(range(1, count + 3))
    return every if kills >= 50 else sorted(random.Random(seed).sample(every, min(len(every), kills + 3)))


@pytest.mark.parametrize("meet_at", ["save", "publish"])
def test_one_of_two_writers_wins_when_both_save_a_fresh_name(
    nursery: Nursery, root: Path, meet_at: str
) -> None:
    for turn in range(3):
        here = root / str(turn)
        pair = [nursery.start("save", root=here, version=v, step=5, meet_at=meet_at) for v in (11, 22)]
        for child in pair:
            child.expect("paused")
        for child in pair if turn % 2 else reversed(pair):
            child.open_gate()
        outcomes = {11: outcome(pair[0]), 22: outcome(pair[1])}
        assert sorted(outcomes.values()) == ["committed", "exists"]
        left = nursery.run("inspect", root=here, kind="numbers", then_save=True)
        winner = next(version for version, how in outcomes.items() if how == "committed")
        assert versions(left) == {"step-00000005": winner}
        assert left["leftovers"] == [], "the loser takes its files with it"
        assert left["swept"]["leftovers"] == []


@pytest.mark.parametrize("meet_at", ["save", "publish"])
def test_last_of_two_writers_wins_when_both_replace(nursery: Nursery, root: Path, meet_at: str) -> None:
    for turn in range(3):
        here = root / str(turn)
        nursery.run("save", root=here, version=1, step=5)
        pair = [
            nursery.start("save", root=here, version=v, step=5, replace=True, meet_at=meet_at)
            for v in (11, 22)
        ]
        for child in pair:
            child.expect("paused")
        for child in pair if turn % 2 else reversed(pair):
            child.open_gate()
        assert [outcome(child) for child in pair] == ["committed", "committed"]
        left = nursery.run("inspect", root=here, kind="numbers", then_save=True)
        assert set(versions(left)) == {"step-00000005"}
        assert versions(left)["step-00000005"] in (11, 22)
        assert left["swept"]["leftovers"] == []


def overtake(
    nursery: Nursery, here: Path, at: int, *, step: int = 5, replace: bool = False
) -> tuple[dict[int, str], bool, str]:
    """One writer saves version 11 as step 5, and stops before its ``at``-th call until another one has saved
    version 22 as ``step``.

    Gives how each ended, whether the first had published when it stopped, and where that was.
    """
    first = nursery.start("save", root=here, version=11, step=5, replace=replace, pause_at=at)
    stopped = reach(first)
    published = bool(first.said("published"))
    second = outcome(nursery.start("save", root=here, version=22, step=step, replace=replace))
    first.open_gate()
    outcomes = {11: outcome(first), 22: second}
    return outcomes, published, f"first stopped at {stopped}: {first.said('outcome')}"


@pytest.mark.timeout(300)
def test_one_wins_a_fresh_name_when_the_other_is_stopped_at_any_call(
    nursery: Nursery, root: Path, kills: int
) -> None:
    (root / "base").mkdir()
    for at in points(nursery, root, kills, "fresh", version=11, step=5):
        here = root / str(at)
        outcomes, _, when = overtake(nursery, here, at)
        assert sorted(outcomes.values()) == ["committed", "exists"], when
        left = nursery.run("inspect", root=here, kind="numbers", then_save=True)
        assert outcomes[versions(left, when=when)["step-00000005"]] == "committed", when
        assert left["swept"]["leftovers"] == [], when
        nursery.end_children()
        shutil.rmtree(here)


@pytest.mark.timeout(300)
def test_last_wins_a_replaced_name_when_the_other_is_stopped_at_any_call(
    nursery: Nursery, root: Path, kills: int
) -> None:
    nursery.run("save", root=root / "base", version=1, step=5)
    for at in points(nursery, root, kills, "replace", version=11, step=5, replace=True):
        here = root / str(at)
        shutil.copytree(root / "base", here)
        outcomes, published, when = overtake(nursery, here, at, replace=True)
        assert outcomes == {11: "committed", 22: "committed"}, when
        left = nursery.run("inspect", root=here, kind="numbers", then_save=True)
        assert versions(left) == {"step-00000005": 22 if published else 11}, when
        assert left["swept"]["leftovers"] == [], when
        nursery.end_children()
        shutil.rmtree(here)


@pytest.mark.timeout(300)
def test_two_names_are_both_committed_when_one_writer_is_stopped_at_any_call(
    nursery: Nursery, root: Path, kills: int
) -> None:
    (root / "base").mkdir()
    for at in points(nursery, root, kills, "names", version=11, step=5):
        here = root / str(at)
        # The second one sweeps before its save, and must leave alone what the first is at.
        outcomes, _, when = overtake(nursery, here, at, step=6)
        assert outcomes == {11: "committed", 22: "committed"}, when
        left = nursery.run("inspect", root=here, kind="numbers")
        assert versions(left) == {"step-00000005": 11, "step-00000006": 22}, when
        assert left["leftovers"] == [], when
        nursery.end_children()
        shutil.rmtree(here)


def reach(child: Child) -> str:
    """Reads on until the child stops at its call; "the end" when its save has fewer calls than that."""
    while (report := child.next()) is not None:
        if report["kind"] == "paused":
            return str(report["call"])
    return "the end"
