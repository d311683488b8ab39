"""The collector is paused for a burst and is afterwards as it was, whoever else pauses it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from dcp_async._concurrency.gc_pause import collection_paused


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


def test_it_is_paused_in_the_block_and_back_after_it() -> None:
    with collection_paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_is_back_after_an_error() -> None:
    with pytest.raises(KeyError), collection_paused():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()


@contextmanager
def other_thread_inside() -> Iterator[None]:
    """Another thread is in its block while this one is in here."""
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with collection_paused():
            inside.set()
            assert leave.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    try:
        yield
    finally:
        leave.set()
        thread.join()


def test_the_last_of_two_threads_brings_it_back() -> None:
    with ExitStack() as second:
        with collection_paused():
            second.enter_context(other_thread_inside())
        assert not gc.isenabled(), "the other thread is in its block"
    assert gc.isenabled()


@pytest.mark.parametrize("was_enabled", [True, False])
def test_a_child_forked_meanwhile_has_it_as_it_was(was_enabled: bool) -> None:
    if not was_enabled:
        gc.disable()
    with other_thread_inside():
        child = os.fork()
        if child == 0:
            as_it_was = gc.isenabled() is was_enabled
            with collection_paused():
                paused = not gc.isenabled()
            os._exit(0 if as_it_was and paused and gc.isenabled() is was_enabled else 1)
        _, status = os.waitpid(child, 0)
    assert status == 0
