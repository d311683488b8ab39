"""Waiting for a future of ours in a thread: signals and deadlines."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dcp_async._concurrency import SignalSafeFuture

NEVER = 60.0
"""A limit that passing tests do not come near."""


@contextmanager
def given_to_another_thread(number: signal.Signals) -> Iterator[None]:
    """The system gives this signal to another thread than the one that runs the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_signal_that_does_not_wake_the_thread_is_handled_all_the_same() -> None:
    future: SignalSafeFuture[str] = SignalSafeFuture()
    waiter = threading.main_thread().ident
    assert threading.get_ident() == waiter, "signals are handled in the main thread"
    begun = threading.Event()

    def send() -> None:
        begun.wait()
        while sys._current_frames()[waiter].f_code is not SignalSafeFuture.wait.__code__:
            pass  # until the main thread is about to wait
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: future.set_result("handled"))
    sender = threading.Thread(target=send)
    sender.start()
    try:
        with given_to_another_thread(signal.SIGUSR1):
            begun.set()
            started = time.monotonic()
            assert future.wait(NEVER)
            assert time.monotonic() - started < NEVER / 2, "the handler ran when the wait was over"
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)
    assert future.result() == "handled"


@pytest.mark.parametrize("timeout", [0.0, -1.0, 0.01, 0.3])
def test_a_wait_ends_at_its_deadline(timeout: float) -> None:
    future: SignalSafeFuture[int] = SignalSafeFuture()
    assert not future.wait(timeout)
    with pytest.raises(TimeoutError):
        future.result(timeout)


def test_a_wait_ends_when_the_result_is_there() -> None:
    future: SignalSafeFuture[int] = SignalSafeFuture()
    threading.Thread(target=lambda: future.set_result(3)).start()
    assert future.wait(NEVER)
    assert future.result(0) == 3
