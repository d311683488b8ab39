"""Which process replicates a near tier: one at a time, so that no two write the same files far.

Enters: a near storage. Leaves: a claim that dies with its process. Invariant: where near is no directory, it
is this process's memory or somebody's own storage, and one engine at a time has to see to it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import weakref

from ..base import Storage
from ..local import LocalStorage

_FILE = ".replicating"

# a forked child's copy of the descriptor would keep the lock alive after the parent's death
_live: weakref.WeakSet[Claim] = weakref.WeakSet()
_forking = threading.Lock()


def _drop_in_child() -> None:
    for claim in list(_live):
        claim.forget()
    _forking.release()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_drop_in_child)


class Claim:
    """The right to replicate ``near``. Owns a locked file in its root; ``release`` removes it."""

    def __init__(self, near: Storage) -> None:
        self._near = near
        self._fd: int | None = None

    async def take(self) -> bool:
        """Whether it is ours now. Raises: StorageError."""
        if not isinstance(self._near, LocalStorage):
            return True
        return await self._near.run("lock", self._near.root / _FILE, self._lock)

    def _lock(self) -> bool:
        assert isinstance(self._near, LocalStorage)
        path = self._near.root / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with _forking:
            fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # what was locked may be a file without a name by now
                is_ours = os.path.samestat(os.fstat(fd), os.stat(path))
            except (BlockingIOError, FileNotFoundError):
                is_ours = False
            except OSError as error:
                os.close(fd)
                if error.errno not in (errno.ENOTSUP, errno.ENOLCK):
                    raise
                return True  # a file system without locks: nothing can be told there
            if is_ours:
                self._fd = fd
                _live.add(self)
            else:
                os.close(fd)
            return is_ours

    def forget(self) -> None:
        """Close the file, whose lock is another process's."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def release(self) -> None:
        """Let another process have it."""
        if self._fd is not None:
            assert isinstance(self._near, LocalStorage)
            _live.discard(self)
            with contextlib.suppress(OSError):  # a directory that is gone takes its claim along
                (self._near.root / _FILE).unlink()
            self.forget()
