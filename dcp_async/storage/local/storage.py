"""Checkpoints on a local (or mounted) file system: durable, atomic, with direct I/O where it is taken.

Enters: parts of file images. Leaves: a directory per checkpoint whose `.metadata` appears last. Invariant:
files that a `.metadata` names were synced before it was linked, and are removed only after it is gone or
names others.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import anyio

from ...errors import StorageError
from ..base import Glimpse, NamesUids, StoredCheckpoint
from .lease import Beat, sees_lease
from .listing import Listing, glimpse_checkpoints
from .reader import LocalReader
from .removal import remove_checkpoint, sweep_checkpoint
from .transaction import LeasingCalls, LocalTransaction

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05
"""Between two looks for what another rank has made."""

P = ParamSpec("P")
T = TypeVar("T")


def _absolute(root: object) -> Path:
    """``root`` as it is now: with the home directory for `~`, and where a later chdir() does not move it."""
    path = os.fspath(root) if isinstance(root, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise TypeError(f"root={root!r} must be a directory's path, a str or PathLike of str")
    if not path or "\0" in path:
        raise ValueError(f"root={path!r} is no path; the current directory is '.'")
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise ValueError(f"root={path!r}: there is no such user; a directory of that name is './{path}'")
    return Path(os.path.abspath(whole))


class LocalStorage(LeasingCalls):
    """A directory of checkpoints. Owns the threads that its blocking calls run in; ``close()`` ends them."""

    gives_public_names = True
    shares_files = True

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        io_concurrency: int = 2,
        timeout: float = 600.0,
        lease_max_age: float = 600.0,
        follow_links: bool = False,
    ) -> None:
        """
        Args:
            io_concurrency: blocking calls at a time.
            timeout: seconds after which a call that does not return fails its save.
            lease_max_age: seconds after which, on NFS and FUSE, a lease that nobody touched is taken for
            dead.
            follow_links: whether a checkpoint, or a file of one, may be a link out of the root. Only links
            that the root's owner made are followed, and only to what is that owner's.
        """
        if sys.platform == "win32":
            raise StorageError(
                "local storage is not supported on Windows: nobody has tested its locks and syncs there",
                verb="open",
                path=os.fspath(root),
            )
        super().__init__(io_concurrency=io_concurrency, timeout=timeout)
        self.root = _absolute(root)
        self.lease_max_age = lease_max_age
        self.beat = Beat(lease_max_age / 5)
        """Keeps the leases of its transactions young."""
        self._listing = Listing(self.root)
        self._follow_links = follow_links
        self._clean: dict[str, int] = {}
        """Directories in which a sweep found nothing to do -> when they last changed, so that the next one is
        quick."""
        self._unswept: set[str] = set()
        """Directories that could not be swept, each told once."""

    def __repr__(self) -> str:
        return f"LocalStorage({os.fspath(self.root)!r})"

    async def connect(self) -> None:
        def check() -> None:
            if self.root.exists() and not self.root.is_dir():
                raise NotADirectoryError(
                    errno.ENOTDIR, "it is a file; give a directory", os.fspath(self.root)
                )

        assert self.bulk_threads is not None  # started now: at interpreter exit it would be too late
        await self.run("open", self.root, check)

    async def begin(
        self,
        name: str,
        files: Mapping[str, int | None],
        *,
        uid: str,
        replace: bool,
        led_from: str | None = None,
    ) -> LocalTransaction:
        return await self.begin_shared(name, files, {}, uid=uid, replace=replace, led_from=led_from)

    async def begin_shared(
        self,
        name: str,
        files: Mapping[str, int | None],
        shared: Mapping[str, int],
        *,
        uid: str,
        replace: bool,
        led_from: str | None = None,
    ) -> LocalTransaction:
        directory = self.root / name
        since = time.monotonic()
        leads = led_from is None
        begin = LocalTransaction.begin
        while True:
            seen = leads
            # by looking, not by a message: that a rank sees it proves that all have one root. The leading one
            # has its lease already; should it fail and take that away again, a cancellation ends this wait
            while not seen:
                seen = await self.run("create", directory, sees_lease, directory, uid, since, led_from or "")
                if not seen:
                    await anyio.sleep(_LOOK_SECONDS)
            try:
                # a cancellation in between would lose the transaction, and with it files that nobody removes
                with anyio.CancelScope(shield=True):
                    return await self.run(
                        "create", directory, begin, self, directory, files, shared, uid, replace, leads
                    )
            except StorageError as error:
                if leads or error.errno != errno.ENOENT:
                    raise
                logger.debug("%s went away with its lease: the rank that leads has failed", directory)

    async def list(self) -> Sequence[StoredCheckpoint]:
        return await self.run("list", self.root, self._listing.look)

    async def glimpse(self, head_bytes: int) -> Sequence[Glimpse]:
        return await self.run("list", self.root, glimpse_checkpoints, self.root, head_bytes)

    async def remove(self, name: str, *, unless_read: bool = False) -> None:
        directory, max_age = self.root / name, self.lease_max_age
        await self.run_removal(
            "remove", directory, remove_checkpoint, directory, unless_read=unless_read, max_age=max_age
        )

    async def sweep(self, *, named: NamesUids) -> None:
        def sweep() -> None:
            if not self.root.is_dir():
                return
            clean: dict[str, int] = {}
            for entry in os.scandir(self.root):
                try:
                    if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
                        continue
                    # before the sweep: what changes meanwhile is looked at by the next one
                    changed = entry.stat(follow_symlinks=False).st_mtime_ns
                    if self._clean.get(entry.name) == changed or sweep_checkpoint(
                        Path(entry.path), named, max_age=self.lease_max_age
                    ):
                        clean[entry.name] = changed
                except FileNotFoundError:  # another sweeper or its owner was faster
                    logger.debug("%r went away while it was swept", entry.path)
                except OSError as error:  # one directory that can't be swept must not keep the others from it
                    if entry.name not in self._unswept:
                        self._unswept.add(entry.name)
                        logger.warning("can't sweep %r: %s", entry.path, error)
            self._clean = clean

        await self.run("sweep", self.root, sweep)

    async def open(self, name: str) -> LocalReader:
        reader = LocalReader(self, self.root, name, follow_links=self._follow_links)
        try:
            if why := await self.run("open", self.root / name, reader.enter):
                raise FileNotFoundError(errno.ENOENT, why, os.fspath(self.root / name))
        except BaseException:
            reader.release()
            raise
        return reader
