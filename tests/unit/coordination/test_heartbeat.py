"""How long a rank may have stood still before it must not decide for the others."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any, cast

import pytest

from dcp_async.coordination.heartbeat import Heartbeat
from dcp_async.coordination.store_channel import StoreChannel

TIMEOUT = 2.0


class Store:
    """Answers a beat when it is told to."""

    def __init__(self) -> None:
        self.asked: list[concurrent.futures.Future[list[int]]] = []

    def post_with(self, call: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future[list[int]]:
        self.asked.append(concurrent.futures.Future())
        return self.asked[-1]

    def beat(self) -> None:
        """Only named, never called."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("stopped", [TIMEOUT, TIMEOUT - 0.02, TIMEOUT - 0.39])
async def test_a_rank_doubts_itself_before_others_can_give_up_on_it(
    clock: Clock, stopped: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others count from the moment they asked, which may lie before the beat that this rank remembers: a rank
    that decides after a standstill of a bit less than the timeout decides for some that have given up."""
    store = Store()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr("dcp_async.coordination.heartbeat.asyncio.get_running_loop", lambda: clock)
    heartbeat = Heartbeat(
        channel=cast(StoreChannel, store),
        nonce="n",
        rank=0,
        timeout=TIMEOUT,
        watched=list,
        silent=lambda ranks, why: None,
        gone=lambda error: None,
    )
    beating = loop.create_task(heartbeat.run())
    try:
        await turn()
        assert heartbeat.steady()
        clock.now += stopped
        assert not heartbeat.steady()
        store.asked[0].set_result([])
        await turn()
        assert not heartbeat.steady(), "the word of those who gave up is on its way"
        clock.now += heartbeat.interval - 0.01
        assert not heartbeat.steady()
    finally:
        beating.cancel()


async def test_a_busy_moment_is_no_standstill(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr("dcp_async.coordination.heartbeat.asyncio.get_running_loop", lambda: clock)
    heartbeat = Heartbeat(
        channel=cast(StoreChannel, store),
        nonce="n",
        rank=0,
        timeout=TIMEOUT,
        watched=list,
        silent=lambda ranks, why: None,
        gone=lambda error: None,
    )
    beating = loop.create_task(heartbeat.run())
    try:
        await turn()
        clock.now += 3 * heartbeat.interval
        assert heartbeat.steady()
        store.asked[0].set_result([])
        await turn()
        assert heartbeat.steady()
    finally:
        beating.cancel()
