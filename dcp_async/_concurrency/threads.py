"""Threads and queues: the loop thread, threads for blocking calls, a queue that closes.

Enters: coroutines from any thread, blocking functions from the loop. Leaves: their results, never before they
ended. Invariant: a function that runs in one of our threads is joined even if the task that waits for it is
cancelled, because an abandoned copy would write into a buffer that belongs to the next save (docs/adr/0002).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, Generic, Never, ParamSpec, TypeVar

import anyio
import torch

from ..errors import EngineStateError
from .signal_safe import SignalSafeFuture

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")


def default_loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's loop where it imports, asyncio's otherwise; never a policy, which would change the user's
    loops too."""
    try:
        import uvloop
    except ImportError:  # Windows, PyPy: it is not a requirement there
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def first_failure(error: BaseException) -> BaseException:
    """The first of several: the others are its echo in sibling tasks, or lose nothing by not being told."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def run_unless(failing: Callable[[], Coroutine[Any, Any, Never]], fn: Callable[[], Awaitable[T]]) -> T:
    """``fn()``, cancelled when ``failing()`` raises. Raises what the first of them raises."""
    failed: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(failing)
            value = await fn()
            group.cancel_scope.cancel()
    except BaseExceptionGroup as errors:
        failed = first_failure(errors)
    if failed is not None:  # here it is the context of nothing
        raise failed
    return value


class NotStartedError(TimeoutError):
    """A blocking call waited too long for a thread; it will never run."""


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

    async def wait(self) -> T:
        """The coroutine's result, from any loop. A cancelled waiter cancels the job and waits until it has
        ended."""
        waiter = asyncio.wrap_future(self.future)
        try:
            await asyncio.wait({waiter})
        except asyncio.CancelledError:
            self.cancel()
            with anyio.CancelScope(shield=True):
                while not waiter.done():
                    # a native cancellation pierces the shield; what the job writes to must not be touched
                    # before
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait({waiter})
            waiter.exception()  # looked at: the cancellation is what the caller sees
            raise
        return waiter.result()

    def result(self) -> T:
        """The coroutine's result, for a thread without a loop. An interrupt, or what else a signal handler
        raises, cancels the job and waits until it ended."""
        try:
            self.future.wait()
        except BaseException:
            self.cancel()
            while not self.future.done():
                with contextlib.suppress(KeyboardInterrupt):
                    self.future.wait()
            raise
        return self.future.result()


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
            if not self._ready.done():
                self._ready.set_exception(error)
            raise
        finally:
            self.finished.set_result(None)

    async def _main(self) -> None:
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


class _Closed:
    """The mark that follows the last item of a Pipe."""


_CLOSED = _Closed()


class Pipe(Generic[T]):
    """An ``asyncio.Queue`` with a mandatory bound, ``async for``, and an end that several producers close
    together."""

    def __init__(self, bound: int, *, producers: int = 1) -> None:
        if bound < 1 or producers < 1:
            raise ValueError("a Pipe needs a bound and a number of producers of at least 1")
        self._queue: asyncio.Queue[T | _Closed] = asyncio.Queue(bound)
        self._producers = producers

    async def put(self, item: T) -> None:
        """Hand on ``item``; waits while the pipe is full."""
        await self._queue.put(item)

    async def close(self) -> None:
        """This producer is done; the last one ends the pipe for all its consumers."""
        self._producers -= 1
        if self._producers == 0:
            await self._queue.put(_CLOSED)

    def _take(self, item: T | _Closed) -> T | None:
        if isinstance(item, _Closed):
            self._queue.put_nowait(item)  # for the next consumer; there is room, since we just took it out
            return None
        return item

    async def __aiter__(self) -> AsyncIterator[T]:
        while (item := self._take(await self._queue.get())) is not None:
            yield item

    async def batch(self, limit: int) -> list[T]:
        """At least one item and whatever else waits already, ``limit`` at most; an empty list at the end."""
        items: list[T] = []
        item = self._take(await self._queue.get())
        while item is not None:
            items.append(item)
            if len(items) == limit or self._queue.empty():
                break
            item = self._take(self._queue.get_nowait())
        return items
