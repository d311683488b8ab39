"""Handlers of signals that ask for a save: set, chained, given back.

Enters: signals. Leaves: one call of ``notify`` for each, inside of the handler. Invariant: a handler that was
there before is called as well, and is there again afterwards; a process forked from this one, or one whose
engine is gone, gets its signals as if we had never been there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from ..errors import EngineStateError

_Previous = Callable[[int, FrameType | None], Any] | int | None


def check_main_thread(who: str) -> None:
    """Raises EngineStateError where Python lets nobody set a handler."""
    if threading.current_thread() is not threading.main_thread():
        raise EngineStateError(
            f"{who} sets signal handlers, which Python allows in the main thread alone: call it there, or "
            "send the work that is in this thread to another one"
        )


class SignalWatch:
    """The handlers of some signals, from ``install`` to ``restore``."""

    def __init__(self, signals: Sequence[int], notify: Callable[[int], object]) -> None:
        """``notify`` is called inside of the handler: it may take no lock that a thread of ours holds while
        it runs Python."""
        # raises ValueError for a number that is no signal
        self._signals, self._notify = tuple(map(signal.Signals, signals)), notify
        self._previous: dict[int, _Previous] = {}
        self._seen: set[int] = set()
        self._is_over = False
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<SignalWatch {', '.join(signum.name for signum in self._signals)}>"

    def install(self) -> None:
        """Set the handlers. Raises EngineStateError outside of the main thread; ValueError for a signal that
        can't be handled."""
        check_main_thread(repr(self))
        try:
            for signum in self._signals:
                # noted before: the signal may come with the next bytecode
                self._previous[signum] = signal.getsignal(signum)
                signal.signal(signum, self._handle)
        except (OSError, ValueError) as error:
            del self._previous[signum]
            self.restore()
            raise ValueError(f"{signum.name} can't be handled: {error}") from error

    def restore(self) -> None:
        """Set the handlers that were there before. Callable from every thread: in another one than the main
        thread, the next signal does it."""
        self._is_over = True
        if threading.current_thread() is threading.main_thread() and os.getpid() == self._pid:
            for signum in self._previous:
                # somebody has set another one since, and may call this one: it passes the signal on
                if signal.getsignal(signum) == self._handle:
                    self._give_back(signum)

    def _give_back(self, signum: int) -> None:
        previous = self._previous[signum]
        # None is one that C code set, which Python can't set again
        signal.signal(signum, signal.SIG_DFL if previous is None else previous)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        previous = self._previous[signum]
        # DataLoader's workers and other children are ended by the very signals that are watched here
        if self._is_over or os.getpid() != self._pid:
            if signal.getsignal(signum) == self._handle:
                self._give_back(signum)
                signal.raise_signal(signum)
            elif callable(previous):
                # the handler that called this one decides what else comes of the signal, another engine's too
                previous(signum, frame)
            return
        is_first = signum not in self._seen
        self._seen.add(signum)
        self._notify(signum)
        # the first Ctrl-C asks for a save; what Python or asyncio does at one would end the loop that is to
        # make it, and is what an impatient second one asks for
        if callable(previous) and not (signum == signal.SIGINT and is_first):
            previous(signum, frame)
