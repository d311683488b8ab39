"""What becomes of a future of ours, and of its waiter, when the waiter is cancelled, interrupted or late."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from dcp_async._concurrency import SignalSafeFuture, Wait, cancellation_point


async def begun(wait: Wait[Any]) -> asyncio.Task[Any]:
    task = asyncio.create_task(wait.wait())
    await turns()
    return task


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_cancelled_waiter_leaves_the_future_alone() -> None:
    future: SignalSafeFuture[int] = SignalSafeFuture()
    cancelled, patient = await begun(Wait(future)), await begun(Wait(future))
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert not future.done()
    future.set_result(3)
    assert await patient == 3


async def test_a_cancelled_waiter_that_cancels_waits_until_that_has_happened() -> None:
    future: SignalSafeFuture[int] = SignalSafeFuture()
    asked: list[str] = []
    task = await begun(Wait(future, cancel=lambda: asked.append("cancel")))
    for _ in range(2):  # the second pierces the shield
        task.cancel()
        await turns()
    assert asked == ["cancel"]
    assert not task.done(), "what it waits for still runs"
    future.set_exception(RuntimeError("it has ended"))
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_shielded_waiter_is_not_reached_by_a_cancelled_scope() -> None:
    future: SignalSafeFuture[int] = SignalSafeFuture()
    with anyio.CancelScope() as scope:
        scope.cancel()
        asyncio.get_running_loop().call_soon(future.set_result, 3)
        assert await Wait(future, shielded=True).wait() == 3
    assert not scope.cancelled_caught


async def test_a_waiter_that_is_late_gets_nothing_and_changes_nothing() -> None:
    future: SignalSafeFuture[int] = SignalSafeFuture()
    wait = Wait(future, timeout=0)
    assert await wait.wait() is None
    assert wait.result() is None
    future.set_result(3)
    assert await wait.wait() == wait.result() == 3


class Interrupted(SignalSafeFuture[int]):
    """An interrupt comes while a thread waits for it, once."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.waits += 1
        if self.waits == 1:
            raise KeyboardInterrupt
        self.set_result(3)  # what was cancelled has ended
        return super().wait(timeout)


@pytest.mark.parametrize("cancels", [True, False])
def test_an_interrupted_thread_waits_on_only_if_it_cancels(cancels: bool) -> None:
    future = Interrupted()
    asked: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        Wait(future, cancel=(lambda: asked.append("cancel")) if cancels else None).result()
    assert (asked, future.done()) == ((["cancel"], True) if cancels else ([], False))


async def test_a_cancellation_point_raises_what_the_task_was_told_and_else_nothing() -> None:
    passed: list[str] = []

    async def told_while_it_ran() -> None:
        await cancellation_point().wait()
        passed.append("nobody had cancelled")
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await cancellation_point().wait()
        passed.append("cancelled")

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(told_while_it_ran())
    assert passed == ["nobody had cancelled"]
    with anyio.CancelScope() as scope:
        scope.cancel()
        await cancellation_point().wait()
    assert scope.cancelled_caught
    assert cancellation_point().result() is None, "a thread without a loop has no cancellations"
