"""What code of the trainer's a verb is in, so that other ranks can say why they wait.

Enters: the caller's thread, around each call of a method of the user's. Leaves: the oldest call that has not
returned, for the engine's loop, which is free while the caller's thread hangs. Invariant: nothing is kept
once a call has returned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_current: ContextVar[Activity | None] = ContextVar("dcp_async_activity", default=None)


class Activity:
    """Of one engine; each thread that is in one of its verbs has its own entry."""

    def __init__(self) -> None:
        self._calls: dict[int, list[tuple[str, float]]] = {}

    def __repr__(self) -> str:
        return f"<Activity {list(self._calls.values())}>"

    @contextmanager
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
        calls = [call for stack in list(self._calls.values()) for call in stack[-1:]]
        if not calls:
            return None
        text, since = min(calls, key=lambda call: call[1])
        return text, time.monotonic() - since

    def _enter(self, text: str) -> None:
        self._calls.setdefault(threading.get_ident(), []).append((text, time.monotonic()))

    def _leave(self) -> None:
        stack = self._calls[threading.get_ident()]
        stack.pop()
        if not stack:
            del self._calls[threading.get_ident()]


@contextmanager
def user_code(method: str, of: object, name: str) -> Iterator[None]:
    """Around a call of ``method`` of an object that lies at ``name``."""
    activity = _current.get()
    if activity is None:
        yield
        return
    activity._enter(f"{type(of).__name__}.{method}() of {name!r}")
    try:
        yield
    finally:
        activity._leave()
