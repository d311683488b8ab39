"""Events that an engine reports, and the one method that receives them.

Progress bars, metrics and traces are observers. Events are values: keeping one keeps nothing else alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from .errors import SaveError
from .info import CheckpointInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class _SaveEvent:
    checkpoint_id: str
    """The checkpoint being saved."""
    step: int | None
    """Its step, None if it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveStarted(_SaveEvent):
    """The state was captured."""

    nbytes: int
    """Bytes of its tensors and pickled leaves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveStaged(_SaveEvent):
    """The state may be mutated; upload goes on."""

    nbytes: int
    """Bytes of the file images."""
    seconds: float
    """Wall time since the save was requested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveProgress(_SaveEvent):
    """One more part was written."""

    written_bytes: int
    """Bytes written so far."""
    nbytes: int
    """Bytes to write in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCommitted(_SaveEvent):
    """The checkpoint exists and is durable."""

    info: CheckpointInfo
    """What was committed."""
    seconds: float
    """Wall time since the save was requested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(_SaveEvent):
    """The save failed or was cancelled; nothing was committed."""

    error: SaveError
    """What its handles raise."""


Event: TypeAlias = SaveStarted | SaveStaged | SaveProgress | SaveCommitted | SaveFailed


class Observer(Protocol):
    """Receives events on the engine's thread: return quickly, do not block. What it raises is logged and goes
    no further."""

    def on_event(self, event: Event) -> None: ...
