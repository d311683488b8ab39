"""Pipes hold back who fills them, and end for all their consumers."""

from __future__ import annotations

import asyncio

import anyio

from dcp_async._concurrency.flow import Pipe


async def test_pipe_ends_for_all_consumers_after_its_last_producer() -> None:
    pipe: Pipe[int] = Pipe(2, producers=3)
    seen: list[int] = []

    async def produce(first: int) -> None:
        for item in range(first, first + 5):
            await pipe.put(item)
        await pipe.close()

    async def consume() -> None:
        seen.extend([item async for item in pipe])

    async with anyio.create_task_group() as group:
        for first in (0, 10, 20):
            group.start_soon(produce, first)
        for _ in range(4):
            group.start_soon(consume)
    assert sorted(seen) == [*range(5), *range(10, 15), *range(20, 25)]


async def test_pipe_batches_what_waits_already() -> None:
    pipe: Pipe[int] = Pipe(8)
    for item in range(5):
        await pipe.put(item)
    assert await pipe.batch(3) == [0, 1, 2]
    await pipe.close()
    assert await pipe.batch(3) == [3, 4]
    assert await pipe.batch(3) == []
    assert await pipe.batch(3) == []


async def test_pipe_holds_back_its_producer() -> None:
    pipe: Pipe[int] = Pipe(1)
    await pipe.put(0)
    blocked = asyncio.create_task(pipe.put(1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not blocked.done()
    assert await pipe.batch(1) == [0]
    await blocked
