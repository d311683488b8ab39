"""When each policy says that a save is due: at which steps, after how many seconds, on which signals."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from typing import Any

import pytest

from dcp_async import Adaptive, CheckpointEngine, Every, OnSignal, SaveCost, SavePolicy


def steps_of(policy: SavePolicy, asked: list[int]) -> list[int]:
    previous, due = None, []
    for step in asked:
        if policy.at_step(step, previous):
            due.append(step)
        previous = step
    return due


def test_every_step_count_is_due_at_its_multiples() -> None:
    assert steps_of(Every(steps=3), list(range(8))) == [0, 3, 6]


def test_a_run_that_resumes_between_two_multiples_keeps_to_them() -> None:
    assert steps_of(Every(steps=100), list(range(101, 202))) == [200]


def test_a_multiple_that_is_passed_over_is_made_up_for_at_the_next_step() -> None:
    assert steps_of(Every(steps=10), [7, 14, 21, 28, 35, 42]) == [14, 21, 35, 42]


def test_every_second_count_has_no_steps() -> None:
    policy = Every(seconds=600)
    assert steps_of(policy, list(range(5))) == []
    assert policy.interval([]) == 600


def costs(*stalls: float, ended: float | None = 0.0) -> list[SaveCost]:
    return [SaveCost(stall=stall, ended=ended) for stall in stalls]


def test_adaptive_is_due_at_once_until_a_save_was_measured() -> None:
    assert Adaptive(overhead=0.02).interval([]) == 0.0


def test_adaptive_keeps_its_overhead() -> None:
    assert Adaptive(overhead=0.02).interval(costs(0.5)) == pytest.approx(25.0)


def test_adaptive_with_mtbf_is_the_optimum_of_young_and_daly() -> None:
    assert Adaptive(mtbf=86_400.0).interval(costs(3.0)) == pytest.approx(math.sqrt(2 * 3.0 * 86_400.0))


@pytest.mark.parametrize(("stall", "expected"), [(0.1, math.sqrt(2 * 0.1 * 7200.0)), (60.0, 60.0 / 0.05)])
def test_of_overhead_and_optimum_the_longer_interval_counts(stall: float, expected: float) -> None:
    assert Adaptive(overhead=0.05, mtbf=7200.0).interval(costs(stall)) == pytest.approx(expected)


def test_one_slow_save_does_not_set_the_interval() -> None:
    assert Adaptive(overhead=0.1).interval(costs(9.0, 1.0, 1.0, 8.0, 1.0)) == pytest.approx(10.0)


def test_the_first_save_counts_no_more_once_a_second_was_cheaper() -> None:
    assert Adaptive(overhead=0.1).interval(costs(9.0, 1.0)) == pytest.approx(10.0)


def test_adaptive_waits_until_the_last_save_is_durable() -> None:
    policy = Adaptive(overhead=0.5)
    assert policy.interval(costs(0.01, ended=None)) == math.inf
    assert policy.interval(costs(0.01, ended=4.0)) == 4.0


def test_of_joined_policies_whichever_is_due_first_counts() -> None:
    policy = Every(steps=4, seconds=600) | Every(steps=6) | Adaptive(overhead=0.1) | OnSignal(signal.SIGUSR1)
    assert steps_of(policy, list(range(13))) == [0, 4, 6, 8, 12]
    assert policy.interval(costs(1.0)) == pytest.approx(10.0)
    assert policy.interval(costs(100.0)) == 600
    assert policy.signals == (signal.SIGUSR1,)


def test_joining_is_associative_and_leaves_out_signals_named_twice() -> None:
    a, b, c = Every(steps=1), OnSignal(signal.SIGUSR1, signal.SIGTERM), OnSignal()
    assert ((a | b) | c) == (a | (b | c))
    assert (a | b | c).signals == (signal.SIGUSR1, signal.SIGTERM)


def test_a_policy_reads_as_it_is_written() -> None:
    policy = Every(steps=100) | OnSignal(15)
    assert repr(policy) == "Every(steps=100, seconds=None) | OnSignal(SIGTERM)"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Every, {}),
        (Every, {"steps": 0}),
        (Every, {"seconds": 0}),
        (Every, {"seconds": math.nan}),
        (Adaptive, {}),
        (Adaptive, {"overhead": 0}),
        (Adaptive, {"overhead": 1.0}),
        (Adaptive, {"mtbf": -1}),
        (Adaptive, {"mtbf": math.inf}),
    ],
)
def test_a_policy_that_can_not_be_is_refused(
    kind: Callable[..., SavePolicy], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\("):
        kind(**options)


def test_a_signal_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="4711"):
        OnSignal(4711)


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(TypeError, match=r"policy=100 must be a SavePolicy"):
        CheckpointEngine("unused", policy=100)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Every(steps=1) | 3  # type: ignore[operator]


def test_a_policy_of_the_users_own_joins_the_others() -> None:
    class Primes(SavePolicy):
        def at_step(self, step: int, previous: int | None) -> bool:
            return step in (2, 3, 5, 7)

    assert steps_of(Primes() | Every(steps=4), list(range(9))) == [0, 2, 3, 4, 5, 7, 8]
