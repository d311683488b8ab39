"""Threads are joined before anyone goes on; pipes end for all their consumers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import anyio
import pytest
import torch

from dcp_async import EngineStateError
from dcp_async._concurrency.threads import BlockingThreads, LoopThread, Pipe, StuckThreadError, run_blocking


@pytest.fixture
def threads() -> Iterator[BlockingThreads]:
    made = BlockingThreads("test", 2)
    yield made
    made.shutdown(wait=False)


async def test_run_blocking_joins_the_thread_when_its_task_is_cancelled(threads: BlockingThreads) -> None:
    started, release, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        release.wait(30)
        ended.set()

    task = asyncio.create_task(run_blocking(threads, None, work))
    await asyncio.get_running_loop().run_in_executor(None, started.wait, 30)
    task.cancel()
    task.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done(), "it went on while its thread could still write"
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_run_blocking_joins_the_thread_under_a_cancelled_scope(threads: BlockingThreads) -> None:
    started, release, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        release.wait(30)
        ended.set()

    async def cancel(scope: anyio.CancelScope) -> None:
        await asyncio.get_running_loop().run_in_executor(None, started.wait, 30)
        scope.cancel()
        asyncio.get_running_loop().call_later(0.01, release.set)

    with anyio.CancelScope() as scope:
        canceller = asyncio.create_task(cancel(scope))
        await run_blocking(threads, None, work)
    await canceller
    assert scope.cancelled_caught
    assert ended.is_set()


async def test_run_blocking_gives_up_and_replaces_the_thread() -> None:
    threads = BlockingThreads("test", 1)
    release = threading.Event()
    with pytest.raises(StuckThreadError, match="did not return within"):
        await run_blocking(threads, 0.01, release.wait, 30)
    assert await run_blocking(threads, 30, lambda: "works again") == "works again"
    release.set()
    threads.shutdown(wait=False)


async def test_run_blocking_runs_without_autograd(threads: BlockingThreads) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    copied = await run_blocking(threads, None, lambda: torch.zeros(2).copy_(parameter))
    assert not copied.requires_grad


async def test_run_blocking_raises_what_the_call_raises(threads: BlockingThreads) -> None:
    with pytest.raises(ZeroDivisionError):
        await run_blocking(threads, None, lambda: 1 / 0)


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


def test_loop_thread_runs_jobs_and_cancels_them_to_their_end() -> None:
    thread = LoopThread("test-loop", asyncio.new_event_loop)
    thread.start()
    started, ended = threading.Event(), threading.Event()

    async def work() -> str:
        return threading.current_thread().name

    async def hang() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    assert thread.submit(work()).result() == "test-loop"
    job = thread.submit(hang())
    assert started.wait(30)
    job.cancel()
    with pytest.raises(EngineStateError):
        asyncio.run(job.wait())
    assert ended.is_set()
    thread.stop()
    thread.finished.result(30)
    assert thread.call_soon(print) is False
