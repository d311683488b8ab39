"""Handlers of ours among those of others: chained, given back, and absent in children."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from dcp_async import EngineStateError
from dcp_async.schedule.signals import SignalWatch


@pytest.fixture(autouse=True)
def others() -> Iterator[list[int]]:
    """What a handler that was there before has heard of SIGTERM and SIGUSR1."""
    heard: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        heard.append(signum)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    interrupt = signal.getsignal(signal.SIGINT)
    yield heard
    for signum, handler in before.items():
        signal.signal(signum, handler)
    signal.signal(signal.SIGINT, interrupt)


def test_a_signal_is_told_and_the_handler_before_is_called(others: list[int]) -> None:
    told: list[int] = []
    watch = SignalWatch([signal.SIGTERM, signal.SIGUSR1], told.append)
    watch.install()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    watch.restore()
    signal.raise_signal(signal.SIGUSR1)
    assert told == [signal.SIGTERM, signal.SIGTERM]
    assert others == [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1]


def test_the_default_action_does_not_end_the_process() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    watch = SignalWatch([signal.SIGTERM], lambda signum: None)
    watch.install()
    signal.raise_signal(signal.SIGTERM)
    watch.restore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_first_interrupt_asks_and_the_second_one_interrupts() -> None:
    told: list[int] = []
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watch = SignalWatch([signal.SIGINT], told.append)
    watch.install()
    try:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        watch.restore()
    assert len(told) == 2


def test_a_handler_that_was_set_since_stays_and_may_call_ours(others: list[int]) -> None:
    told: list[int] = []
    watch = SignalWatch([signal.SIGTERM], told.append)
    watch.install()
    ours = signal.getsignal(signal.SIGTERM)
    assert callable(ours)
    signal.signal(signal.SIGTERM, lambda signum, frame: ours(signum, frame))
    watch.restore()
    signal.raise_signal(signal.SIGTERM)
    assert (told, others) == ([], [signal.SIGTERM]), "it passes the signal on to whom it belongs"


def test_nested_watches_may_end_in_any_order(others: list[int]) -> None:
    outer, inner = SignalWatch([signal.SIGTERM], print), SignalWatch([signal.SIGTERM], print)
    outer.install()
    inner.install()
    outer.restore()
    inner.restore()
    signal.raise_signal(signal.SIGTERM)
    assert others == [signal.SIGTERM]


def test_a_watch_that_is_over_does_not_end_the_process_beneath_one_that_is_not() -> None:
    told: list[int] = []
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if (child := os.fork()) == 0:  # it may die
        outer, inner = SignalWatch([signal.SIGTERM], print), SignalWatch([signal.SIGTERM], told.append)
        outer.install()
        inner.install()
        outer.restore()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        inner.restore()
        os._exit(len(told))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 2, "each signal is told, and nobody else's handler came back"


def test_a_forked_child_ends_by_the_signal() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    watch = SignalWatch([signal.SIGTERM], lambda signum: None)
    watch.install()
    try:
        if (child := os.fork()) == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)  # it survived
        _, status = os.waitpid(child, 0)
    finally:
        watch.restore()
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM


def in_thread(act: object) -> BaseException | None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()  # type: ignore[operator]
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_another_thread_is_told_that_it_can_not_set_handlers() -> None:
    error = in_thread(SignalWatch([signal.SIGTERM], print).install)
    assert isinstance(error, EngineStateError)
    assert "main thread" in str(error)


def test_what_another_thread_gives_back_is_back_at_the_next_signal(others: list[int]) -> None:
    told: list[int] = []
    watch = SignalWatch([signal.SIGTERM], told.append)
    watch.install()
    assert in_thread(watch.restore) is None
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert (told, others) == ([], [signal.SIGTERM, signal.SIGTERM])


def test_a_signal_that_can_not_be_handled_is_named_and_the_others_are_given_back(others: list[int]) -> None:
    with pytest.raises(ValueError, match="SIGKILL can't be handled"):
        SignalWatch([signal.SIGTERM, signal.SIGKILL], print).install()
    signal.raise_signal(signal.SIGTERM)
    assert others == [signal.SIGTERM]
