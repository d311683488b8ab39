"""What a save is called and may carry, which saves are in flight, and whose failure nobody has looked at.

Enters: what callers pass to ``save`` and ``load``. Leaves: plain values that names, manifests and messages
can hold, or ValueError and TypeError before anything is written. Invariant: steps and ordinals are handed out
in program order, so that each rank computes them alone; the loop needs no lock that a caller holds, because
a signal handler may interrupt its holder and wait for the loop.
"""

from __future__ import annotations

import json
import operator
import os
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from .._concurrency import SignalSafeFuture
from .._names import folded_name, step_directory, why_not_attachable
from ..errors import SaveError
from ..info import JSON
from ..response import Place, ResponseWriter

T = TypeVar("T")

_STEPS = 1 << 63
_NAME_BYTES = 240
"""File systems take 255 bytes; what others append (`.tmp`, `.partial`) must fit as well."""
_NOTES_BYTES = 1 << 20
_NOTES_DEPTH = 100


def normal_step(step: object) -> int:
    """``step`` as an int: anything that is an integer exactly (NumPy's, an IntEnum, a tensor of one).

    Raises: TypeError for bools, floats and whatever else is no integer; ValueError for one below 0 or above
    2**63 - 1.
    """
    if type(step) is int and 0 <= step < _STEPS:  # nearly always, and should_save() asks at each step
        return step
    is_bool = isinstance(step, bool) or (isinstance(step, torch.Tensor) and step.dtype == torch.bool)
    try:
        if is_bool:
            raise TypeError
        # not int(): that would take a float and a text as well
        number = int(operator.index(step))  # type: ignore[arg-type]  # that is the question
    except Exception as error:  # a tensor's own code may raise anything: on meta, of many elements
        hint = "; pass int(step)" if isinstance(step, float) else ""
        raise TypeError(f"step={brief(step)} must be an integer, not {type(step).__name__}{hint}") from error
    if number < 0:
        raise ValueError(f"step={brief(number)} must not be negative")
    if number >= _STEPS:
        raise ValueError(f"step={brief(number)} must be less than 2**63")
    return number


def normal_name(name: object) -> str:
    """``name`` as a plain str: of a str's subclass its text, of a path its text. Raises: TypeError."""
    if isinstance(name, os.PathLike):
        name = os.fspath(name)
    if not isinstance(name, str):
        hint = "; a step is passed as step=" if isinstance(name, int) else ""
        raise TypeError(f"checkpoint_id={brief(name)} must be a str, not {type(name).__name__}{hint}")
    return str.__str__(name)  # of a subclass the text alone: it is compared, sorted and sent to other ranks


def checkpoint_name(step: int | None, checkpoint_id: str | None) -> str:
    """The name of a checkpoint. Raises ValueError or TypeError for a step or a name that can't be one."""
    if step is not None:
        step = normal_step(step)
    if checkpoint_id is None:
        assert step is not None
        return step_directory(step)
    name = normal_name(checkpoint_id)
    told = f"checkpoint_id={brief(name)}"
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise ValueError(
            f"{told} must be a plain name (it becomes a directory): not empty, no slash, no dot at its start"
        )
    if any(ord(char) < 32 or 127 <= ord(char) < 160 or char in "\u2028\u2029" for char in name):
        raise ValueError(
            f"{told} must be a plain name (it becomes a directory): no line break or other control"
        )
    try:
        # in bytes: file systems count those, not characters
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{told} has a lone surrogate, which is no character") from error
    if length > _NAME_BYTES:
        raise ValueError(f"{told} takes {length} bytes; a name takes {_NAME_BYTES} at most")
    return name


def normal_notes(notes: object) -> dict[str, JSON]:
    """A copy of ``notes`` as plain JSON, tuples as lists. Raises ValueError or TypeError if they are not
    JSON."""
    if notes is None:
        return {}
    if not isinstance(notes, Mapping):
        raise TypeError(f"notes must be a mapping of names to JSON, not {type(notes).__name__}")
    # copied at once: the trainer may change its mapping before the manifest is written
    copied: dict[str, JSON] = {}
    for key, value in notes.items():
        copied[_note_key(key, "notes")] = _plain_json(value, f"notes[{brief(key)}]", 1)
    try:
        nbytes = len(json.dumps(copied, ensure_ascii=False, allow_nan=False).encode())
    except ValueError as error:  # a NaN, an integer of 5,000 digits, a lone surrogate
        raise ValueError(f"notes must be JSON: {error}") from error
    if nbytes > _NOTES_BYTES:
        raise ValueError(
            f"notes take {nbytes} bytes as JSON; at most {_NOTES_BYTES} fit: put large things into the state"
        )
    return copied


