"""Bursts that make many objects at once, without the cyclic garbage collector.

Each of its full passes goes over every object of the process, some hundreds of thousands once torch is
imported, and a burst of new objects sets off one after the other: a third of the time that a load of 20,000
tensors took. Invariant: after the block the collector is as it was before, in a forked child as well. So a
``gc.disable()`` that another thread calls meanwhile is undone: the interpreter does not tell of it.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Pause:
    """Counts the blocks that several threads are in: the collector is the process's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._was_enabled = False

    def begin(self) -> None:
        with self._lock:
            if self._blocks == 0:
                self._was_enabled = gc.isenabled()
            self._blocks += 1  # before: a child that is forked in between enables once too often, not never
            gc.disable()

    def end(self) -> None:
        with self._lock:
            if self._blocks == 1 and self._was_enabled:
                gc.enable()
            self._blocks -= 1

    def forget(self) -> None:
        """In a forked child: the threads that were in a block do not exist there."""
        # anew: a thread that the child does not have may have held it at the fork
        self._lock = threading.Lock()
        if self._blocks and self._was_enabled:
            gc.enable()
        self._blocks = 0


_pause = _Pause()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pause.forget)


@contextmanager
def collection_paused() -> Iterator[None]:
    """No cyclic garbage collection in the block, which must not wait for anything."""
    _pause.begin()
    try:
        yield
    finally:
        _pause.end()
