"""Where a storage's blocking calls run: threads of its own, each call with a deadline.

Enters: blocking functions, on the engine's loop. Leaves: what they return, or a StorageError that names verb
and path. Invariant: a call returns, fails, or its thread is replaced after the deadline.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import ParamSpec, TypeAlias, TypeVar

from .._concurrency import BlockingThreads, StuckThreadError, run_blocking
from ..errors import StorageError

P = ParamSpec("P")
T = TypeVar("T")
PathText: TypeAlias = "str | os.PathLike[str]"


class StuckCallError(StorageError, StuckThreadError):
    """A call to a storage did not return in time: whatever it touches must not be reused."""

    @classmethod
    def after(cls, verb: str, path: str, seconds: float | None) -> StuckCallError:
        """``seconds`` is None where nobody waits any more, because the process or the engine ends."""
        limit = (
            "in time, and the engine ends" if seconds is None else f"within {seconds:g} s (Timeouts.storage)"
        )
        message = f"cannot {verb} {path}: the storage did not answer {limit}"
        return cls(message, verb=verb, path=path, errno=errno.ETIMEDOUT)


class BlockingCalls:
    """Runs blocking calls under a deadline. Owns the threads that they run in; ``close()`` ends them."""

    def __init__(self, *, io_concurrency: int, timeout: float) -> None:
        self._io_concurrency = io_concurrency
        self._timeout = timeout
        self._small: BlockingThreads | None = None
        self._bulk: BlockingThreads | None = None
        self._removing: BlockingThreads | None = None

    @property
    def threads(self) -> BlockingThreads:
        """For small calls, which must not wait behind writes of other saves."""
        if self._small is None:
            # two: one that hangs, say on a dead mount, must not stop the next look
            self._small = BlockingThreads("dcp_async-fs", 2)
        return self._small

    @property
    def bulk_threads(self) -> BlockingThreads:
        """For reads, writes and syncs."""
        if self._bulk is None:
            self._bulk = BlockingThreads("dcp_async-io", self._io_concurrency)
        return self._bulk

    @property
    def removing_threads(self) -> BlockingThreads:
        """For removals, which take seconds where files are large, and for which no save waits."""
        if self._removing is None:
            self._removing = BlockingThreads("dcp_async-rm", 2)
        return self._removing

    async def run(
        self, verb: str, path: PathText, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a small call in a thread of ours; an OSError becomes a StorageError of ``verb`` and
        ``path``."""
        return await self._run_in(self.threads, verb, path, fn, *args, **kwargs)

    async def run_bulk(
        self, verb: str, path: PathText, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a call that moves many bytes, in threads that such calls share."""
        return await self._run_in(self.bulk_threads, verb, path, fn, *args, **kwargs)

    async def run_removal(
        self, verb: str, path: PathText, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a call that removes files, in threads of its own."""
        return await self._run_in(self.removing_threads, verb, path, fn, *args, **kwargs)

    async def _run_in(
        self,
        threads: BlockingThreads,
        verb: str,
        path: PathText,
        fn: Callable[P, T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        try:
            return await run_blocking(threads, self._timeout, fn, *args, **kwargs)
        except (StorageError, FileExistsError):  # the second is an answer: the name is taken
            raise
        except StuckThreadError as error:
            # abandoned, it was not the deadline that ended the wait
            seconds = None if threads.is_abandoned else self._timeout
            raise StuckCallError.after(verb, os.fspath(path), seconds) from error
        except OSError as error:  # here, where verb and path are known: the system's message names neither
            raise StorageError.of(verb, os.fspath(path), error) from error

    async def close(self) -> None:
        for threads in (self._small, self._bulk, self._removing):
            if threads is not None:
                threads.shutdown()
        # forgotten, so that threads start anew if somebody opens on it again
        self._small = self._bulk = self._removing = None

    def abandon(self) -> None:
        for threads in (self._small, self._bulk, self._removing):
            if threads is not None:
                threads.abandon()