def _note_key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{where} must be JSON: its key {brief(key)} is no str but {type(key).__name__}")
    return str.__str__(key)


def _plain_json(value: object, where: str, depth: int) -> JSON:
    """``value`` without subclasses. ``where`` and ``depth`` say where it lies."""
    if depth > _NOTES_DEPTH:
        raise ValueError(
            f"notes must be JSON: they are nested more than {_NOTES_DEPTH} deep (or hold themselves)"
        )
    if value is None or isinstance(value, bool):  # before int, which bool is one of
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_note_key(key, where): _plain_json(inner, where, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_json(inner, where, depth + 1) for inner in value]
    raise ValueError(f"{where} must be JSON, not {type(value).__name__}; convert it to a number, str or list")


def normal_files(files: object) -> dict[str, bytes | Path]:
    """A copy of ``files``: names -> bytes, or the path to read them from. Raises ValueError or TypeError if
    they can't be attached."""
    if files is None:
        return {}
    if not isinstance(files, Mapping):
        raise TypeError(f"files must be a mapping of names to bytes or paths, not {type(files).__name__}")
    sources: dict[str, bytes | Path] = {}
    folded: dict[str, str] = {}
    for key, value in files.items():
        if not isinstance(key, str):
            raise TypeError(f"files has the key {brief(key)}; the name of a file is a str")
        name = str.__str__(key)
        if why := why_not_attachable(name):
            raise ValueError(f"files[{brief(name)}]: no file can be attached under this name: {why}")
        if (other := folded.setdefault(folded_name(name), name)) != name:
            raise ValueError(
                f"files[{brief(other)}] and files[{brief(name)}] differ in case or accents alone, and some "
                "file systems take them for one"
            )
        if isinstance(value, (bytes, bytearray, memoryview)):
            sources[name] = bytes(value)  # at once: the caller may change its buffer
        elif isinstance(value, (str, os.PathLike)):
            sources[name] = Path(os.fsdecode(value))
        else:
            raise TypeError(f"files[{brief(name)}] must be bytes or a path, not {type(value).__name__}")
    return sources


def brief(value: object) -> str:
    """``repr`` for a message, whatever it is."""
    if isinstance(value, torch.Tensor):
        return f"<{value.dtype} tensor of shape {tuple(value.shape)}>"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"<an integer of {value.bit_length()} bits>"
    try:
        text = ascii(value)
    except Exception:  # its own code
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


class SaveArguments:
    """What was passed to one ``save``, as plain values. Raises ValueError or TypeError."""

    def __init__(
        self,
        step: Any,
        checkpoint_id: Any,
        notes: Any,
        files: Any,
        replace: Any,
        *,
        is_path: bool = False,
    ) -> None:
        """``is_path``: the name is that of a directory which nobody asks for by "latest"."""
        self.step: int | None = None if step is None else normal_step(step)
        self.checkpoint_id: str | None = None if checkpoint_id is None else normal_name(checkpoint_id)
        self.name: str | None = None
        """None if the engine counts."""
        if step is not None or checkpoint_id is not None:
            self.name = checkpoint_name(self.step, self.checkpoint_id)
        if self.checkpoint_id == "latest" and not is_path:
            raise ValueError("checkpoint_id='latest' would hide the newest checkpoint from load('latest')")
        if not isinstance(replace, bool):
            raise TypeError(f"replace={brief(replace)} must be True or False")
        self.replace: bool = replace
        self.notes: dict[str, JSON] = normal_notes(notes)
        self.files: dict[str, bytes | Path] = normal_files(files)


