"""How a process ends that has a save pending: nothing is lost silently, nothing hangs, no error is masked.

The storage is held at its first write until the test (or the end of the main thread) lets it go on, so that
the save is pending at the moment in question without any timing.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.harness import Child, Nursery
from tests.faults.states import versions

LOOPS = ["asyncio", "uvloop"]
STYLES = ["one run", "two runs", "forgotten", "sync"]
HANG = 60.0
"""Seconds after which a process that should have ended counts as hung; the graces used here are far shorter.
"""


def committed(nursery: Nursery, root: Path, *, megabytes: float = 0.7) -> set[int]:
    """Steps on disk, each compared with what was saved."""
    left = nursery.run("inspect", root=root, kind="numbers", megabytes=megabytes)
    assert len(versions(left, megabytes=megabytes)) == len(left["found"])
    return {entry["step"] for entry in left["found"].values()}


def swept(nursery: Nursery, root: Path) -> list[str]:
    """What is left over after one more save by another process."""
    left: list[str] = nursery.run("inspect", root=root, kind="numbers", then_save=True)["swept"]["leftovers"]
    return left


def expect_all(child: Child, *kinds: str) -> None:
    """Waits for all of them, in whatever order they come."""
    for kind in kinds:
        if not child.said(kind):
            child.expect(kind)


def interrupt(child: Child) -> None:
    child.signal(signal.SIGINT)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("style", STYLES)
def test_engine_left_open_drains_and_ends_with_status_0(
    nursery: Nursery, root: Path, style: str, loop: str
) -> None:
    child = nursery.start("leave_open", root=root, style=style, loop=loop)
    child.finish(patience=HANG)
    assert child.said("atexit"), "handlers of the user's own must run"
    assert committed(nursery, root) == {0}
    assert swept(nursery, root) == []


def test_engine_left_open_in_a_fresh_interpreter_drains_and_ends_with_status_0(
    nursery: Nursery, root: Path
) -> None:
    nursery.start_script("leave_open", root=root, style="one run").finish(patience=HANG)
    assert committed(nursery, root) == {0}


@pytest.mark.parametrize("style", ["one run", "sync"])
def test_engine_left_open_with_two_saves_pending_drains_both(
    nursery: Nursery, root: Path, style: str
) -> None:
    nursery.start("leave_open", root=root, style=style, saves=2).finish(patience=HANG)
    assert committed(nursery, root) == {0, 1}


@pytest.mark.parametrize("style", ["one run", "sync"])
def test_engine_left_open_with_nothing_pending_ends_with_status_0(
    nursery: Nursery, root: Path, style: str
) -> None:
    nursery.start("leave_open", root=root, style=style, saves=0).finish(patience=HANG)


@pytest.mark.parametrize("style", ["two runs", "sync"])
@pytest.mark.parametrize(("ending", "status"), [("raises", 1), ("exits", 7)])
def test_engine_left_open_drains_and_keeps_status_when_main_thread_ends_otherwise(
    nursery: Nursery, root: Path, style: str, ending: str, status: int
) -> None:
    child = nursery.start("leave_open", root=root, style=style, ending=ending)
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) == status
    assert ("the trainer's own error" in child.stderr()) == (ending == "raises")
    assert committed(nursery, root) == {0}


def test_engine_left_open_over_stuck_storage_aborts_logs_and_ends_with_failure(
    nursery: Nursery, root: Path
) -> None:
    # All at once: each spends its time waiting.
    children = {
        f"{style}, {loop}": nursery.start(
            "leave_open",
            root=root / f"{style}, {loop}",
            style=style,
            loop=loop,
            hold="at the gate",
            exit_grace=0.5,
        )
        for style in STYLES
        for loop in LOOPS
    }
    for which, child in children.items():
        child.expect("main ends")
        child.rest(patience=HANG)
        assert child.wait(patience=HANG) > 0, f"a lost checkpoint must show in the status ({which})"
        assert "step-00000000" in child.stderr(), f"the log must name what was lost ({which})"
        assert committed(nursery, root / which) == set()
        assert swept(nursery, root / which) == []


@pytest.mark.parametrize("style", ["two runs", "sync"])
def test_engine_left_open_whose_save_fails_after_main_ends_logs_and_ends_with_failure(
    nursery: Nursery, root: Path, style: str
) -> None:
    child = nursery.start("leave_open", root=root, style=style, hold="fails after main's end")
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) > 0, "a lost checkpoint must show in the status"
    assert "step-00000000" in child.stderr()
    assert committed(nursery, root) == set()


@pytest.mark.parametrize("loop", LOOPS)
def test_block_left_by_error_drains_and_raises_that_error(nursery: Nursery, root: Path, loop: str) -> None:
    child = nursery.start("leave_block", root=root, way="raises", loop=loop)
    expect_all(child, "held", "saving")
    child.open_gate()
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) == 1
    assert child.said("left")[0]["type"] == "ValueError"
    assert child.said("left")[0]["text"] == "the trainer's own error"
    assert committed(nursery, root) == {1}


def test_block_left_by_error_raises_that_error_when_draining_fails_too(nursery: Nursery, root: Path) -> None:
    child = nursery.start("leave_block", root=root, way="raises", hold="refuses")
    child.expect("saving")
    child.open_gate()
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) == 1
    assert child.said("left")[0]["type"] == "ValueError"
    assert "step-00000001" in child.stderr(), "the lost save is logged at least"
    assert committed(nursery, root) == set()


def test_block_left_by_sys_exit_drains_and_keeps_the_status(nursery: Nursery, root: Path) -> None:
    child = nursery.start("leave_block", root=root, way="exits")
    child.expect("saving")
    child.open_gate()
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) == 7
    assert committed(nursery, root) == {1}


def interrupt_while_saving(child: Child) -> None:
    """Interrupts the block's save, which is held; the task of the block has been cancelled then."""
    expect_all(child, "held", "saving")
    interrupt(child)
    child.expect("cancelled")


