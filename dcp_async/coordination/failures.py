"""How a rank's error travels: as capped text and plain data, raised elsewhere as RemoteFailure.

Enters: any exception, the user's own classes included. Leaves: fields that fit into a message, and one error
that names every rank. Invariant: nothing is pickled that names a class, and no error is too odd to be told.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptCheckpointError, Phase, SaveCancelled

_TEXT_BYTES = 64 << 10
"""What one text may take in a message; a traceback keeps its end, where the cause is."""
_NAMES = 1000
"""How many names of tensors travel with an error."""


class PhaseFailure(Exception):
    """Says in which phase of a save its cause was raised; nobody outside of the package sees it."""

    def __init__(self, phase: Phase, cause: BaseException) -> None:
        super().__init__(phase)
        self.phase: Phase = phase
        self.cause = cause


# eq=False: with it a dataclass can't be hashed, and whoever handles exceptions expects that they can
@dataclass(kw_only=True, eq=False)
class RemoteError(Exception):
    """What went wrong on another rank, as text: its class may not exist here, or not pickle."""

    phase: str
    """What the rank was at, in the words of the save or load. One that fell silent was "before" the exchange
    that waits for it, or "after" the last that it had a part in."""
    type_name: str
    message: str
    traceback_text: str = ""
    cancelled: bool = False
    """The save was cancelled there; nothing is wrong."""
    tensors: tuple[str, ...] = ()
    """What lies in the bad blocks, where it was a CorruptCheckpointError."""

    def __str__(self) -> str:
        if self.message.startswith("rank "):  # one of ours, a sentence of its own
            return self.message
        return f"{self.type_name}: {self.message}" if self.message else self.type_name

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own passes arguments by position, which this class does not take
        return (RemoteError.from_plain, (self.plain(),))

    @classmethod
    def of(cls, phase: str, error: BaseException) -> RemoteError:
        """``error`` in a form that travels. ``phase`` holds unless the error knows better."""
        if isinstance(error, PhaseFailure):
            phase, error = error.phase, error.cause
        if isinstance(error, RemoteError):  # another rank's or the coordination's own: it knows best
            return error
        try:
            message = str(error)
        except Exception as failure:  # a class of the user's may fail at anything
            message = f"(its message can't be had: {type(failure).__name__})"
        try:
            text = "".join(traceback.format_exception(error))
        except Exception:  # so may those of its causes, which are written out too
            text = ""
        return cls(
            phase=phase,
            type_name=type(error).__qualname__,
            message=_cut(message),
            traceback_text=_cut(text, keep_end=True),
            cancelled=isinstance(error, asyncio.CancelledError | SaveCancelled),
            tensors=error.tensors[:_NAMES] if isinstance(error, CorruptCheckpointError) else (),
        )

    def plain(self) -> tuple[Any, ...]:
        """As plain data: five fields, and a sixth where there are tensors to name."""
        named = (self.tensors,) if self.tensors else ()
        return (self.phase, self.type_name, self.message, self.traceback_text, self.cancelled, *named)

    @classmethod
    def from_plain(cls, fields: tuple[Any, ...]) -> RemoteError:
        phase, type_name, message, traceback_text, cancelled, *named = fields
        return cls(
            phase=phase,
            type_name=type_name,
            message=message,
            traceback_text=traceback_text,
            cancelled=cancelled,
            tensors=tuple(named[0]) if named else (),
        )


def _cut(text: str, *, keep_end: bool = False) -> str:
    # names of files may hold lone surrogates, which UTF-8 refuses; a cut may fall inside of a character
    raw = text.encode(errors="backslashreplace")
    # a message with text of any length would be cut into chunks that every rank has to fetch
    if len(raw) > _TEXT_BYTES:
        room = _TEXT_BYTES - len("... ")
        raw = b"... " + raw[-room:] if keep_end else raw[:room] + b" ..."
    return raw.decode(errors="ignore")


class RemoteFailure(Exception):
    """A save failed on other ranks, or because of them; ``failures`` tells what each reported or lacks."""

    def __init__(self, failures: Mapping[int, RemoteError]) -> None:
        self.failures: dict[int, RemoteError] = dict(failures)
        told = OrderedDict[str, list[int]]()  # what concerns several ranks is said once
        for rank, error in sorted(self.failures.items()):
            told.setdefault(str(error), []).append(rank)
        super().__init__(
            "; ".join(
                text if text.startswith("rank ") else f"{name_ranks(ranks)}: {text}"
                for text, ranks in told.items()
            )
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own would pass the message in place of the failures
        return (RemoteFailure, (self.failures,))


def name_ranks(ranks: list[int]) -> str:
    """'rank 2' or 'ranks 1, 3'."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


# What the coordination itself finds wrong with ranks. These are sentences of their own, "rank 2 ...".


def closed(phase: str, reason: str) -> RemoteError:
    """A rank takes part in nothing any more; ``reason`` says which."""
    return RemoteError(phase=phase, type_name="EngineStateError", message=reason)


def unanswered(rank: int, phase: str) -> RemoteError:
    """The coordinator went on without the others."""
    return RemoteError(
        phase=phase,
        type_name="EngineStateError",
        message=f"rank {rank} ended this save without an answer to the others",
    )


def silent(rank: int, why: str, reached: str | None, waited_for: str) -> RemoteError:
    """``rank`` gives no sign of life; ``reached`` is the phase that it was last heard of in, if it was."""
    told = f"it was last heard of in phase {reached!r}" if reached else f"its {waited_for!r} was waited for"
    phase = f"after {reached}" if reached and waited_for == "open" else f"before {waited_for}"
    return RemoteError(phase=phase, type_name="TimeoutError", message=f"rank {rank} {why}; {told}")


def late(rank: int, phase: str, what: str) -> RemoteError:
    """``rank`` lives, and did not arrive in time; ``what`` is what it does instead, or has not done."""
    return RemoteError(phase=phase, type_name="TimeoutError", message=f"rank {rank} {what}")


def stood_still(rank: int, phase: str, seconds: float) -> RemoteError:
    """The coordinator itself was the silent one."""
    return RemoteError(
        phase=phase,
        type_name="TimeoutError",
        message=f"rank {rank} stood still for {seconds:g} s, so other ranks may have given up on it",
    )
