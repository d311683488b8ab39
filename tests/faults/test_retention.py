"""Retention in processes that are killed, and beside others that read: what must stay stays, what must go
goes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.harness import Nursery
from tests.support.doubles import assert_holds_only, whole_steps

SAVES = 5
MOST_CALLS = 70
"""About as many calls as five saves make that prune."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kills" in metafunc.fixturenames:
        metafunc.parametrize("kills", [metafunc.config.getoption("kills")])


def test_a_run_that_is_killed_while_it_prunes_loses_nothing_and_leaves_nothing(
    nursery: Nursery, root: Path, kills: int
) -> None:
    rng, durable, died = random.Random(20261129), 0, set()
    for _ in range(kills):
        child = nursery.start(
            "retain", root=root, first=durable + 1, count=SAVES, die_at=rng.randint(1, MOST_CALLS)
        )
        child.rest()
        child.wait()
        died |= {report["call"].split("'")[1] for report in child.said("dies")}
        durable = max([durable, *(report["step"] for report in child.said("durable"))])
        nursery.forget(child)
        steps = whole_steps(root)
        # the save that was killed may have been committed, and two are kept
        newest = max((step or 0 for step in steps), default=0)
        assert newest in (durable, durable + 1)
        assert steps[-2:] == [step for step in (newest - 1, newest) if step > 0]
        durable = newest
    nursery.run("retain", root=root, first=durable + 1, count=2)
    assert_holds_only(root, [f"step-{step:08d}" for step in (durable + 1, durable + 2)])
    assert {"unlink", "rename"} & died, died


def test_a_process_that_reads_is_never_in_want_of_a_file_that_another_one_prunes(
    nursery: Nursery, root: Path
) -> None:
    nursery.run("retain", root=root, first=1, count=1)
    reader = nursery.start("load_on", root=root)
    reading = reader.expect("reading")
    nursery.run("retain", root=root, first=2, count=20)
    names = [f"step-{step:08d}" for step in (1, 20, 21)]
    assert reading["name"] == names[0]
    assert_holds_only(root, names)
    reader.grant()
    (read,) = [report for report in reader.finish() if report["kind"] == "read"]
    assert read["digest"] == reading["digest"]
    assert read["loads"] >= read["steps"] >= 1
    nursery.run("retain", root=root, first=22, count=1)
    assert_holds_only(root, [f"step-{step:08d}" for step in (21, 22)])
