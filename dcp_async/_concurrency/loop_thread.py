"""A thread with an event loop of its own, and the coroutines that run on it as jobs.

Enters: coroutines, from any thread. Leaves: a future for each that is done only when the coroutine has really
ended, cancelled or not. Source: docs/adr/0001.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from ..errors import EngineStateError
from .signal_safe import SignalSafeFuture
from .waiting import Wait

logger = logging.getLogger(__name__)

T = TypeVar("T")


def default_loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's loop where it imports, asyncio's otherwise; never a policy, which would change the user's
    loops too."""
    try:
        import uvloop
    except ImportError:  # Windows, PyPy: it is not a requirement there
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _tamed(coro: Coroutine[Any, Any, T]) -> T:
    """``coro``, whose SystemExit or KeyboardInterrupt, raised by code of the user's, must not end the
    loop."""
    try:
        return await coro
    except (SystemExit, KeyboardInterrupt) as error:
        raise EngineStateError(f"{type(error).__name__} was raised on the engine's thread") from error


class Job(Generic[T]):
    """A coroutine that runs on a loop thread; ``future`` is done only when the coroutine has really ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T]) -> None:
        self.future: SignalSafeFuture[T] = SignalSafeFuture()
        self._loop = loop
        self._task: asyncio.Task[T] | None = None
        # made a task on the loop: one that another thread makes would not wake it
        loop.call_soon_threadsafe(self._start, coro)

    def _start(self, coro: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(_tamed(coro))
        # a task that is cancelled before its first step never touches what it was given
        self._task.add_done_callback(lambda _: coro.close())
        self._task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            # no CancelledError: a waiter would take it for a cancellation of its own
            self.future.set_exception(EngineStateError("the engine ended while this ran"))
        elif (error := task.exception()) is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(task.result())

    def cancel(self) -> None:
        """Ask the coroutine to stop; ``future`` tells when it has."""
        try:
            self._loop.call_soon_threadsafe(lambda: self._task is not None and self._task.cancel())
        except RuntimeError:  # the loop is closed: the coroutine has ended
            logger.debug("cancel() of a job whose loop is closed")

    def join(self) -> Wait[T]:
        """Waits for the coroutine's result. A cancelled waiter cancels it, and waits until it has ended."""
        return Wait(self.future, cancel=self.cancel)


class LoopThread:
    """A daemon thread that runs one event loop from ``start()`` to ``stop()``.

    It owns the loop and closes it. A daemon, so that it serves `atexit` callbacks, which come after all other
    threads were joined; that the interpreter waits for an upload is ExitGuard's business.
    """

    def __init__(
        self, name: str, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    ) -> None:
        self._factory = loop_factory or default_loop_factory()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._ready: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self.finished: concurrent.futures.Future[None] = concurrent.futures.Future()

    def __repr__(self) -> str:
        return f"<LoopThread {self._thread.name} {'alive' if self._thread.is_alive() else 'stopped'}>"

    def start(self) -> None:
        """Start the thread and return when its loop runs."""
        self._thread.start()
        self._loop = self._ready.result()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._factory) as runner:
                runner.run(self._main())
        except BaseException as error:
            if not self._ready.done():  # the loop could not be made: start() must not wait for it
                self._ready.set_exception(error)
            raise
        finally:
            self.finished.set_result(None)

    async def _main(self) -> None:
        # made here: it belongs to the loop
        self._stop = asyncio.Event()
        self._ready.set_result(asyncio.get_running_loop())
        await self._stop.wait()

    def is_current(self) -> bool:
        """Whether the caller runs on this thread."""
        return threading.current_thread() is self._thread

    def submit(self, coro: Coroutine[Any, Any, T]) -> Job[T]:
        """Run ``coro`` on the loop; callable from every other thread."""
        return Job(self._loop, coro)

    def call_soon(self, fn: Callable[..., object], *args: object) -> bool:
        """Call ``fn`` on the loop; False when the loop is closed and nothing will be called."""
        try:
            self._loop.call_soon_threadsafe(fn, *args)
        except RuntimeError:
            return False
        return True

    def stop(self) -> None:
        """Let the loop end; ``finished`` is done when the thread has closed it."""
        self.call_soon(lambda: self._stop.set())
