"""What stock's blocking calls need of ours: a loop, threads and a storage, for one save or one load.

Enters: a checkpoint's directory. Leaves: results of coroutines that ran on a loop of our own, since the
caller's thread may have one that runs. Invariant: whoever makes a CallResources closes it; what it began and
did not end is undone then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar, cast

from .._concurrency import BlockingThreads, LoopThread
from ..options import Limits, Timeouts
from ..storage import LocalStorage, Reader, Transaction
from ..trust import Trust

logger = logging.getLogger(__name__)

T = TypeVar("T")


def local_path(path: object) -> Path:
    """The directory that ``path`` names now. Raises TypeError; ValueError for an address."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"path={path!r} must be a directory's path, a str or PathLike of str")
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(
            f"path={text!r} is an address; this reads and writes local (and mounted) directories only"
        )
    whole = Path(os.path.abspath(os.path.expanduser(text)))
    if not text or not whole.name:
        raise ValueError(f"path={text!r} names no directory that a checkpoint could be")
    return whole


class CallResources:
    """The loop thread, the threads and the storage of one save or load. Owns all of them."""

    def __init__(self, directory: Path, *, io_concurrency: int, trust: Trust | None = None) -> None:
        """``directory``: the checkpoint's own; what is beside it is left alone."""
        trust = trust or Trust()
        self.timeouts = Timeouts()
        self.io_concurrency = max(io_concurrency, Limits().io_concurrency)
        self.storage = LocalStorage(
            directory.parent,
            io_concurrency=self.io_concurrency,
            timeout=self.timeouts.storage,
            lease_max_age=2 * self.timeouts.coordination,
            follow_links=trust.follow_links,
        )
        self.transactions: list[Transaction] = []
        """Those that were begun; the end of all undoes what was not committed or handed over."""
        self.readers: list[Reader] = []
        """Those that were opened."""
        self.threads = BlockingThreads("dcp_async-interop", 2)
        self._loop = LoopThread("dcp_async-interop")
        self._loop.start()
        self._closed = False

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """What ``coro`` gives. An interrupt cancels it, and is raised once it has ended."""
        return cast(T, self._loop.submit(coro).join().result())

    def close(self) -> None:
        """Undo what was not committed, and let everything go. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(RuntimeError):  # a loop that ended with the interpreter
            self.run(self._end())
        self._loop.stop()
        self.threads.shutdown()

    def close_elsewhere(self) -> None:
        """As ``close``, in a thread of its own: for the end of a thread, which must not wait for others."""
        # with a daemon's flag: asked for its own, a thread that is ending would be listed for ever
        thread = threading.Thread(target=self.close, name="dcp_async-interop-end", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the interpreter ends too; what it leaves is swept by a later save
            logger.debug("nothing is cleaned up: %s", error)

    async def _end(self) -> None:
        while self.transactions:
            transaction = self.transactions.pop()
            try:
                await transaction.abort()
            except Exception as error:  # the next save of this directory sweeps
                logger.warning("could not clean up after %r: %s", transaction, error)
        while self.readers:
            await self.readers.pop().close()
        await self.storage.close()
