"""One implementation of each verb for two worlds: verbs are generators that yield what they wait for.

``drive`` awaits it on the caller's loop, ``drive_blocking`` waits for it in the caller's thread. What a wait
raises, a cancellation or an interrupt included, is thrown into the verb at its ``yield``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Generator
from typing import Any, Protocol, TypeAlias, TypeVar

import anyio

from ._concurrency import Job

T = TypeVar("T")


class Waitable(Protocol):
    """Can be waited for in both worlds."""

    async def wait(self) -> Any: ...

    def result(self) -> Any: ...


Verb: TypeAlias = Generator[Waitable, Any, T]


class Ended:
    """Waits until a future is done, whatever its outcome, and looks at nothing."""

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self._future = future

    async def wait(self) -> None:
        await asyncio.wait({asyncio.wrap_future(self._future)})

    def result(self) -> None:
        concurrent.futures.wait({self._future})


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


async def drive(verb: Verb[T]) -> T:
    """Run ``verb`` from a coroutine."""
    try:
        waitable = next(verb)
        while True:
            try:
                value = await waitable.wait()
            except BaseException as error:
                waitable = verb.throw(error)
            else:
                waitable = verb.send(value)
    except StopIteration as end:
        result: T = end.value
        return result


def drive_blocking(verb: Verb[T]) -> T:
    """Run ``verb`` from a thread without a loop."""
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