@pytest.mark.parametrize("loop", LOOPS)
def test_block_left_by_one_interrupt_drains(nursery: Nursery, root: Path, loop: str) -> None:
    child = nursery.start("leave_block", root=root, way="interrupted", loop=loop)
    interrupt_while_saving(child)
    child.open_gate()
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) in (-signal.SIGINT, 130)
    assert child.said("left")[0]["type"] == "KeyboardInterrupt"
    assert committed(nursery, root) == {1}


def test_block_left_by_one_interrupt_aborts_after_the_grace_when_storage_is_stuck(
    nursery: Nursery, root: Path
) -> None:
    children = {
        loop: nursery.start("leave_block", root=root / loop, way="interrupted", loop=loop, exit_grace=0.5)
        for loop in LOOPS
    }
    for child in children.values():
        expect_all(child, "held", "saving")
        interrupt(child)
    for loop, child in children.items():
        child.expect("cancelled")
        child.rest(patience=HANG)
        assert child.wait(patience=HANG) != 0
        assert "step-00000001" in child.stderr(), "the log must name what was lost"
        assert committed(nursery, root / loop) == set()
        assert swept(nursery, root / loop) == []


@pytest.mark.parametrize("loop", LOOPS)
def test_block_left_by_two_interrupts_aborts_long_before_the_grace(
    nursery: Nursery, root: Path, loop: str
) -> None:
    # Storage makes progress, one write for each token, so only the abort can end the save early. The grace is
    # no help either: it outlasts the test.
    child = nursery.start("leave_block", root=root, way="interrupted", loop=loop, exit_grace=600.0)
    interrupt_while_saving(child)
    interrupt(child)
    child.expect("all cancelled")
    for _ in range(3):
        # Waits for the end of the process; a save of four parts that nobody aborts needs four tokens.
        if child.ended(within=0.5):
            break
        child.grant()
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) != 0
    assert committed(nursery, root) == set()
    assert swept(nursery, root) == []


def test_block_left_by_two_interrupts_ends_although_storage_is_stuck(nursery: Nursery, root: Path) -> None:
    child = nursery.start("leave_block", root=root, way="interrupted", exit_grace=1.0)
    interrupt_while_saving(child)
    interrupt(child)
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) != 0
    assert committed(nursery, root) == set()


def test_blocking_save_interrupted_leaves_no_checkpoint_of_that_name(nursery: Nursery, root: Path) -> None:
    child = nursery.start("interrupt_sync", root=root, where="save")
    expect_all(child, "held", "saving")
    interrupt(child)
    child.expect("signal")
    # save() may wait for the write that is under way, so the gate opens now.
    child.open_gate()
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) in (-signal.SIGINT, 130)
    assert not child.said("returned"), "save() waits for memory, so only an interrupt can end it"
    assert child.said("left")[0]["type"] == "KeyboardInterrupt"
    assert committed(nursery, root) == set()
    assert swept(nursery, root) == []


def test_blocking_wait_interrupted_leaves_the_save_alone_and_drains(nursery: Nursery, root: Path) -> None:
    child = nursery.start("interrupt_sync", root=root, where="result")
    child.expect("returned")
    interrupt(child)
    child.expect("interrupted")
    child.open_gate()
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) in (-signal.SIGINT, 130)
    assert child.said("left")[0]["type"] == "KeyboardInterrupt"
    assert committed(nursery, root, megabytes=8) == {1}


def test_blocking_block_left_by_interrupt_aborts_after_the_grace_when_storage_is_stuck(
    nursery: Nursery, root: Path
) -> None:
    child = nursery.start("interrupt_sync", root=root, where="result", exit_grace=0.5)
    child.expect("returned")
    interrupt(child)
    child.expect("interrupted")
    child.rest(patience=HANG)
    assert child.wait(patience=HANG) != 0
    assert committed(nursery, root) == set()
