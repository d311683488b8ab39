"""What flows inside of one save or load: bounded queues that close, and tasks that end together.

Invariant: a queue holds back its producers, and its end reaches all of its consumers; of several tasks that
fail together the first failure is the one that is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, Generic, Never, TypeVar

import anyio

T = TypeVar("T")


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
            # before ``fn``: a failure that is known already stops it at its first wait
            group.start_soon(failing)
            value = await fn()
            group.cancel_scope.cancel()  # ``failing`` would wait for ever
    except BaseExceptionGroup as errors:
        failed = first_failure(errors)
    if failed is not None:  # here it is the context of nothing
        raise failed
    return value


async def for_each(items: Iterable[T], fn: Callable[[T], Awaitable[object]], *, at_once: int) -> None:
    """``fn`` of each of ``items``, ``at_once`` at a time. Raises the first failure; it cancels the others."""
    following = iter(items)

    async def work() -> None:
        for item in following:  # shared: each takes the next one
            await fn(item)

    failed: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            for _ in range(at_once):
                group.start_soon(work)
    except BaseExceptionGroup as errors:
        failed = first_failure(errors)
    if failed is not None:  # here it is the context of nothing
        raise failed


class _Closed:
    """The mark that follows the last item of a Pipe."""


_CLOSED = _Closed()


class Pipe(Generic[T]):
    """An ``asyncio.Queue`` with a mandatory bound, ``async for``, and an end that several producers close
    together."""

    def __init__(self, bound: int, *, producers: int = 1) -> None:
        if bound < 1 or producers < 1:
            raise ValueError("a Pipe needs a bound and a number of producers of at least 1")
        # bounded: or what comes before a slow disk would run ahead of it without end
        self._queue: asyncio.Queue[T | _Closed] = asyncio.Queue(bound)
        self._producers = producers

    async def put(self, item: T) -> None:
        """Hand on ``item``; waits while the pipe is full."""
        await self._queue.put(item)

    async def close(self) -> None:
        """This producer is done; the last one ends the pipe for all its consumers."""
        self._producers -= 1
        if self._producers == 0:  # behind the last item of the slowest producer
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
