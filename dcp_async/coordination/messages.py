"""What a rank hears: from other ranks, as plain data on the wire, and from its own threads; one type each.

Enters: a message. Leaves: a tuple of plain data, its kind first, and back. Invariant: everything that changes
what a rank knows of the others is one of these, handled in one place, so that its order is the order of the
inbox.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .failures import RemoteError

# To the coordinator. What the coordinator's own rank says takes the same way, without the store.


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One rank's message in one phase of one save."""

    rank: int
    uid: str
    phase: str
    # in each message: the coordinator hears of calls that its own rank has yet to make
    ordinal: int | None
    """Which call of the engine this is; None where the rank has forgotten."""
    name: str
    value: Any
    """Plain data; what it means is known to who exchanges it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureReport:
    """A save failed on the reporter, or ranks that the reporter waited for are silent."""

    reporter: int
    uid: str
    failures: Mapping[int, RemoteError]


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """The rank has been in code of the trainer's for some time."""

    rank: int
    text: str
    """What it is in; empty when it has come back from it."""
    seconds: float
    """For how long: no clock is common to two ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """The rank has ended its part of a save that failed, and waits to hear how that ended for all."""

    rank: int
    uid: str
    flag: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """The last word of a rank that closes its engine."""

    rank: int
    unread: int | None
    """The number of the first message that it did not take; None for one that reads on until it is told to
    leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRequested:
    """A rank asks for a step at which all of them save."""

    why: str
    """A clause for messages: "rank 3 received SIGTERM"."""
    stop: bool
    """Whether they are to leave their loops there."""
    seconds: float
    """How long the ranks have to answer."""


# From the coordinator.


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was decided for the rank that hears it."""

    uid: str
    phase: str
    answer: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A save failed, and every rank is told."""

    uid: str
    failures: Mapping[int, RemoteError]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """How a save that failed ended for all, in the same words for all."""

    uid: str
    failures: Mapping[int, RemoteError]
    flag: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Missed:
    """The others gave up waiting for this rank to make a call."""

    ordinal: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncCalled:
    """Every rank is to contribute the step that it has reached, under ``uid``."""

    uid: str
    why: str
    stop: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """The coordinator has closed its engine; nobody answers any more."""

    reason: str


# From this rank's own threads and clock; these never travel.


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """All ranks have contributed; the coordinator's rank alone hears it, and decides."""

    uid: str
    phase: str
    values: list[Any]
    """By rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A contribution of this rank's is no plain data, so it was never sent."""

    uid: str
    phase: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GapChecked:
    """What came of looking for a message that was numbered but never came."""

    uid: str
    phase: str
    skipped: bool
    """There was one: those behind it are read only now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Silent:
    """Ranks that show no sign of life."""

    ranks: frozenset[int]
    why: str
    """What they have not done, as the end of a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """One more beat was answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreGone:
    """Nothing will be sent or received any more."""

    why: str


ToCoordinator = Contribution | FailureReport | Busy | Stopped | SyncRequested | Goodbye
ToRank = Answer | Failed | Settled | Missed | SyncCalled | Left
Local = Gathered | Refused | GapChecked | Silent | Tick | StoreGone
Message = ToCoordinator | ToRank | Local

# What follows from a message, to be carried out by who owns the store.


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Tell one rank, which may be the coordinator's own."""

    rank: int
    message: ToRank | Gathered


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckGap:
    """Ranks are overdue in a round: look whether their messages are stuck behind a dead rank's. A
    ``GapChecked`` answers it."""

    uid: str
    phase: str


Effect = Send | CheckGap


# no Local is among them, so nothing that comes over the store passes for a word of this process
_KINDS: dict[str, type[ToCoordinator | ToRank]] = {
    "message": Contribution,
    "report": FailureReport,
    "busy": Busy,
    "stopped": Stopped,
    "sync": SyncRequested,
    "goodbye": Goodbye,
    "answer": Answer,
    "failure": Failed,
    "verdict": Settled,
    "missed": Missed,
    "called": SyncCalled,
    "left": Left,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def to_plain(message: ToCoordinator | ToRank) -> tuple[Any, ...]:
    """``message`` as plain data."""
    # not asdict(), which would copy the caller's value all the way down
    values = [getattr(message, field.name) for field in fields(message)]
    if isinstance(message, FailureReport | Failed | Settled):
        # alone among the fields they are objects; a contribution's value may be a mapping of the caller's
        values = [_plain_failures(value) if isinstance(value, Mapping) else value for value in values]
    return (_NAMES[type(message)], *values)


def from_plain(data: tuple[Any, ...]) -> ToCoordinator | ToRank:
    """The message that ``to_plain`` made ``data`` of. Raises ValueError for anything else."""
    name, *values = data
    kind = _KINDS.get(name)
    if kind is None or len(values) != len(fields(kind)):
        raise ValueError(f"not a message between ranks: {name!r} with {len(values)} fields")
    # by position on the wire, as short as a tuple: all ranks run one version
    by_name = dict(zip((field.name for field in fields(kind)), values, strict=True))
    if "failures" in by_name:
        by_name["failures"] = {
            rank: RemoteError.from_plain(error) for rank, error in by_name["failures"].items()
        }
    return kind(**by_name)


def _plain_failures(failures: Mapping[int, RemoteError]) -> dict[int, tuple[Any, ...]]:
    return {rank: error.plain() for rank, error in failures.items()}