class SaveBook:
    """The saves of one engine. Safe to use from several threads, and from signal handlers that interrupt
    it: but for the numbering, which only verbs do, each change is one operation of a list or deque, which the
    interpreter does not divide."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._places: list[Place] = []
        """The first ``limit`` of them are taken, others are being asked for."""
        self._waiting: deque[SignalSafeFuture[None]] = deque()
        self._pending: list[ResponseWriter] = []
        self._failed: list[ResponseWriter] = []
        self._numbering = threading.Lock()
        """For threads that are inside of a verb; the loop never takes it."""
        self._next_step = 0
        self._ordinal = 0
        self._missed: dict[int, str] = {}
        """Ordinal -> name, of what this rank has not called in time."""

    def seen_steps(self, steps: Iterable[int]) -> None:
        """Count on from ``steps``, which lie under the root, committed or not; before the first save."""
        self._next_step = max([self._next_step, *(step + 1 for step in steps)])

    def take_place(self, place: Place) -> SignalSafeFuture[None] | None:
        """Take ``place`` for a new save; if there is none, a future that is done when to try again."""
        if self._try_place(place):
            return None
        room: SignalSafeFuture[None] = SignalSafeFuture()
        self._waiting.append(room)
        # one may have become free between the try and the queue; then nobody minds that the future is told
        return None if self._try_place(place) else room

    def _try_place(self, place: Place) -> bool:
        # entered first and looked at then: of two threads that come at once, the order of the list decides
        self._places.append(place)
        if self._places.index(place) < self._limit:
            return True
        _discard(self._places, place)
        return False

    def release(self, place: Place) -> None:
        """The place is not needed: the save did not start, or has ended. A second call changes nothing."""
        if _discard(self._places, place):
            # all of them: one that was interrupted has stopped waiting, and would keep the word to itself
            while True:
                try:
                    room = self._waiting.popleft()
                except IndexError:
                    return
                room.set_result(None)

    def admit(self, step: int | None, checkpoint_id: str | None) -> tuple[int, int | None]:
        """(ordinal, step) of a new save. A step is used up even if the save fails."""
        with self._numbering:
            if step is None and checkpoint_id is None:
                step = self._next_step
            if step is not None:
                self._next_step = max(self._next_step, step + 1)
            return self._take_ordinal(checkpoint_name(step, checkpoint_id)), step

    def next_ordinal(self) -> int:
        """The number of a verb that all ranks call."""
        with self._numbering:
            return self._take_ordinal(None)

    def _take_ordinal(self, name: str | None) -> int:
        self._ordinal += 1
        # the others have given up on these numbers, unless it is the very save that they waited for
        while self._missed.pop(self._ordinal, name) != name:
            self._ordinal += 1
        return self._ordinal

    def missed(self, ordinal: int, name: str) -> None:
        """The other ranks gave up waiting for this one to save ``name`` (or to call another verb) as number
        ``ordinal``. If it comes late, it is told; what it calls instead has the number after it, as on the
        other ranks."""
        if ordinal > self._ordinal:  # else the call was made while the word was on its way
            self._missed[ordinal] = name

    def in_flight(self, name: str) -> ResponseWriter | None:
        """The save under this name that has not ended yet, if there is one."""
        return next((other for other in self.pending() if other.response.checkpoint_id == name), None)

    def started(self, writer: ResponseWriter) -> None:
        """A save is in flight, in a place that was taken before."""
        self._pending.append(writer)

    def ended(self, writer: ResponseWriter) -> None:
        """A save is not in flight any more. Called once it is settled, or just before."""
        _discard(self._pending, writer)
        # looked through each time: handles do not tell when a failure is given to somebody, and what has been
        # seen must not pile up
        for other in (*self._failed, writer):
            is_unseen = other.unobserved_failure() is not None
            if is_unseen and other is writer and other not in self._failed:
                self._failed.append(other)
            elif not is_unseen and other is not writer:
                _discard(self._failed, other)
        self.release(writer.place)

    def holds(self, writer: ResponseWriter) -> bool:
        """Whether this save is in flight."""
        return writer in self._pending

    def pending(self) -> list[ResponseWriter]:
        """Saves in flight, oldest first."""
        return self._pending.copy()

    def has_unobserved(self) -> bool:
        """Whether a failure waits for somebody to look at it."""
        return any(writer.unobserved_failure() is not None for writer in self._failed.copy())

    def take_unobserved(self) -> list[SaveError]:
        """Failures that nobody was given yet; each is told once."""
        # taken out before it is looked at: of two threads that ask at once only one is given it
        taken = [writer for writer in self._failed.copy() if _discard(self._failed, writer)]
        return [error for writer in taken if (error := writer.unobserved_failure()) is not None]


def _discard(items: list[T], item: T) -> bool:
    """Remove it; False if somebody else has."""
    try:
        items.remove(item)
    except ValueError:
        return False
    return True
