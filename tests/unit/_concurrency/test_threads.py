"""Threads are joined before anyone goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

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


class Hanging:
    """A call that has begun before whoever waits looks at the clock, and hangs until it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.released = threading.Event(), threading.Event()
        loop = asyncio.get_running_loop()
        hand_over = loop.run_in_executor

        def until_begun(executor: Any, call: Callable[[], object]) -> asyncio.Future[Any]:
            future = hand_over(executor, call)
            assert self.begun.wait(30)
            return future

        monkeypatch.setattr(loop, "run_in_executor", until_begun)

    def __call__(self) -> None:
        self.begun.set()
        self.released.wait(30)


async def test_run_blocking_gives_up_and_replaces_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, hanging = BlockingThreads("test", 1), Hanging(monkeypatch)
    with pytest.raises(StuckThreadError, match="did not return within"):
        await run_blocking(threads, 0, hanging)
    assert await run_blocking(threads, 30, lambda: "works again") == "works again"
    hanging.released.set()
    threads.shutdown(wait=False)


async def test_a_call_that_no_thread_took_in_time_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, hanging = BlockingThreads("test", 1), Hanging(monkeypatch)
    task = asyncio.create_task(run_blocking(threads, None, hanging))
    await asyncio.sleep(0)
    ran: list[str] = []
    with pytest.raises(TimeoutError, match="could not start within"):
        await run_blocking(threads, 0, ran.append, "late")
    hanging.released.set()
    await task
    await run_blocking(threads, None, ran.append, "next")
    assert ran == ["next"]
    threads.shutdown(wait=False)


async def test_abandoned_threads_are_waited_for_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, hanging = BlockingThreads("test", 1), Hanging(monkeypatch)
    task = asyncio.create_task(run_blocking(threads, None, hanging))
    await asyncio.sleep(0)
    threads.abandon()
    with pytest.raises(StuckThreadError, match="did not return in time"):
        await task
    with pytest.raises(TimeoutError, match="in time"):
        await run_blocking(threads, None, hanging)
    hanging.released.set()
    threads.shutdown()


async def test_run_blocking_runs_without_autograd(threads: BlockingThreads) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    copied = await run_blocking(threads, None, lambda: torch.zeros(2).copy_(parameter))
    assert not copied.requires_grad


async def test_run_blocking_raises_what_the_call_raises(threads: BlockingThreads) -> None:
    with pytest.raises(ZeroDivisionError):
        await run_blocking(threads, None, lambda: 1 / 0)
