"""The one way to wait for a future of ours, from a coroutine on any loop or in a thread without one.

Invariant: a waiter never cancels a future; it may ask for that, and then waits until it has happened.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Generic, TypeVar

import anyio

from .signal_safe import SignalSafeFuture

T = TypeVar("T")


class Wait(Generic[T]):
    """Waits until a future is done, and gives what it holds; None if it was not done in time.

    Cancellation, or an interrupt of the thread that waits: raised, and what was waited for goes on unless
    ``cancel`` says otherwise.
    """

    def __init__(
        self,
        future: SignalSafeFuture[T],
        *,
        cancel: Callable[[], object] | None = None,
        shielded: bool = False,
        timeout: float | None = None,
    ) -> None:
        """
        Args:
            future: what to wait for.
            cancel: called where the waiter is cancelled, which then waits on until the future is done.
            shielded: whether an anyio cancellation does not reach the waiter at all.
            timeout: seconds to wait at most.
        """
        self._future = future
        self._cancel = cancel
        self._shielded = shielded
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<Wait for {self._future!r}>"

    async def wait(self) -> T | None:
        """Wait in a coroutine."""
        waiter = asyncio.wrap_future(self._future)
        try:
            with anyio.CancelScope(shield=self._shielded):
                # wait() cancels nothing that it waits for, as awaiting the future itself would
                await asyncio.wait((waiter,), timeout=self._timeout)
        except asyncio.CancelledError:
            if self._cancel is not None:
                self._cancel()
                with anyio.CancelScope(shield=True):
                    while not waiter.done():
                        # a native cancellation pierces the shield; what the job writes to must not be touched
                        # before
                        with contextlib.suppress(asyncio.CancelledError):
                            await asyncio.wait((waiter,))
                waiter.exception()  # looked at: the cancellation is what the caller sees
            raise
        return waiter.result() if waiter.done() else None

    def result(self) -> T | None:
        """Wait in a thread without a loop."""
        try:
            self._future.wait(self._timeout)
        except BaseException:  # an interrupt, or what else a signal handler raises
            if self._cancel is not None:
                self._cancel()
                while not self._future.done():
                    with contextlib.suppress(KeyboardInterrupt):
                        self._future.wait()
            raise
        return self._future.result() if self._future.done() else None


def cancellation_point() -> Wait[None]:
    """Waits for nothing: raises a cancellation that the waiting task has been told of already."""
    future: SignalSafeFuture[None] = SignalSafeFuture()
    future.set_result(None)
    return Wait(future)
