"""Calls of code that is not ours: what it raises becomes an error of the tree, how long it takes is known.

Enters: exceptions of the trainer's objects, of planners and of storages; the caller's thread, around each
call of a method of the user's. Leaves: whether an exception is to be told in words, and the words; the oldest
call that has not returned, for the engine's loop, which is free while the caller's thread hangs. Invariant:
what ends a program or a task stays itself; nothing is kept of a call that has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TypeVar

from .errors import CheckpointError, StorageError

T = TypeVar("T")

ENDINGS = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)
"""What nobody may take for a failure of the code that it went through."""


def is_foreign(error: BaseException) -> bool:
    """Whether ``error`` is none of the tree and ends nothing."""
    return not isinstance(error, (CheckpointError, *ENDINGS))


def words(error: BaseException) -> str:
    """Class and message of ``error``, whose ``__str__`` may be as broken as the rest of it."""
    kind = type(error).__name__
    try:
        text = str(error)
    except ENDINGS:
        raise
    except BaseException as second:  # the trainer's class: nothing of it can be relied on
        return f"{kind} (its message can't be told: {type(second).__name__})"
    return f"{kind}: {text}" if text else kind


class FillError(Exception):
    """Code that is not ours failed while ``names`` were read: a target would not take its bytes, or a leaf's
    class would not be made."""

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names


class PlannerError(ValueError):
    """A planner failed, or does not keep to DCP's protocol; the message names its class and method."""


@contextlib.contextmanager
def planner_code(planner: object, method: str) -> Iterator[None]:
    """Around a call of ``method``: what it raises becomes a PlannerError."""
    try:
        with user_code(method, planner, "the plan"):
            yield
    except ENDINGS:
        raise
    except BaseException as error:  # code of the user's: DCP's own exceptions are no Exceptions either
        raise PlannerError(f"{type(planner).__name__}.{method}() failed: {words(error)}") from error


def checked(planner: object, method: str, value: object, kind: type[T]) -> T:
    """``value``, which ``method`` gave. Raises PlannerError if it is of no ``kind``."""
    if not isinstance(value, kind):
        raise PlannerError(
            f"{type(planner).__name__}.{method}() gave {type(value).__name__}, not a {kind.__name__}"
        )
    return value


def pickled_plan(planner: object, method: str, plan: object) -> bytes:
    """A plan on its way to another rank, as a pickle like in stock: its classes may be of anybody's."""
    try:
        return pickle.dumps(plan)
    except ENDINGS:
        raise
    except BaseException as error:
        raise PlannerError(
            f"the plan that {type(planner).__name__}.{method}() gave can't be pickled for the other ranks: "
            f"{words(error)}"
        ) from error


@contextlib.contextmanager
def storage_errors(verb: str, path: str, *, passing: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """What a storage raises while ``verb`` is done on ``path`` is a StorageError, but for ``passing``."""
    try:
        yield
    except OSError as error:
        if not is_foreign(error):  # a StorageError is an OSError as well
            raise
        raise StorageError.of(verb, path, error) from error
    except BaseException as error:
        if not is_foreign(error) or isinstance(error, passing):
            raise
        raise StorageError(f"cannot {verb} {path}: {words(error)}", verb=verb, path=path) from error


_current: ContextVar[Activity | None] = ContextVar("dcp_async_activity", default=None)


class Activity:
    """Calls of the user's code that an engine's verbs are in, by thread."""

    def __init__(self) -> None:
        self._calls: dict[int, list[tuple[str, float]]] = {}

    def __repr__(self) -> str:
        return f"<Activity {list(self._calls.values())}>"

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """``user_code`` inside of it is noted here."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def oldest(self) -> tuple[str, float] | None:
        """(what, seconds since it was called) of the innermost call of the thread that has been in one for
        the longest; callable from every thread."""
        # copied first: threads enter and leave meanwhile, and the loop takes no lock that they hold
        calls = [call for stack in list(self._calls.values()) for call in stack[-1:]]
        if not calls:
            return None
        text, since = min(calls, key=lambda call: call[1])
        return text, time.monotonic() - since

    def _enter(self, text: str) -> None:
        # no lock: a thread changes no entry but its own, by one operation at a time
        self._calls.setdefault(threading.get_ident(), []).append((text, time.monotonic()))

    def _leave(self) -> None:
        stack = self._calls[threading.get_ident()]
        stack.pop()
        if not stack:
            del self._calls[threading.get_ident()]


@contextlib.contextmanager
def user_code(method: str, owner: object, name: str) -> Iterator[None]:
    """Around a call of ``method`` of ``owner``, which lies at ``name`` in the state."""
    # a context variable, not an argument: between the verb and this call lies the whole walk over the state
    activity = _current.get()
    if activity is None:
        yield
        return
    activity._enter(f"{type(owner).__name__}.{method}() of {name!r}")
    try:
        yield
    finally:
        activity._leave()
