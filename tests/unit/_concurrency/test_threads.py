"""Threads are joined before anyone goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import anyio
import pytest
import torch

from dcp_async._concurrency.threads import BlockingThreads, StuckThreadError, run_blocking


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
