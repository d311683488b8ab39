"""One implementation of each verb for two worlds: verbs are generators that yield what they wait for.

``drive`` awaits it on the caller's loop, ``drive_blocking`` waits for it in the caller's thread. What a wait
raises, a cancellation or an interrupt included, is thrown into the verb at its ``yield``. Invariant: a thread
that is inside of a verb of an engine begins no other one of it, because that would wait for what only the
first can do; two threads, or two tasks of one thread, may.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from typing import Any, Protocol, TypeAlias, TypeVar

import anyio

from ..errors import EngineStateError
from .loop_thread import Job
from .signal_safe import SignalSafeFuture

T = TypeVar("T")


class Waitable(Protocol):
    """Can be waited for in both worlds."""

    async def wait(self) -> Any: ...

    def result(self) -> Any: ...


Verb: TypeAlias = Generator[Waitable, Any, T]


class Ended:
    """Waits until a future is done, whatever its outcome, ``timeout`` seconds at most; looks at nothing."""

    def __init__(self, future: SignalSafeFuture[Any], timeout: float | None = None) -> None:
        self._future, self._timeout = future, timeout

    async def wait(self) -> None:
        await asyncio.wait({asyncio.wrap_future(self._future)}, timeout=self._timeout)

    def result(self) -> None:
        self._future.wait(self._timeout)


class Persisting:
    """Waits for a job that goes on even if its waiter is cancelled; an anyio cancellation does not reach the
    waiter at all."""

    def __init__(self, job: Job[Any]) -> None:
        self._job = job

    async def wait(self) -> Any:
        waiter = asyncio.wrap_future(self._job.future)
        with anyio.CancelScope(shield=True):
            await asyncio.wait({waiter})
        return waiter.result()

    def result(self) -> Any:
        return self._job.future.result()


class Watched:
    """Waits for a job that goes on if its waiter is cancelled; the cancellation reaches the waiter."""

    def __init__(self, job: Job[Any]) -> None:
        self._job = job

    async def wait(self) -> Any:
        waiter = asyncio.wrap_future(self._job.future)
        await asyncio.wait({waiter})
        return waiter.result()

    def result(self) -> Any:
        return self._job.future.result()


class Inside:
    """Which threads run a verb of one engine at this moment: all of a blocking verb, of an awaited one what
    lies between two waits.

    No lock, and no context manager: a signal handler may interrupt every line here, and raise.
    """

    def __init__(self) -> None:
        self._verbs: dict[int, str] = {}

    def check(self, verb: str) -> None:
        """Raises EngineStateError if this thread is inside of a verb already."""
        outer = self._verbs.get(threading.get_ident())
        if outer is not None:
            raise EngineStateError(
                f"{verb}() was called from inside of {outer}() by the same thread (a signal handler that "
                f"interrupted it, a state_dict(), a pickling hook, a __del__): it would wait for itself. Set "
                f"a flag there, and call {verb}() from the training loop once {outer}() has returned"
            )

    def run(self, verb: str, fn: Callable[..., T], *args: Any) -> T:
        """``fn(*args)``, inside of ``verb``."""
        me = threading.get_ident()
        outer = self._verbs.get(me)  # a loop that runs inside of another one goes on with a verb of its own
        try:
            self._verbs[me] = verb
            result: T = fn(*args)
            return result
        finally:
            if outer is None:
                self._verbs.pop(me, None)
            else:
                self._verbs[me] = outer


async def drive(name: str, verb: Verb[T], inside: Inside) -> T:
    """Run ``verb`` from a coroutine. Raises EngineStateError if this thread is inside of one."""
    inside.check(name)
    try:
        waitable = inside.run(name, next, verb)
        while True:
            try:
                value = await waitable.wait()
            except BaseException as error:
                waitable = inside.run(name, verb.throw, error)
            else:
                waitable = inside.run(name, verb.send, value)
    except StopIteration as end:
        result: T = end.value
        return result


def drive_blocking(name: str, verb: Verb[T], inside: Inside) -> T:
    """Run ``verb`` from a thread without a loop. Raises EngineStateError if this thread is inside of one."""
    inside.check(name)
    value: T = inside.run(name, _drive_blocking, verb)
    return value


def _drive_blocking(verb: Verb[T]) -> T:
    try:
        waitable = next(verb)
        while True:
            try:
                value = waitable.result()
            except BaseException as error:
                waitable = verb.throw(error)
            else:
                waitable = verb.send(value)
    except StopIteration as end:
        result: T = end.value
        return result
