"""A local file that appears whole, under its name, or not at all.

Enters: bytes at offsets. Leaves: a durable file, or nothing. Invariant: until it is published it has no name
where the file system can do without one, so that a kill leaves nothing of it behind but, between two calls of
a replace, all of it under a temporary name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

from ..storage.local import sync

# what kernels and file systems say that have no files without a name
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)


class NewFile:
    """Owns its descriptor, and its temporary name if it needs one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        self._is_named = False
        self._fd = self._opened()

    def _opened(self) -> int:
        if hasattr(os, "O_TMPFILE"):
            try:
                return os.open(self._path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
        fd = os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        self._is_named = True
        return fd

    def write(self, offset: int, content: bytes | memoryview) -> None:
        rest = memoryview(content)
        while rest:
            # a call may take less than it was given
            done = os.pwrite(self._fd, rest, offset)
            offset, rest = offset + done, rest[done:]

    def publish(self) -> None:
        """Make it durable, in place of what has its name."""
        # before it gets its name, or a power cut could leave the name to a part of it
        sync(self._fd)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not self._is_named and not self._linked(self._path.name, directory):
                # a link can't replace: through a name of its own, for a moment
                self._is_named = self._linked(self._temporary.name, directory)
            if self._is_named:
                os.replace(self._temporary, self._path)
                self._is_named = False
            sync(directory)
        finally:
            os.close(directory)

    def _linked(self, name: str, directory: int) -> bool:
        """Whether the file has ``name`` now, which nothing had before."""
        try:
            # only with a directory's descriptor does Python ask the system to follow the link in /proc
            os.link(f"/proc/self/fd/{self._fd}", name, dst_dir_fd=directory, follow_symlinks=True)
        except FileExistsError:
            return False
        return True

    def close(self) -> None:
        os.close(self._fd)
        if self._is_named:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)
