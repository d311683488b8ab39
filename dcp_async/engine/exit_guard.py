"""What happens to an engine that was left open when the main thread ended.

A thread of its own, which is no daemon, so that the interpreter waits for it, notices that the trainer's
threads have ended and drains. The engine stays open: `atexit` callbacks run after that, and what they save is
durable before `save` returns to them. Invariant: never a hang, never a silent loss; a save that the exit has
lost makes the process end with a status that is not 0.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from ..response import AsyncSaveResponse

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25


def main_has_ended() -> bool:
    """Whether this is called from an `atexit` callback, or by an object that the interpreter takes down: no
    thread that is not a daemon is left, and nobody looks at this process's work any more."""
    main = threading.main_thread()
    return sys.is_finalizing() or (threading.current_thread() is main and not main.is_alive())


class _GuardThread(threading.Thread):
    """A guard's thread, which other guards need not wait for."""


class ExitGuard:
    """Watches the trainer's threads for one engine. Owns a thread, until ``dismiss``."""

    def __init__(
        self, drain: Callable[[float], bool], release: Callable[[float], bool], limit: float
    ) -> None:
        """
        Args:
            drain: saves or aborts what is in flight, leaves the engine open; sets ``lost`` if something was.
            release: the same, and says goodbye to other ranks. Both return whether they did it within
                ``limit`` seconds; else they hang.
        """
        self.lost = False
        """Whether a save was lost, so that the process must not end with status 0."""
        self._drain, self._release, self._limit = drain, release, limit
        self._pid = os.getpid()
        self._dismissed = threading.Event()
        self._has_passed = main_has_ended()
        """Whether it is too late for ``atexit`` to call this one."""
        atexit.register(self._at_exit)
        if not self._has_passed:
            _GuardThread(target=self._watch, name="dcp_async-exit", daemon=False).start()

    def _watch(self) -> None:
        # polled: nothing tells that a thread has begun or ended, and each of them may save
        while not self._dismissed.wait(_POLL_SECONDS):
            if not any(map(_is_trainers, threading.enumerate())):
                if not self._drain(self._limit):
                    self._end("a storage call hangs; the process ends without waiting for it")
                if self.lost and _is_child():
                    self._end("it ran under multiprocessing, which calls no atexit callback")
                return

    def dismiss(self) -> None:
        """The engine has ended."""
        self._dismissed.set()
        if not self.lost:  # else it has to change the status of a process that ends later
            atexit.unregister(self._at_exit)

    def lose(self, what: str) -> None:
        """A save that was asked for while the process ends could not be made durable."""
        self.lost = True
        if self._has_passed:
            self._end(what)

    def _at_exit(self) -> None:
        if os.getpid() != self._pid:  # a forked child inherits the callback, not the engine
            return
        if not self._dismissed.is_set() and not self._release(self._limit):
            self._end("a storage call hangs; the process ends without waiting for it")
        self._has_passed = True
        if self.lost:
            self._end("not every save was made durable before the process ended")

    @staticmethod
    def _end(why: str) -> NoReturn:
        logger.critical("the process ends with status 1: %s", why)
        # what follows ends the process without handlers and flushes, so that the reason would be lost
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # pythonw has none
                stream.flush()
        # not sys.exit(): a thread and an `atexit` callback can't change the status of the process by raising
        os._exit(1)


def fail_unless_seen(response: AsyncSaveResponse) -> None:
    """``response`` is of a save that failed, and no engine will be closed that could raise it: if nobody has
    been given the failure by the end of the process, that ends with a status that is not 0."""
    pid = os.getpid()
    handles = response.staging_completion, response.upload_completion

    def at_exit() -> None:
        if os.getpid() == pid and not any(handle.observed for handle in handles):
            ExitGuard._end("a save failed, and nobody looked at its handles")

    atexit.register(at_exit)


def _is_trainers(thread: threading.Thread) -> bool:
    """Whether the interpreter waits for ``thread``, which may save until it ends."""
    return thread.is_alive() and not thread.daemon and not isinstance(thread, _GuardThread)


def _is_child() -> bool:
    """Whether `multiprocessing` started this process; such a one ends by ``os._exit``."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None
