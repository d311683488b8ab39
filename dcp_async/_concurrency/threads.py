"""Threads for blocking calls, each of which is joined.

Enters: blocking functions, from a loop. Leaves: their results, never before they ended. Invariant: a
function that runs in one of our threads is joined even if the task that waits for it is cancelled, because an
abandoned copy would write into a buffer that belongs to the next save (docs/adr/0002).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import anyio
import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")


class NotStartedError(TimeoutError):
    """A blocking call waited too long for a thread; it will never run."""


class StuckThreadError(TimeoutError):
    """A blocking call did not return in time; its thread was replaced and whatever it touches must not be
    reused."""


def settle(future: asyncio.Future[None]) -> None:
    """Mark ``future`` done unless it is; to be called on its loop."""
    if not future.done():
        future.set_result(None)


class _WorkThread(threading.Thread):
    """A thread of some BlockingThreads."""


def on_work_thread() -> bool:
    """Whether the caller runs in a thread that serves blocking calls: a collected object's ``__del__``, or
    code that a load runs. What it would wait for may need this very thread."""
    return isinstance(threading.current_thread(), _WorkThread)


class BlockingThreads(concurrent.futures.Executor):
    """A few daemon threads for blocking calls, started at once.

    A ``ThreadPoolExecutor`` refuses work while the interpreter exits, just when a drain needs it. Owns its
    threads; ``shutdown()`` ends them. Every call runs under ``torch.no_grad()``: a Parameter copied in a new
    thread would otherwise record autograd although its caller does not.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._stuck: set[concurrent.futures.Future[Any]] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._abandoned = False
        self._waiters: set[asyncio.Future[None]] = set()
        for _ in range(num_threads):
            self._start_one()

    def __repr__(self) -> str:
        return f"<BlockingThreads {self._name} x{len(self._threads)}>"

    def _start_one(self) -> None:
        thread = _WorkThread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        with torch.no_grad():
            while (call := self._calls.get()) is not None:
                future, fn = call
                if future.set_running_or_notify_cancel():
                    try:
                        result = fn()
                    except StopIteration as error:  # no future takes one: its waiter would wait for ever
                        failure = RuntimeError(f"StopIteration: {error}")
                        failure.__cause__ = error
                        future.set_exception(failure)
                        del failure
                    except BaseException as error:
                        future.set_exception(error)
                    else:
                        future.set_result(result)
                        del result
                with self._lock:
                    if future in self._stuck:  # it came back after all; another thread has its place
                        self._stuck.discard(future)
                        return
                del call, future, fn

    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name} is shut down")
            # no lambda: its closure would live as long as the frames of an error that the call raises
            self._calls.put((future, functools.partial(fn, *args, **kwargs)))
        return future

    def replace_stuck(self, call: concurrent.futures.Future[Any]) -> None:
        """Start a thread in place of the one that hangs in ``call``, which ends itself should it come
        back."""
        with self._lock:
            if not call.done():
                self._stuck.add(call)
                try:
                    self._start_one()
                except RuntimeError as error:  # the interpreter is ending, and starts no thread any more
                    logger.warning("no thread takes the place of one that hangs: %s", error)

    @property
    def is_abandoned(self) -> bool:
        """Whether ``abandon`` was called."""
        return self._abandoned

    def abandon(self) -> None:
        """Stop waiting for calls that hang: their waiters get StuckThreadError; ``shutdown`` joins nobody."""
        with self._lock:
            self._abandoned = True
            waiters = list(self._waiters)
        for waiter in waiters:
            waiter.get_loop().call_soon_threadsafe(settle, waiter)

    @contextlib.contextmanager
    def abandonment(self) -> Iterator[asyncio.Future[None]]:
        """A future of the running loop that is done once ``abandon`` was called."""
        given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiters.add(given_up)
            if self._abandoned:
                given_up.set_result(None)
        try:
            yield given_up
        finally:
            with self._lock:
                self._waiters.discard(given_up)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            stuck = bool(self._stuck)
            for _ in self._threads:
                self._calls.put(None)
        if wait and not stuck and not self._abandoned:
            for thread in self._threads:
                thread.join()

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """``run_blocking`` with no deadline, for calls that touch neither buffers nor a disk."""
        return await run_blocking(self, None, fn, *args, **kwargs)


async def run_blocking(
    threads: BlockingThreads,
    timeout: float | None,  # noqa: ASYNC109  # a cancelled task must not leave its thread, as a cancel scope would
    fn: Callable[P, T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Run ``fn`` in a thread and never return before it has.

    Cancellation: the thread is joined first, then the cancellation goes on.
    Raises: what ``fn`` raises; StuckThreadError after ``timeout`` seconds, when the thread has been replaced.
    """
    loop = asyncio.get_running_loop()
    call = threads.submit(fn, *args, **kwargs)
    waiter = asyncio.wrap_future(call)
    deadline = None if timeout is None else loop.time() + timeout
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True), threads.abandonment() as given_up:
        while not waiter.done():
            left = None if deadline is None else deadline - loop.time()
            if given_up.done() or (left is not None and left <= 0):
                name = getattr(fn, "__qualname__", repr(fn))
                limit = "in time" if given_up.done() or timeout is None else f"within {timeout:g} s"
                if call.cancel():
                    raise NotStartedError(f"{name} could not start {limit}: the calls before it hang")
                threads.replace_stuck(call)
                # nobody will look at what the abandoned call returns
                waiter.add_done_callback(lambda done: done.cancelled() or done.exception())
                raise StuckThreadError(f"{name} did not return {limit}")
            pending: set[asyncio.Future[Any]] = {waiter, given_up}
            try:
                await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError as error:  # a native Task.cancel() pierces the shield, once
                cancelled = error
    if cancelled is not None:
        waiter.exception()
        raise cancelled
    waiter.exception()  # looked at, even if a cancellation comes first
    await anyio.lowlevel.checkpoint_if_cancelled()
    return waiter.result()
