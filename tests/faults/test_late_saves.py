"""A save that comes while the process ends is durable, or the process ends with a status that is not 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import Nursery
from tests.faults.states import versions

HANG = 30.0
OPEN_ENGINES = [
    "atexit, registered before open",
    "atexit, registered after open",
    "atexit, after sys.exit",
    "atexit of threading",
    "non-daemon thread",
]
NEW_ENGINES = ["engine made in atexit", "engine made in atexit and left open"]


def steps(nursery: Nursery, root: Path) -> set[int]:
    left = nursery.run("inspect", root=root, kind="numbers")
    assert len(versions(left)) == len(left["found"])
    return {entry["step"] for entry in left["found"].values()}


@pytest.mark.parametrize("style", ["sync", "async"])
@pytest.mark.parametrize("when", OPEN_ENGINES)
def test_a_late_save_is_durable(nursery: Nursery, root: Path, when: str, style: str) -> None:
    child = nursery.start("save_late", root=root, when=when, style=style)
    child.finish(patience=HANG)
    assert child.said("saved")
    assert steps(nursery, root) == {0, 1}


@pytest.mark.parametrize("when", NEW_ENGINES)
def test_an_engine_that_is_made_late_saves(nursery: Nursery, root: Path, when: str) -> None:
    child = nursery.start("save_late", root=root, when=when)
    child.rest(patience=HANG)
    if child.wait(patience=HANG) == 0:
        assert steps(nursery, root) == {1}
    else:  # a Python that starts no thread at that time
        assert "lost" in child.stderr()


@pytest.mark.parametrize("when", OPEN_ENGINES)
def test_a_late_save_that_fails_shows_in_the_status(nursery: Nursery, root: Path, when: str) -> None:
    child = nursery.start("save_late", root=root, when=when, fails=True)
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) > 0
    assert "step-00000001" in child.stderr()
    assert steps(nursery, root) == {0}


def test_a_save_of_what_the_interpreter_takes_down_shows_in_the_status(nursery: Nursery, root: Path) -> None:
    child = nursery.start_script("save_late", root=root, when="__del__", catches=True)
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) > 0
    assert "lost" in child.stderr()
    assert steps(nursery, root) == {0}


@pytest.mark.parametrize("fails", [False, True])
def test_a_child_of_multiprocessing_that_leaves_its_engine_open_is_no_exception(
    nursery: Nursery, root: Path, fails: bool
) -> None:
    left = nursery.run("save_in_child", root=root, fails=fails)
    assert (left["status"] != 0) == fails
    assert steps(nursery, root) == (set() if fails else {0})
