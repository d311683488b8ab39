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
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar

import anyio

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")


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


class NotStartedError(TimeoutError):
    """A blocking call waited too long for a thread; it will never run, and touches nothing."""


class _Call(Generic[T]):
    """A blocking call as it is handed to an executor, with what it takes to join it.

    The future that ``run_in_executor`` gives ends with its cancellation, the thread does not. So whether the
    call has begun, in which thread, and whether it has ended is known here.
    """

    __slots__ = ("_work", "has_ended", "thread")

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = [work]
        """Taken out by the first who comes: the thread that runs it, or who gives it up."""
        self.has_ended = False
        self.thread: threading.Thread | None = None

    def __call__(self) -> T:
        """In the thread. Raises NotStartedError if it was withdrawn."""
        self.thread = threading.current_thread()
        try:
            # no local refers to it: the frames of what it raises would keep its buffers
            return self._take()()
        finally:
            self.has_ended = True

    def _take(self) -> Callable[[], T]:
        try:
            return self._work.pop()
        except IndexError:
            raise NotStartedError("this call was withdrawn") from None

    def withdraw(self) -> bool:
        """Keep it from running; False if it runs or has run already."""
        try:
            self._work.pop()
        except IndexError:
            return False
        return True


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
        self._stuck: set[threading.Thread | None] = set()
        """They hang, and others have their places."""
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._abandoned = False
        self._waiters: set[asyncio.Future[Any]] = set()
        for _ in range(num_threads):
            self._start_one()

    def __repr__(self) -> str:
        return f"<BlockingThreads {self._name} x{len(self._threads)}>"

    def _start_one(self) -> None:
        thread = _WorkThread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        me = threading.current_thread()
        with contextlib.ExitStack() as modes:
            records = True
            while (call := self._calls.get()) is not None:
                # not imported here: what lists checkpoints needs threads and no torch
                if records and (no_grad := getattr(sys.modules.get("torch"), "no_grad", None)) is not None:
                    modes.enter_context(no_grad())
                    records = False
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
                    if me in self._stuck:  # it came back after all
                        self._stuck.discard(me)
                        return
                # while it waits for the next call it must keep nothing of this one, an arena least of all
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

    def give_up(self, call: _Call[Any], name: str, limit: str) -> TimeoutError:
        """Nobody waits for ``call`` any more: it will not run, or another thread is started in place of the
        one that hangs in it, which ends itself should it come back. Gives what to raise."""
        if call.withdraw():
            return NotStartedError(f"{name} could not start {limit}: the calls before it hang")
        # under the lock, as the thread's own look: it either goes on to the next call or is replaced
        with self._lock:
            if not call.has_ended:
                self._stuck.add(call.thread)
                try:
                    self._start_one()
                except RuntimeError as error:  # the interpreter is ending, and starts no thread any more
                    logger.warning("no thread takes the place of one that hangs: %s", error)
        return StuckThreadError(f"{name} did not return {limit}")

    @property
    def is_abandoned(self) -> bool:
        """Whether ``abandon`` was called."""
        return self._abandoned

    def abandon(self) -> None:
        """Stop waiting for calls that hang: their waiters get StuckThreadError; ``shutdown`` joins nobody."""
        with self._lock:
            self._abandoned = True
            waiters = list(self._waiters)
        # each on its own loop: a stager is shared by engines, whose loops differ
        for waiter in waiters:
            waiter.get_loop().call_soon_threadsafe(waiter.cancel)

    @contextlib.contextmanager
    def abandonment(self, waiter: asyncio.Future[Any]) -> Iterator[None]:
        """``waiter`` is cancelled if ``abandon`` is called within the block, or was before."""
        with self._lock:
            self._waiters.add(waiter)
            # abandon() has either set this before, or finds the waiter after
            if self._abandoned:
                waiter.cancel()
        try:
            yield
        finally:
            with self._lock:
                self._waiters.discard(waiter)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            stuck = bool(self._stuck)
            # one for each that was ever started; what those that hang leave in the queue harms nobody
            for _ in self._threads:
                self._calls.put(None)
        # a daemon that hangs ends with the process; joined, it would take the engine's end with it
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
    # no lambda: its closure would live as long as the frames of an error that the call raises
    call = _Call(functools.partial(fn, *args, **kwargs))
    waiter = loop.run_in_executor(threads, call)
    deadline = None if timeout is None else loop.time() + timeout
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True), threads.abandonment(waiter):
        # waited for from outside: awaited, it would take each cancellation, and let go of the thread
        while not waiter.done():
            left = None if deadline is None else deadline - loop.time()
            if left is not None and left <= 0:
                waiter.cancel()
                break
            try:
                await asyncio.wait((waiter,), timeout=left)
            except asyncio.CancelledError as error:  # a native Task.cancel() pierces the shield, once
                cancelled = error
    if waiter.cancelled():  # by the deadline or abandon(): nobody will look at what the call returns
        limit = "in time" if threads.is_abandoned or timeout is None else f"within {timeout:g} s"
        raise threads.give_up(call, getattr(fn, "__qualname__", repr(fn)), limit)
    if cancelled is not None:
        waiter.exception()
        raise cancelled
    waiter.exception()  # looked at, even if a cancellation comes first
    await anyio.lowlevel.checkpoint_if_cancelled()
    return waiter.result()
