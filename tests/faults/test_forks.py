"""A process forks while an engine is open: the child finds a dead engine, the parent's save and lease are
untouched.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import Nursery
from tests.faults.states import versions


def only_step_1(nursery: Nursery, root: Path) -> None:
    left = nursery.run("inspect", root=root, kind="numbers")
    assert versions(left) == {"step-00000001": 1}
    assert left["leftovers"] == []


@pytest.mark.parametrize("twin", ["async", "sync"])
def test_forked_child_finds_a_dead_engine_and_does_the_parent_no_harm(
    nursery: Nursery, root: Path, twin: str
) -> None:
    parents = {
        closing: nursery.start("fork_with_engine", root=root / closing, twin=twin, closing=closing)
        for closing in ("close", "abort", "_exit", "collected")
    }
    for closing, parent in parents.items():
        reaped = parent.expect("child reaped")
        tried = {report["verb"]: report["outcome"] for report in parent.said("child")}
        assert len(tried) >= 6
        assert set(tried.values()) == {"EngineStateError"}, tried
        # Whether closing a dead engine is an error is not said; it must end, and so must the child, in order.
        if closing in ("close", "abort"):
            assert parent.said("child closed")[0]["outcome"] in ("EngineStateError", "returned")
        assert reaped["status"] == 0, f"{closing}: {parent.stderr()}"

        # Another process sweeps while the parent's save is held: the child's end must not free the lease.
        sweeper = nursery.start("save", root=root / closing, version=2, step=2)
        sweeper.finish()
        assert sweeper.said("outcome")[0]["outcome"] == "committed"
        parent.open_gate()
        parent.finish()
        left = nursery.run("inspect", root=root / closing, kind="numbers")
        assert versions(left) == {"step-00000001": 1, "step-00000002": 2}
        assert left["leftovers"] == []


def test_forked_child_that_leaves_the_block_does_the_parent_no_harm(nursery: Nursery, root: Path) -> None:
    parent = nursery.start("fork_in_block", root=root)
    assert parent.expect("child reaped")["status"] == 0, parent.stderr()
    assert parent.said("child left")
    parent.open_gate()
    parent.finish()
    only_step_1(nursery, root)


@pytest.mark.parametrize("how", ["fork", "exec", "fork while locking"])
def test_lease_is_free_when_the_parent_is_killed_and_its_child_lives_on(
    nursery: Nursery, root: Path, how: str
) -> None:
    parent = nursery.start("leave_child_behind", root=root, how=how)
    parent.expect("forked")
    if not parent.said("held"):
        parent.expect("held")
    while not parent.said("survivor"):
        assert parent.next() is not None
    parent.kill()
    before = nursery.run("inspect", root=root, kind="numbers", then_save=True)
    assert any(name.endswith(".distcp") or "lease" in name for name in before["leftovers"])
    assert before["swept"]["leftovers"] == []
    survivor = parent.said("survivor")[0]["pid"]
    assert Path(f"/proc/{survivor}").exists(), "the child has to outlive all this, or nothing is shown"


@pytest.mark.parametrize("rounds", [4])
def test_saves_are_bit_exact_while_data_loaders_fork(nursery: Nursery, root: Path, rounds: int) -> None:
    child = nursery.start("load_data_while_saving", root=root, rounds=rounds)
    child.finish()
    expected = float(sum(256 * index**2 for index in range(64)))
    assert [report["total"] for report in child.said("round")] == [expected] * rounds
    assert all(report["pending"] for report in child.said("first batch") if report["step"] % 2)
    assert [report["same"] for report in child.said("checked")] == [True] * rounds
