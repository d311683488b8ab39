"""A future that holds no lock: a signal handler may interrupt any of its bytecodes and wait for anything.

``concurrent.futures.Future`` takes a lock in each of its methods. A thread that a handler interrupts inside
of one keeps it while the handler runs; a handler that then waits for a save would wait for ever, since the
engine's loop needs that lock to settle what the thread looked at. Here every step is one operation that the
interpreter does not divide: whoever registers looks again after it, whoever settles runs what is registered.
"""

from __future__ import annotations

import concurrent.futures
import logging
import math
import time
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
"""How long a thread waits at a stretch. A signal that comes just before it begins to wait, or that the system
gives to another thread, wakes it not at all; its handler runs once the interpreter is back."""

T = TypeVar("T")


class SignalSafeFuture(concurrent.futures.Future[T]):
    """A result that is set once, by one thread, and waited for by any number of threads and loops.

    It is a ``concurrent.futures.Future`` for ``asyncio.wrap_future``; it can't be cancelled, and
    ``concurrent.futures.wait``, which takes the other's locks, does not serve it: ``wait`` does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._outcome: tuple[T | None, BaseException | None] | None = None
        # a deque: append and popleft are one operation each, which no handler can come into
        self._callbacks: deque[Callable[[concurrent.futures.Future[T]], object]] = deque()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'done' if self.done() else 'pending'}>"

    def cancel(self) -> bool:
        return False

    def cancelled(self) -> bool:
        return False

    def running(self) -> bool:
        return self._outcome is None

    def set_running_or_notify_cancel(self) -> bool:
        return True

    def done(self) -> bool:
        return self._outcome is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done, ``timeout`` seconds at most; whether it is."""
        if self._outcome is None:
            # of this call alone: whatever interrupts it holds no lock that the loop needs
            bell = allocate_lock()
            bell.acquire()
            self.add_done_callback(lambda _: bell.release())
            deadline = math.inf if timeout is None else time.monotonic() + timeout
            rings = False
            while not rings and (left := deadline - time.monotonic()) > 0:
                rings = bell.acquire(timeout=min(left, _LOOK_SECONDS))
        return self._outcome is not None

    def result(self, timeout: float | None = None) -> T:
        if not self.wait(timeout):
            raise TimeoutError
        assert self._outcome is not None
        value, error = self._outcome
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # None only where T is

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if not self.wait(timeout):
            raise TimeoutError
        assert self._outcome is not None
        return self._outcome[1]

    def set_result(self, result: T) -> None:
        self._settle((result, None))

    def set_exception(self, exception: BaseException | None) -> None:
        self._settle((None, exception))

    def _settle(self, outcome: tuple[Any, BaseException | None]) -> None:
        if self._outcome is not None:
            raise concurrent.futures.InvalidStateError(f"{self!r} was settled before")
        self._outcome = outcome
        self._call_back()

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], object]) -> None:
        self._callbacks.append(fn)
        # after it: whoever settled in between may have looked before the append
        if self._outcome is not None:
            self._call_back()

    def _call_back(self) -> None:
        """Each callback is taken out by one thread only: the one that settles, or the one that comes late."""
        while True:
            try:
                fn = self._callbacks.popleft()
            except IndexError:
                return
            try:
                fn(self)
            except Exception as error:  # a waiter whose loop was closed meanwhile
                logger.debug("a waiter of %r could not be told: %s", self, error)
            except BaseException:
                self._call_back()  # the others must be told all the same
                raise
