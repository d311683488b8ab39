"""Policies: at which steps, after how many seconds and on which signals a save is due. Joined with ``|``.

Enters: a step, what saves have cost. Leaves: whether that step is saved, how long to wait. Invariant: a
policy is a value without state or clock, so equal ones answer alike on every rank; whose clock counts, and at
which step the ranks then save, is the schedule's business.
"""

from __future__ import annotations

import math
import operator
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low


@dataclass(slots=True, kw_only=True)
class SaveCost:
    """What one save has cost."""

    stall: float
    """Seconds for which the trainer stood still: in ``save()`` and, with ``overlap``, before the optimizer's
    step."""
    ended: float | None = None
    """Seconds from the call until it was durable or had failed; None as long as it is neither."""


class SavePolicy:
    """When a save is due; ``a | b`` is due when either is.

    For a policy of your own, override what it decides by. All ranks compare the ``repr`` of their policies
    when they open their engines: make it a frozen dataclass.
    """

    @property
    def signals(self) -> tuple[int, ...]:
        """The signals on which a save is due; one to any rank is enough."""
        return ()

    def at_step(self, step: int, previous: int | None) -> bool:
        """Whether ``step`` is to be saved. Must give the same on every rank for the same arguments.

        ``previous`` is the step that was asked about before; None at first, and after a step backwards.
        """
        return False

    def interval(self, costs: Sequence[SaveCost]) -> float | None:
        """How many seconds after the last save the next is due; None for never. The coordinator alone asks,
        at each step. ``costs`` are those of the last saves, oldest first."""
        return None

    def __or__(self, other: SavePolicy) -> SavePolicy:
        if not isinstance(other, SavePolicy):
            return NotImplemented
        return _AnyOf((*_parts(self), *_parts(other)))


def _parts(policy: SavePolicy) -> tuple[SavePolicy, ...]:
    return policy.parts if isinstance(policy, _AnyOf) else (policy,)


@dataclass(frozen=True)
class _AnyOf(SavePolicy):
    parts: tuple[SavePolicy, ...]

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))

    @property
    def signals(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(signum for part in self.parts for signum in part.signals))

    def at_step(self, step: int, previous: int | None) -> bool:
        return any(part.at_step(step, previous) for part in self.parts)

    def interval(self, costs: Sequence[SaveCost]) -> float | None:
        intervals = [part.interval(costs) for part in self.parts]
        return min((seconds for seconds in intervals if seconds is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Every(SavePolicy):
    """By steps, by time, or by whichever of the two comes first."""

    steps: int | None = None
    """At each multiple, 0 included; where steps are passed over, at the first one behind a multiple."""
    seconds: float | None = None
    """After the last save, or the first step that was asked about; by the coordinator's clock."""

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise ValueError("Every(...) needs steps=, seconds= or both")
        if self.steps is not None and operator.index(self.steps) < 1:
            raise ValueError(f"Every(steps=...) is at least 1, not {self.steps}")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"Every(seconds=...) is more than 0 and finite, not {self.seconds}")

    def at_step(self, step: int, previous: int | None) -> bool:
        if self.steps is None:
            return False
        return step % self.steps == 0 or (
            previous is not None and step // self.steps > previous // self.steps
        )

    def interval(self, costs: Sequence[SaveCost]) -> float | None:
        return self.seconds


@dataclass(frozen=True, kw_only=True)
class Adaptive(SavePolicy):
    """As often as is worth it, by what saves turn out to cost. The first step is saved, to measure it.

    With both options the longer interval counts. None is shorter than a save takes until it is durable.
    """

    overhead: float | None = None
    """The share of the training's time that saves may take: a stall of 0.5 s at 0.02 is every 25 s."""
    mtbf: float | None = None
    """Mean seconds between failures of the whole job: the interval that loses least is then sqrt(2 * cost *
    mtbf) (Young, Daly)."""

    def __post_init__(self) -> None:
        if self.overhead is None and self.mtbf is None:
            raise ValueError("Adaptive(...) needs overhead=, mtbf= or both")
        if self.overhead is not None and not 0 < self.overhead < 1:
            raise ValueError(f"Adaptive(overhead=...) is a share between 0 and 1, not {self.overhead}")
        if self.mtbf is not None and not 0 < self.mtbf < math.inf:
            raise ValueError(f"Adaptive(mtbf=...) is in seconds, more than 0 and finite, not {self.mtbf}")

    def interval(self, costs: Sequence[SaveCost]) -> float | None:
        if not costs:
            return 0.0
        # the last, not all: with several saves in flight the older ones end first
        latest = costs[-1].ended
        if latest is None:
            return math.inf  # a save now would only wait for the one in flight
        # the first save plans and makes memory, and a slow disk may hit any of them: one is not the rule
        cost = median_low(cost.stall for cost in costs)
        # a bound and an optimum: whoever names both does not want to exceed the first for the second
        by_overhead = cost / self.overhead if self.overhead is not None else 0.0
        by_mtbf = math.sqrt(2 * cost * self.mtbf) if self.mtbf is not None else 0.0
        return max(by_overhead, by_mtbf, latest)


@dataclass(frozen=True, init=False, repr=False)
class OnSignal(SavePolicy):
    """When any rank receives one of ``signals`` (SIGTERM, if none is named); training goes on.

    The engine sets the handlers when it opens, in the main thread, and calls those that were there before. To
    leave the loop after that save, use ``engine.preemption()``.
    """

    _signals: tuple[signal.Signals, ...]

    def __init__(self, *signals: int) -> None:
        # normalised: ranks compare the repr, and 15 is SIGTERM
        chosen = tuple(signal.Signals(signum) for signum in signals or (signal.SIGTERM,))
        if {signal.SIGKILL, signal.SIGSTOP} & set(chosen):
            raise ValueError("OnSignal(...) takes no SIGKILL or SIGSTOP: no process hears of them")
        object.__setattr__(self, "_signals", chosen)

    def __repr__(self) -> str:
        return f"OnSignal({', '.join(signum.name for signum in self._signals)})"

    @property
    def signals(self) -> tuple[int, ...]:
        return self._signals
