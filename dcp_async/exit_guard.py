"""What happens to an engine that was left open when the main thread ended.

Its loop thread is not a daemon, so the interpreter waits for it; the guard, a coroutine on that loop,
notices, drains for a while, aborts what is left, and makes the process end with a status that is not 0.
`atexit` would come too late for the drain, but serves the status. Invariant: never a hang, never a silent
loss.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25


class ExitGuard:
    """Watches the main thread for one engine."""

    def __init__(self, shut_down: Callable[[], Awaitable[None]], limit: float) -> None:
        """
        Args:
            shut_down: drains, aborts what could not be drained, releases; sets ``lost`` if anything was.
            limit: seconds after which it is taken for hanging.
        """
        self.lost = False
        """Whether a save was lost, so that the process must not end with status 0."""
        self._shut_down = shut_down
        self._limit = limit
        self._pid = os.getpid()
        atexit.register(self._fail)

    async def watch(self) -> None:
        """Return once the main thread has ended and everything was saved or given up."""
        while threading.main_thread().is_alive():  # noqa: ASYNC110  # a thread's end sets no event
            await asyncio.sleep(_POLL_SECONDS)
        try:
            await asyncio.wait_for(self._shut_down(), self._limit)
        except TimeoutError:
            logger.critical("a storage call hangs; the process ends without waiting for it")
            self._end()

    def dismiss(self) -> None:
        """The engine has ended."""
        if not self.lost:
            atexit.unregister(self._fail)

    def _fail(self) -> None:
        # runs after every thread that is not a daemon has ended, so the guard has made up its mind
        if self.lost and os.getpid() == self._pid:
            self._end()

    @staticmethod
    def _end() -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(1)
