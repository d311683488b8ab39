"""Processes that are killed while they replicate: far has whole checkpoints only, and the next one goes on.

A moment is a call that changes something below the far root; `--kills N` says how many there are.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.harness import Nursery
from tests.support.doubles import assert_holds_only, whole_steps

SAVES = 2
MOST_CALLS = 44
"""About as many calls as the replication of so many saves makes."""
MOST_KILLS = 30


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kills" in metafunc.fixturenames:
        metafunc.parametrize("kills", [min(MOST_KILLS, metafunc.config.getoption("kills"))])


def test_a_replication_that_is_killed_leaves_whole_checkpoints_and_is_taken_up_again(
    nursery: Nursery, root: Path, kills: int
) -> None:
    rng, first, died = random.Random(20261129), 1, set()
    for _ in range(kills):
        child = nursery.start(
            "replicate", root=root, first=first, count=SAVES, die_at=rng.randint(1, MOST_CALLS)
        )
        child.rest()
        child.wait()
        died |= {report["call"].split("'")[1] for report in child.said("dies")}
        far = whole_steps(root / "far")
        assert {report["step"] for report in child.said("far")} <= set(far)
        nursery.forget(child)
        first = max([first, *(report["step"] + 1 for report in child.said("near"))])
    nursery.run("replicate", root=root, first=first, count=1)
    steps = list(range(1, first + 1))
    assert whole_steps(root / "far") == whole_steps(root / "near") == steps
    assert_holds_only(root / "far", [f"step-{step:08d}" for step in steps])
    assert len(died) > 1, died
