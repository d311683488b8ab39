"""Which checkpoints a run keeps: policies, joined by ``|``, and the plan that follows from them.

Enters: what each checkpoint is (name, step, time, notes), and a policy. Leaves: a RetentionPlan, which says
of each checkpoint that stays why it does. Invariant: nothing here looks at a disk, and one list has one plan;
the newest checkpoint stays, and so does each that has no step, whatever the policies say.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from .._names import is_step_directory
from ..info import JSON, Producer

Mode = Literal["min", "max"]


class CheckpointRecord(Protocol):
    """What a policy is told of a checkpoint; a CheckpointInfo is one."""

    @property
    def checkpoint_id(self) -> str:
        """Its name."""

    @property
    def step(self) -> int | None:
        """The step it was saved at."""

    @property
    def time(self) -> float:
        """When it was committed, in Unix seconds."""

    @property
    def producer(self) -> Producer:
        """Who wrote it."""

    @property
    def notes(self) -> Mapping[str, JSON]:
        """What was attached with ``save(notes=...)``."""


class Retention(ABC):
    """A policy: which of a run's checkpoints stay. ``a | b`` keeps what either keeps.

    To write one, subclass it and define ``keeps``.
    """

    # or the frozen, slotted policies below would have a __dict__ all the same
    __slots__ = ()

    @abstractmethod
    def keeps(self, checkpoints: Sequence[CheckpointRecord]) -> Iterable[str]:
        """The names of those that stay, of ``checkpoints``: all that have a step, ascending.

        Pure: the same list has the same answer. What it keeps it keeps as well once the others are gone.
        """

    def __or__(self, other: Retention) -> Retention:
        if not isinstance(other, Retention):
            # Python says then what can't be joined, in its own words
            return NotImplemented
        return _Either((*self.parts, *other.parts))

    @property
    def parts(self) -> tuple[Retention, ...]:
        """The policies that it was joined from."""
        return (self,)


class _Either(Retention):
    """Keeps what one of several policies keeps."""

    __slots__ = ("_parts",)

    def __init__(self, parts: tuple[Retention, ...]) -> None:
        self._parts = parts

    def __repr__(self) -> str:
        return " | ".join(map(repr, self._parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Either) and self._parts == other.parts

    def __hash__(self) -> int:
        return hash(self._parts)

    @property
    def parts(self) -> tuple[Retention, ...]:
        return self._parts

    def keeps(self, checkpoints: Sequence[CheckpointRecord]) -> Iterable[str]:
        return dict.fromkeys(name for part in self._parts for name in part.keeps(checkpoints))


@dataclass(frozen=True, slots=True)
class KeepLatest(Retention):
    """Keeps the newest ``n`` checkpoints."""

    n: int = 1

    def __post_init__(self) -> None:
        _check_count(self, self.n)

    def __repr__(self) -> str:
        return f"KeepLatest({self.n})"

    def keeps(self, checkpoints: Sequence[CheckpointRecord]) -> Iterable[str]:
        return [checkpoint.checkpoint_id for checkpoint in checkpoints[-self.n :]]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepEvery(Retention):
    """Keeps one checkpoint of every ``steps`` steps, and one of every ``seconds`` seconds: the first of each.

    ``KeepEvery(steps=1000)`` keeps the first from step 0 on, the first from step 1000 on, and so forth;
    ``KeepEvery(seconds=3600)`` the first of each hour of the clock (UTC).
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise ValueError("KeepEvery(...) needs steps=... or seconds=...")
        if self.steps is not None:
            _check_count(self, self.steps, "steps")
        if self.seconds is not None and not (
            isinstance(self.seconds, (int, float)) and 0 < self.seconds < math.inf
        ):
            raise ValueError(f"KeepEvery(seconds=...) is more than 0, not {self.seconds!r}")

    def __repr__(self) -> str:
        given = {"steps": self.steps, "seconds": self.seconds}
        return (
            f"KeepEvery({', '.join(f'{key}={value}' for key, value in given.items() if value is not None)})"
        )

    def keeps(self, checkpoints: Sequence[CheckpointRecord]) -> Iterable[str]:
        # fixed intervals, not distances from the one kept before: whatever is removed, none of them moves
        firsts: dict[tuple[str, int], str] = {}
        for checkpoint in checkpoints:
            if self.steps is not None and checkpoint.step is not None:
                firsts.setdefault(("step", checkpoint.step // self.steps), checkpoint.checkpoint_id)
            if self.seconds is not None:
                firsts.setdefault(("time", int(checkpoint.time // self.seconds)), checkpoint.checkpoint_id)
        return firsts.values()


@dataclass(frozen=True, slots=True)
class KeepBest(Retention):
    """Keeps the ``n`` checkpoints with the least number under ``note`` in their notes, or the greatest.

    Of equal ones the newer is better. A checkpoint without such a number is none of the best.
    """

    note: str
    n: int = 1
    mode: Mode = "min"

    def __post_init__(self) -> None:
        if not isinstance(self.note, str):
            raise TypeError(f"KeepBest(note, ...) takes the name of a note, not {self.note!r}")
        _check_count(self, self.n)
        if self.mode not in get_args(Mode):
            raise ValueError(f"KeepBest(mode=...) is 'min' or 'max', not {self.mode!r}")

    def __repr__(self) -> str:
        return f"KeepBest({self.note!r}, {self.n}, mode={self.mode!r})"

    def keeps(self, checkpoints: Sequence[CheckpointRecord]) -> Iterable[str]:
        sign = -1 if self.mode == "max" else 1
        rated = [
            # by index, later ones first: of equal ones the newer is better
            (sign * value, -index)
            for index, checkpoint in enumerate(checkpoints)
            if (value := _number(checkpoint.notes.get(self.note))) is not None
        ]
        return [checkpoints[-index].checkpoint_id for _, index in sorted(rated)[: self.n]]


def _check_count(policy: Retention, count: object, name: str = "n") -> None:
    what = f"{type(policy).__name__}({name}=...)"
    if type(count) is not int:  # True is no number of checkpoints
        raise TypeError(f"{what} is an int, not {count!r}")
    if count < 1:
        raise ValueError(f"{what} is at least 1, not {count}")


def _number(value: JSON) -> int | float | None:
    # a truth value is no measure, and NaN is neither better nor worse than anything
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and value == value else None  # type: ignore[return-value]  # as just checked


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPlan:
    """What a policy makes of some checkpoints."""

    kept: Mapping[str, tuple[str, ...]]
    """Name -> the policies that keep it, as text, and whatever else does; ascending."""
    removed: tuple[str, ...]
    """The names of the others, oldest first."""


def plan_retention(
    checkpoints: Iterable[CheckpointRecord], policy: Retention, *, pinned: Mapping[str, str] | None = None
) -> RetentionPlan:
    """Which of ``checkpoints`` stay under ``policy``, and why. Pure.

    The newest stays whatever the policy says: a run that is killed goes on from there. So does a checkpoint
    without a step, which was saved under a name of its own, and whatever somebody else gave a name.

    Args:
        checkpoints: CheckpointInfos, or whatever else has name, step, time and notes; in any order.
        policy: one, or several joined with ``|``.
        pinned: name -> why it stays besides.
    Raises: ValueError for a policy that keeps what is none of them.
    """
    every = sorted(checkpoints, key=_age)
    in_steps = [checkpoint for checkpoint in every if is_of_a_step(checkpoint)]
    reasons: dict[str, list[str]] = {checkpoint.checkpoint_id: [] for checkpoint in every}
    for checkpoint in every:
        if not is_of_a_step(checkpoint):
            reasons[checkpoint.checkpoint_id].append("no step")
    if in_steps:
        reasons[in_steps[-1].checkpoint_id].append("the newest")
    # one by one, though a joined policy could be asked at once: each says by itself why it keeps something
    for part in policy.parts:
        for name in part.keeps(in_steps):
            if name not in reasons:
                raise ValueError(f"{part!r} keeps {name!r}, which is none of the checkpoints")
            reasons[name].append(repr(part))
    for name, why in (pinned or {}).items():
        if name in reasons:
            reasons[name].append(why)
    return RetentionPlan(
        kept={name: tuple(why) for name, why in reasons.items() if why},
        removed=tuple(name for name, why in reasons.items() if not why),
    )


def is_of_a_step(checkpoint: CheckpointRecord) -> bool:
    """Whether policies count it: the digits in a name that somebody else gave are no step."""
    is_named = checkpoint.producer == "dcp_async" or is_step_directory(checkpoint.checkpoint_id)
    return is_named and checkpoint.step is not None


def _age(checkpoint: CheckpointRecord) -> tuple[bool, int, float, str]:
    # the order of every other verb: what has no step counts as older than what has one
    return checkpoint.step is not None, checkpoint.step or 0, checkpoint.time, checkpoint.checkpoint_id
