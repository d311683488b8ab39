"""Jobs of a loop thread end before anyone is told that they have."""

from __future__ import annotations

import asyncio
import threading

import pytest

from dcp_async import EngineStateError
from dcp_async._concurrency.loop_thread import LoopThread


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

    assert thread.submit(work()).join().result() == "test-loop"
    job = thread.submit(hang())
    assert started.wait(30)
    job.cancel()
    with pytest.raises(EngineStateError):
        asyncio.run(job.join().wait())
    assert ended.is_set()
    thread.stop()
    thread.finished.result(30)
    assert thread.call_soon(print) is False
