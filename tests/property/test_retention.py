"""Retention policies are functions of a list: what they keep, whatever its order and however often asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_async import KeepBest, KeepEvery, KeepLatest, Retention, plan_retention
from dcp_async.catalog import CheckpointRecord
from dcp_async.info import Producer


@dataclass(frozen=True)
class Saved:
    step: int | None
    time: float = 0.0
    notes: Mapping[str, Any] = field(default_factory=dict)
    producer: Producer = "dcp_async"

    @property
    def checkpoint_id(self) -> str:
        return f"step-{self.step}" if self.step is not None else f"at-{self.time}"


def _saved(step: int | None, time: float, loss: Any) -> Saved:
    return Saved(step, time, {} if loss == "none" else {"loss": loss})


LOSSES = st.one_of(
    st.just("none"), st.integers(-3, 3), st.floats(allow_nan=True), st.booleans(), st.text(max_size=2)
)
RUNS = st.lists(
    st.builds(_saved, st.none() | st.integers(0, 300), st.floats(0, 1000), LOSSES),
    max_size=25,
    unique_by=lambda saved: saved.checkpoint_id,
)
"""Checkpoints in any order."""
SERIES = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 100), LOSSES), max_size=25)
"""How far each save was from the one before."""
COUNTS = st.integers(1, 4)
POLICIES = st.lists(
    st.one_of(
        st.builds(KeepLatest, COUNTS),
        st.builds(KeepEvery, steps=st.integers(1, 100)),
        st.builds(KeepEvery, seconds=st.floats(0.5, 300)),
        st.builds(KeepEvery, steps=st.integers(1, 100), seconds=st.integers(1, 300)),
        st.builds(KeepBest, st.just("loss"), COUNTS, mode=st.sampled_from(["min", "max"])),
    ),
    min_size=1,
    max_size=3,
).map(lambda parts: _joined(parts))


def _joined(parts: Sequence[Retention]) -> Retention:
    policy = parts[0]
    for part in parts[1:]:
        policy |= part
    return policy


def kept(run: Iterable[CheckpointRecord], policy: Retention) -> set[str]:
    return set(plan_retention(run, policy).kept)


@given(RUNS, POLICIES)
def test_each_checkpoint_either_stays_for_a_reason_or_goes(run: list[Saved], policy: Retention) -> None:
    plan = plan_retention(run, policy)
    assert sorted([*plan.kept, *plan.removed]) == sorted(saved.checkpoint_id for saved in run)
    assert all(plan.kept.values())


@given(RUNS, POLICIES)
def test_the_newest_and_those_without_a_step_stay(run: list[Saved], policy: Retention) -> None:
    staying = {saved.checkpoint_id for saved in run if saved.step is None}
    with_step = [saved for saved in run if saved.step is not None]
    if with_step:
        staying.add(max(with_step, key=lambda saved: saved.step or 0).checkpoint_id)
    assert staying <= kept(run, policy)


@given(RUNS, POLICIES, st.randoms())
def test_the_order_of_the_list_does_not_matter(run: list[Saved], policy: Retention, random: Any) -> None:
    shuffled = random.sample(run, len(run))
    assert plan_retention(shuffled, policy) == plan_retention(run, policy)


@given(RUNS, POLICIES)
def test_what_stays_stays_once_the_others_are_gone(run: list[Saved], policy: Retention) -> None:
    staying = kept(run, policy)
    left = [saved for saved in run if saved.checkpoint_id in staying]
    assert plan_retention(left, policy).removed == ()


@given(RUNS, POLICIES, POLICIES)
def test_joined_policies_keep_what_either_keeps(run: list[Saved], one: Retention, other: Retention) -> None:
    assert kept(run, one | other) == kept(run, one) | kept(run, other)
    assert kept(run, one | other) == kept(run, other | one)


@given(SERIES, POLICIES)
def test_pruning_after_each_save_leaves_what_pruning_once_leaves(
    gaps: list[tuple[int, float, Any]], policy: Retention
) -> None:
    run: list[Saved] = []
    left: list[Saved] = []
    for steps, seconds, loss in gaps:
        last = run[-1] if run else Saved(0)
        run.append(_saved((last.step or 0) + steps, last.time + seconds, loss))
        staying = kept([*left, run[-1]], policy)
        left = [saved for saved in (*left, run[-1]) if saved.checkpoint_id in staying]
    assert {saved.checkpoint_id for saved in left} == kept(run, policy)


@given(RUNS, COUNTS)
def test_keep_latest_keeps_the_highest_steps(run: list[Saved], n: int) -> None:
    steps = sorted(saved.step for saved in run if saved.step is not None)
    left = {saved.step for saved in run if saved.checkpoint_id in kept(run, KeepLatest(n))} - {None}
    assert left == set(steps[-n:])


@given(RUNS, COUNTS)
def test_nothing_that_goes_is_better_than_what_keep_best_keeps(run: list[Saved], n: int) -> None:
    def rated(names: Iterable[str]) -> list[float]:
        return [
            loss
            for saved in run
            if saved.checkpoint_id in names
            and isinstance(loss := saved.notes.get("loss"), (int, float))
            and not isinstance(loss, bool)
            and loss == loss
        ]

    plan = plan_retention(run, KeepBest("loss", n))
    best = rated({name for name, why in plan.kept.items() if any("KeepBest" in text for text in why)})
    assert len(best) <= n
    if worse := rated(plan.removed):
        assert len(best) == n
        assert max(best) <= min(worse)


def test_a_plan_says_which_policy_keeps_what() -> None:
    run = [Saved(100 * index, notes={"loss": 1 / index}) for index in range(1, 13)] + [Saved(None, 5.0)]
    plan = plan_retention(
        run,
        KeepLatest(2) | KeepEvery(steps=1000) | KeepBest("loss", mode="max"),
        pinned={"step-300": "the link 'best'"},
    )
    assert plan.kept == {
        "at-5.0": ("no step",),
        "step-100": ("KeepEvery(steps=1000)", "KeepBest('loss', 1, mode='max')"),
        "step-300": ("the link 'best'",),
        "step-1000": ("KeepEvery(steps=1000)",),
        "step-1100": ("KeepLatest(2)",),
        "step-1200": ("the newest", "KeepLatest(2)"),
    }
    assert plan.removed == tuple(f"step-{step}" for step in (200, 400, 500, 600, 700, 800, 900))


def test_digits_in_a_name_that_somebody_else_gave_are_no_step() -> None:
    run = [Saved(7, producer="stock"), Saved(1), Saved(2)]
    assert kept(run, KeepLatest(1)) == {"step-7", "step-2"}


def test_of_equally_good_ones_the_newer_stays() -> None:
    run = [Saved(step, notes={"loss": 0.5}) for step in (1, 2)] + [Saved(3, notes={"loss": 0.6})]
    assert kept(run, KeepBest("loss")) == {"step-2", "step-3"}


def test_a_policy_of_ones_own_joins_the_others() -> None:
    class KeepOdd(Retention):
        def keeps(self, checkpoints: Sequence[CheckpointRecord]) -> Iterable[str]:
            return [saved.checkpoint_id for saved in checkpoints if saved.step and saved.step % 2]

    assert kept([Saved(step) for step in range(6)], KeepOdd() | KeepLatest(1)) == {
        "step-1",
        "step-3",
        "step-5",
    }


def test_a_policy_that_keeps_what_is_not_there_removes_nothing() -> None:
    class Confused(Retention):
        def keeps(self, checkpoints: Sequence[CheckpointRecord]) -> Iterable[str]:
            return ["best"]

    with pytest.raises(ValueError, match="keeps 'best', which is none of the checkpoints"):
        plan_retention([Saved(1), Saved(2)], Confused())


REFUSED: dict[str, tuple[Any, str]] = {
    "none": (lambda: KeepLatest(0), "at least 1"),
    "a truth value": (lambda: KeepLatest(True), "an int"),
    "a float": (lambda: KeepLatest(2.0), "an int"),  # type: ignore[arg-type]  # what is tested
    "every nothing": (lambda: KeepEvery(), "steps=... or seconds=..."),
    "no steps": (lambda: KeepEvery(steps=0), "at least 1"),
    "no seconds": (lambda: KeepEvery(seconds=0), "more than 0"),
    "NaN seconds": (lambda: KeepEvery(seconds=float("nan")), "more than 0"),
    "no name": (lambda: KeepBest(3), "name of a note"),  # type: ignore[arg-type]  # what is tested
    "less than none": (lambda: KeepBest("loss", -1), "at least 1"),
    "no such mode": (
        lambda: KeepBest("loss", mode="low"),  # type: ignore[arg-type]  # what is tested
        "'min' or 'max'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_policy_that_makes_no_sense_is_refused(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=words):
        make()
