"""SIGKILL at seeded moments of a running trainer: every life resumes bit for bit and loses at most the save
in flight.

`--kills N` kills in all, five to a run; each of the five strikes in another phase of the work, after an event
and a number of further reports (events, steps, file-system calls), so that the moment is counted in work done
and not in time.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.harness import Child, Nursery, Report

KILLS_PER_RUN = 5
PHASES = ("SaveStarted", "SaveStaged", "SaveProgress", "SaveCommitted", "opening")
STEPS = 80
"""More than the lives of one run can train before they are killed."""
Flat = dict[str, str]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" in metafunc.fixturenames:
        metafunc.parametrize("run", range(-(-metafunc.config.getoption("kills") // KILLS_PER_RUN)))


@pytest.fixture(scope="module")
def reference(zygote: Nursery) -> dict[int, Flat]:
    """What an uninterrupted run without checkpoints holds after each step."""
    child = zygote.start("reference", stop=STEPS)
    table = {report["step"]: report["found"] for report in child.finish()}
    zygote.forget(child)
    return table


def kill_in(child: Child, phase: str, rng: random.Random) -> None:
    """Lets the child reach a phase, then a seeded number of further reports, then kills it."""
    for _ in range(1 if phase == "opening" else rng.randint(1, 3)):
        while (report := child.next()) is not None and phase not in (report["kind"], report.get("event")):
            pass
    for _ in range(rng.randrange(24)):
        child.next()
    child.kill()
    child.rest()
    assert child.status == -9, f"ended by itself before the kill in {phase}\n{child.stderr()}"


def steps_of(child: Child, event: str) -> list[int]:
    return [report["step"] for report in child.said("event") if report["event"] == event]


def check_left(left: Report, child: Child, reference: dict[int, Flat], sure: int) -> int:
    """What one life left on disk against what it reported; returns the highest step that must never go away
    again.
    """
    on_disk = {entry["step"]: entry["found"] for entry in left["found"].values()}
    for step, found in on_disk.items():
        assert found == reference[step], f"step {step} is not what the trainer held"
    for name, found in left["stock"].items():
        assert found == reference[left["found"][name]["step"]], f"stock DCP reads something else from {name}"
    assert set(left["stock"]) == set(left["found"])
    committed = steps_of(child, "SaveCommitted")
    assert set(committed) <= set(on_disk), "a save was reported as committed and is not there"
    # One save may be pending, so save(n) returns only after save(n - 1) is durable.
    returned = [report["step"] - 1 for report in child.said("returned") if report["step"] > 0]
    sure = max([sure, *committed, *returned])
    assert left["latest_step"] == max(on_disk, default=None)
    assert sure <= max(on_disk, default=-1), "more than the save in flight is lost"
    return max(sure, max(on_disk, default=-1))


def test_trainer_resumes_bit_identical_after_kills_in_every_phase(
    run: int, kills: int, nursery: Nursery, root: Path, reference: dict[int, Flat]
) -> None:
    rng = random.Random(f"run {run}")
    sure = -1
    strays: set[str] = set()
    for number in range(min(KILLS_PER_RUN, kills - run * KILLS_PER_RUN)):
        child = nursery.start("train", root=root, stop=STEPS)
        kill_in(child, PHASES[number], rng)
        for resumed in child.said("resumed"):
            assert resumed["step"] == sure
            assert resumed["found"] == reference[sure], "the trainer resumed from something else"
        left = nursery.run("inspect", root=root, kind="trainer")
        sure = check_left(left, child, reference, sure)
        if steps_of(child, "SaveCommitted"):
            assert not strays & set(left["leftovers"]), "an older life's files outlived a save"
        strays = set(left["leftovers"])
        nursery.forget(child)

    # The last life is a new interpreter, as after a real crash, and lives to its end.
    last = nursery.start_script("train", root=root, stop=sure + 3)
    last.finish()
    assert [report["step"] for report in last.said("resumed")] == ([sure] if sure >= 0 else [])
    left = nursery.run("inspect", root=root, kind="trainer")
    assert check_left(left, last, reference, sure) == sure + 2
    assert left["leftovers"] == []
