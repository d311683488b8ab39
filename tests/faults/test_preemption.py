"""SIGTERM at seeded moments of a running trainer, on one rank and on four: each run ends with a checkpoint of
the step that all its ranks were told, or with the error that says why not.

`--preemptions N` runs on each. A moment is counted in what the trainer reports, steps and events of its
saves, so that it lies within a step, a save or a commit whatever the machine is busy with. Half of the runs
get a second signal; of several ranks one gets it, or all.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import dcp_async.sync
from tests.faults.harness import PATIENCE, Child, Nursery, Report
from tests.faults.preemption_job import ELEMENTS, POLICIES

GRACE = 5.0
TWINS = ("sync", "asyncio", "uvloop")
NUM_RANKS = 4

pytestmark = pytest.mark.timeout(3600)  # all runs of one number of ranks are one test


def start(nursery: Nursery, root: Path, world: int, seed: int, rng: random.Random) -> list[Child]:
    """One process a rank, each of which trains."""
    arguments = {
        "root": root,
        "world": world,
        "seed": seed,
        "grace": GRACE,
        "twin": rng.choice(TWINS),
        "policy": rng.choice(list(POLICIES)),
        "joint": rng.random() < 0.5,
    }
    port, children = 0, []
    for rank in range(world):
        children.append(nursery.start("preempt", rank=rank, port=port, **arguments))
        if world > 1 and rank == 0:
            port = children[0].expect("serving")["port"]
    for child in children:
        child.expect("training")
    return children


def strike(children: Sequence[Child], rng: random.Random) -> None:
    """SIGTERM to one rank after some of its reports, or to all; perhaps once more."""
    witness = rng.choice(children)
    for _ in range(rng.randrange(60)):
        witness.next()
    targets = [witness] if rng.random() < 0.5 else children
    for child in targets:
        child.signal(signal.SIGTERM)
    if rng.random() < 0.5:
        for _ in range(rng.randrange(8)):
            if witness.next() is None:
                return
        for child in targets:
            if not child.ended(within=0):
                child.signal(signal.SIGTERM)


def check(root: Path, ends: Sequence[Report]) -> bool:
    """Whether the run ended with its checkpoint; fails where it did with neither that nor an error."""
    errors = [end["error"] for end in ends]
    told = {tuple(end["told"]) for end in ends}
    if any(error is not None for error in errors):
        for error in errors:
            assert error is None or ("SIGTERM" in error or "step" in error), errors
        return False
    assert len(told) == 1, f"ranks were told different steps: {told}"
    ((step,),) = told
    with dcp_async.sync.CheckpointEngine(root) as engine:
        newest = engine.latest()
        assert newest is not None
        assert newest.step == step
        found = engine.read()
    assert found["step"] == step
    assert found["weights"].unique().tolist() == [float(step)]
    assert found["weights"].shape == (ELEMENTS,)
    return True


@pytest.mark.parametrize("world", [1, NUM_RANKS])
def test_each_preempted_run_ends_with_its_checkpoint_or_says_why_not(
    world: int,
    request: pytest.FixtureRequest,
    nursery: Nursery,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = request.config.getoption("--preemptions")
    assert isinstance(wanted, int)
    # four interpreters a run: in the sample, one run of them
    num_runs = wanted if world == 1 or wanted >= 20 else 1
    num_saved = 0
    reasons: list[str] = []
    for seed in range(num_runs):
        rng = random.Random(f"{world} ranks, run {seed}")
        root = tmp_path / f"run-{seed}"
        children = start(nursery, root, world, seed, rng)
        strike(children, rng)
        for child in children:
            child.finish()
        ends = [child.said("ended")[-1] for child in children]
        if check(root, ends):
            num_saved += 1
        else:
            reasons += [f"run {seed}: {end['error']}" for end in ends if end["error"] is not None]
        for child in children:
            nursery.forget(child)
    with capsys.disabled():
        told = f"{world} ranks: {num_saved} of {num_runs} preempted runs ended with their checkpoint"
        sys.stdout.write("\n".join(["", told, *reasons, ""]))
    assert num_saved > 0.5 * num_runs, reasons


def stop(child: Child) -> None:
    """SIGSTOP, until none of its threads runs: the one that takes the signal may wait for a processor."""
    child.signal(signal.SIGSTOP)
    deadline = time.monotonic() + PATIENCE
    threads = Path(f"/proc/{child.pid}/task")
    while any((each / "stat").read_text().rpartition(")")[2].split()[0] != "T" for each in threads.iterdir()):
        assert time.monotonic() < deadline, "it does not stop"
        os.sched_yield()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_does_not_answer_is_named_when_the_grace_is_over(
    stopped: int, nursery: Nursery, tmp_path: Path
) -> None:
    """The coordinator, which is rank 0, or the other one stands still, and no trainer waits for another."""
    arguments = {"root": tmp_path / "run", "world": 2, "seed": 0, "twin": "sync", "policy": "none"}
    more = {**arguments, "grace": 0.2, "joint": False}
    first = nursery.start("preempt", rank=0, port=0, **more)
    children = [first, nursery.start("preempt", rank=1, port=first.expect("serving")["port"], **more)]
    for child in children:
        child.expect("training")
    asked = children[1 - stopped]
    stop(children[stopped])
    asked.signal(signal.SIGTERM)
    error = asked.expect("ended")["error"]
    children[stopped].signal(signal.SIGCONT)
    children[stopped].signal(signal.SIGTERM)
    for child in children:
        child.finish()
    assert f"rank {1 - stopped} received SIGTERM, and no step to save at could be agreed on" in error
    expected = ("coordinating rank", "rank 0") if stopped == 0 else ("rank 1 did not tell within 0.2 s",)
    assert any(part in error for part in expected), error
