"""One directory by its own path, read with threads that somebody else ends.

Enters: a path wherever it lies. Leaves: a LocalReader of it. Invariant: what is beside the directory is never
listed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from ..base import StoredCheckpoint
from ..calls import BlockingCalls
from .files import commit_mark
from .reader import LocalReader


class LocalPlace:
    """A storage to read from that holds one name. Owns nothing: any number of them share their calls."""

    def __init__(
        self, calls: BlockingCalls, path: Path, name: str, *, follow_links: bool, only_committed: bool
    ) -> None:
        """
        Args:
            path: the directory itself, without links.
            name: what it is called here.
            follow_links: as for LocalStorage; the root is the directory that ``path`` lies in.
            only_committed: whether it must have a `.metadata` to be opened.
        """
        self._calls = calls
        self._path = path
        self._name = name
        self._follow_links = follow_links
        self._only_committed = only_committed

    async def open(self, name: str) -> LocalReader:
        """A reader of the directory. Raises: FileNotFoundError that says why there is nothing to read;
        StorageError."""
        # its parent is what links out of are refused, and of the parent no more is asked
        path = self._path
        reader = LocalReader(
            self._calls,
            path.parent,
            path.name,
            follow_links=self._follow_links,
            only_committed=self._only_committed,
        )
        try:
            if why := await self._calls.run("open", path, reader.enter):
                raise FileNotFoundError(errno.ENOENT, why, os.fspath(path))
        except BaseException:
            reader.release()
            raise
        return reader

    async def list(self) -> Sequence[StoredCheckpoint]:
        """It alone. Raises: StorageError."""
        mark = await self._calls.run("list", self._path, commit_mark, self._path)
        modified = 0.0 if mark is None else mark.st_mtime
        return [StoredCheckpoint(name=self._name, committed=mark is not None, modified=modified)]
