"""Read leases: that a checkpoint is being read, told by a shared lock on the file that makes it one.

Enters: `.metadata`, or rank 0's of stock's. Leaves: a lease of one reader, or the word that there are others.
Invariant: no reader waits for a lock, or fails for want of one: where there is none to be had, it reads on,
since what it has opened stays readable. Nothing is written, so a root that is read-only has leases too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ..base import InUseError

logger = logging.getLogger(__name__)

_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class ReadLease:
    """The shared lock of one reader. Owns a descriptor; it ends with ``release()`` or with the process."""

    def __init__(self, fd: int) -> None:
        """``fd``: of what makes the checkpoint one; stays the caller's."""
        self._fd: int | None = os.dup(fd)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:  # it is being removed, or this file system has no locks
            logger.debug("%d is read without a lease: %s", fd, error)
            self.release()

    def release(self) -> None:
        """A second call does nothing."""
        if self._fd is None:
            return
        with contextlib.suppress(OSError):
            # by name, not by closing alone: a forked child may have the descriptor too
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
        self._fd = None


@contextlib.contextmanager
def no_readers(mark: Path) -> Iterator[None]:
    """Within the block nobody takes a lease on ``mark``. Raises InUseError if somebody has one."""
    fd = _opened(mark)
    try:
        if fd is not None:
            _lock(fd, mark)
        yield
    finally:
        if fd is not None:
            os.close(fd)


def _opened(mark: Path) -> int | None:
    # to write, which NFS asks for an exclusive lock
    for mode in (os.O_RDWR, os.O_RDONLY):
        try:
            return os.open(mark, mode | _FLAGS)
        except FileNotFoundError:
            raise
        except OSError as error:
            logger.debug("%s can't be opened to be locked: %s", mark, error)
    return None


def _lock(fd: int, mark: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InUseError(
            f"checkpoint {mark.parent} is being read, by this process or another one; it can be removed when "
            "that has ended",
            verb="remove",
            path=os.fspath(mark.parent),
            errno=errno.EBUSY,
        ) from error
    except OSError as error:
        logger.debug("%s can't be locked: %s", mark, error)
