"""Saves on a medium that fails at random: what said committed is there bit for bit, what failed is not."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Nursery, Report

SAMPLE, ALL = 15, 200


def check(told: list[Report], left: Report) -> Counter[str]:
    """Whether what each save told is true. Gives how often each way of failing came up."""
    shown: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for save in told:
        name, label = save["id"], f"'version {save['version']}'"
        counts[save["outcome"]] += 1
        if save["outcome"] == "committed":
            shown[name] = {label}
        else:
            counts[f"failed by {save['fault']}"] += 1
            if save["replace"] and save["is_too_late"]:
                # what it overwrote can't come back when the directory can't be synced
                shown[name] = shown.get(name, set()) | {label}
    healthy = f"step-{len(told) + 1:08d}"
    shown[healthy] = {"'version 0'"}
    assert left["whole"], left
    assert set(left["found"]) == set(shown), "a save that failed is visible, or a committed one is not"
    for name, label in left["found"].items():
        assert label in shown[name], f"{name} holds {label}, not one of {shown[name]}"
    assert left["leftovers"] == []
    return counts


@pytest.mark.timeout(600)
def test_saves_with_random_faults_are_committed_or_not_there(
    nursery: Nursery, root: Path, kills: int, tell: Callable[[object], None]
) -> None:
    saves = ALL if kills >= 50 else SAMPLE
    child = nursery.start("save_with_faults", root=root, saves=saves, seed=20261129)
    child.finish(patience=300)

    counts = check(child.said("saved"), child.said("left")[0])

    tell(dict(counts))
    assert counts["committed"] >= (30 if saves == ALL else 3)
    assert counts["failed"] >= (30 if saves == ALL else 3)


@contextlib.contextmanager
def failing_calls(pid: int, error: str, when: str) -> Iterator[None]:
    """Has some calls of the process fail in the system, until the end of the block."""
    calls = "pwrite64,fsync,link,linkat,rename,renameat,mkdir,mkdirat,ftruncate"
    inject = f"inject={calls}:error={error}:when={when}"
    command = ["strace", "-f", "-e", "signal=none", "-e", f"trace={calls}", "-e", inject, "-o", os.devnull]
    tracer = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr is not None
        if " attached" not in (said := tracer.stderr.readline()):
            pytest.skip(f"strace can't attach here ({said.strip()}); errors raised in Python stand for it")
        yield
    finally:
        tracer.send_signal(signal.SIGINT)  # it lets go of the process
        tracer.communicate(timeout=60)


@pytest.mark.faults_session
@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace; errors raised in Python stand for it")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("when", ["3+7", "5+11", "9+13"])
def test_saves_whose_calls_fail_in_the_system_are_committed_or_not_there(
    nursery: Nursery, root: Path, error: str, when: str, tell: Callable[[object], None]
) -> None:
    child = nursery.start("save_with_faults", root=root, saves=35, seed=len(when), is_real=True)
    child.expect("turn")
    with failing_calls(child.pid, error, when):
        child.grant()
        child.expect("turn", patience=300)
    child.grant()
    child.finish()

    counts = check(child.said("saved"), child.said("left")[0])

    tell(dict(counts))
    assert counts["committed"] >= 3
    assert counts["failed"] >= 3
