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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import aiofiles
import anyio

from .._concurrency import StuckThreadError
from ..errors import StorageError
from .base import StoredCheckpoint
from .calls import BlockingCalls
from .files import (
    METADATA,
    DataFile,
    commit_mark,
    make_directory,
    rank_metadata_files,
    refuse_link,
    sync,
    sync_directory,
)
from .lease import Lease, remove_if_empty, sees_lease, sweep_directory, take_lease
from .listing import list_checkpoints
from .local_reader import LocalReader

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05
"""Between two looks for what another rank has made."""

P = ParamSpec("P")
T = TypeVar("T")


class LocalStorage(BlockingCalls):
    """A directory of checkpoints. Owns the threads that its blocking calls run in; ``close()`` ends them."""

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
        self.root = Path(os.path.abspath(os.path.expanduser(os.fsdecode(root))))
        self._max_age = lease_max_age
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
        directory = self.root / name
        since = time.monotonic()
        leads, begin = led_from is None, LocalTransaction._begin
        while True:
            seen = leads
            # the leading rank has taken its lease already; should it fail and take it away again, a
            # cancellation ends this wait
            while not seen:
                seen = await self.run("create", directory, sees_lease, directory, uid, since, led_from or "")
                if not seen:
                    await anyio.sleep(_LOOK_SECONDS)
            try:
                with anyio.CancelScope(shield=True):
                    return await self.run(
                        "create", directory, begin, self, directory, files, uid, replace, leads
                    )
            except StorageError as error:
                if leads or error.errno != errno.ENOENT:
                    raise
                logger.debug("%s went away with its lease: the rank that leads has failed", directory)

    async def list(self) -> Sequence[StoredCheckpoint]:
        return await self.run("list", self.root, list_checkpoints, self.root)

    async def remove(self, name: str) -> None:
        directory = self.root / name

        def remove() -> None:
            if directory.is_symlink():  # what it leads to is somebody else's
                directory.unlink()
                sync_directory(self.root)
                return
            # rank 0's comes first: without a `.metadata` it is what makes the checkpoint, with one it is dead
            # weight that must not come to life when `.metadata` goes
            for file in (*rank_metadata_files(directory).values(), METADATA):
                (directory / file).unlink(missing_ok=True)
            sync_directory(directory)
            sweep_directory(directory, max_age=self._max_age)
            sync_directory(self.root)

        await self.run("remove", directory, remove)

    async def sweep(self) -> None:
        def sweep() -> None:
            if not self.root.is_dir():
                return
            clean: dict[str, int] = {}
            for entry in os.scandir(self.root):
                try:
                    if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
                        continue
                    changed = entry.stat(follow_symlinks=False).st_mtime_ns
                    if self._clean.get(entry.name) == changed or sweep_directory(
                        Path(entry.path), max_age=self._max_age
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


class LocalTransaction:
    """One rank's files of one save. Owns their descriptors and the lease."""

    def __init__(self, storage: LocalStorage, directory: Path, uid: str, lease: Lease | None) -> None:
        self._storage = storage
        self._directory = directory
        self._uid = uid
        self._lease = lease
        """The leading rank's; None on the others."""
        self._paths: list[Path] = []
        self._files: dict[str, DataFile] = {}
        self._stuck = False
        self._publishing = False
        self._published = False

    def __repr__(self) -> str:
        state = "published" if self._published else "open"
        return f"<LocalTransaction {self._directory.name} {self._uid} {state}>"

    @classmethod
    def _begin(
        cls,
        storage: LocalStorage,
        directory: Path,
        files: Mapping[str, int | None],
        uid: str,
        replace: bool,
        lead: bool,
    ) -> LocalTransaction:
        if lead:
            refuse_link(directory)
            make_directory(directory)
            if not replace and commit_mark(directory) is not None:
                raise FileExistsError(
                    errno.EEXIST, "a checkpoint of this name is committed", os.fspath(directory)
                )
            lease = take_lease(directory, uid)
        else:
            lease = None
        transaction = cls(storage, directory, uid, lease)
        try:
            for name, nbytes in files.items():
                transaction._files[name] = DataFile(directory / name, nbytes)
                transaction._paths.append(directory / name)
        except BaseException:
            transaction._discard()
            raise
        return transaction

    async def _run(self, verb: str, path: Path, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            run = self._storage.run_bulk if verb in ("write", "sync") else self._storage.run
            return await run(verb, path, fn, *args, **kwargs)
        except StuckThreadError:
            self._stuck = True
            raise

    async def put(self, file: str, offset: int, buffer: memoryview) -> None:
        data = self._files[file]
        await self._run("write", data.path, data.write, offset, buffer)
        if self._lease is not None:
            self._lease.keep_alive()

    async def seal(self, file: str) -> None:
        data = self._files[file]

        def seal() -> None:
            size = os.fstat(data.fd).st_size
            if data.nbytes is not None and size != data.nbytes:
                raise OSError(errno.EIO, f"it has {size} bytes instead of {data.nbytes}")
            sync(data.fd)
            data.close()

        await self._run("sync", data.path, seal)
        del self._files[file]

    def hand_over(self) -> None:
        if self._lease is None:
            self._paths.clear()

    async def commit(self, metadata: bytes, manifest: bytes, *, replace: bool) -> None:
        lease = self._lease
        assert lease is not None, "only the rank that leads commits"
        final = self._directory / METADATA
        temporary = self._directory / f".metadata-{self._uid}.tmp"
        await self._write_small(self._directory / f"manifest-{self._uid}.json", manifest)
        await self._write_small(temporary, metadata)

        def publish() -> None:
            sync_directory(self._directory)
            if self._stuck:  # a save that was given up meanwhile must not appear
                raise OSError(errno.ETIMEDOUT, "the save was given up before this call returned")
            if replace:
                os.rename(temporary, final)
            elif commit_mark(self._directory) is not None:  # stock's ranks may have been here meanwhile
                raise FileExistsError(
                    errno.EEXIST, "a checkpoint of this name is committed", os.fspath(final)
                )
            else:
                os.link(temporary, final)  # of two writers of one fresh name, one gets FileExistsError
            self._published = True  # whatever fails from here on, these files are the checkpoint's
            try:
                sync_directory(self._directory)
                sync_directory(self._storage.root)
            except OSError:
                # a save that fails must not appear; what replace overwrote can't come back
                if not replace and os.path.samefile(final, temporary):
                    final.unlink()
                    self._published = False
                raise
            temporary.unlink(missing_ok=True)
            lease.release()
            try:
                sweep_directory(self._directory, max_age=self._storage._max_age)
            except OSError as error:  # the checkpoint is there and durable; the next save sweeps again
                logger.warning("could not remove older files from %s: %s", self._directory, error)

        self._publishing = True
        await self._run("publish", final, publish)

    async def _write_small(self, path: Path, content: bytes) -> None:
        try:
            # no `async with`: that closes through the loop's own executor, which refuses at interpreter exit
            file = await aiofiles.open(path, "xb", buffering=0, executor=self._storage.threads)
            try:
                written = 0
                while written < len(content):
                    written += await file.write(memoryview(content)[written:])
                await self._run("sync", path, sync, file.fileno())
            finally:
                await file.close()
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError.of("write", os.fspath(path), error) from error

    async def abort(self) -> None:
        await self._run("remove", self._directory, self._discard)

    def _discard(self) -> None:
        if self._stuck and self._publishing:
            return  # a call that hangs may still publish: nothing is deleted, and the lease protects it
        if (
            not self._stuck
        ):  # a thread that hangs in write() must never find its descriptor's number given to another file
            for data in self._files.values():
                data.close()
        self._files.clear()
        if not self._published and self._directory.exists():
            own = {path.name for path in self._paths}
            for name in os.listdir(self._directory):
                # the leading rank takes away what ranks that died have left
                mine = (
                    name in own
                    if self._lease is None
                    else self._uid in name and name != self._lease.path.name
                )
                if mine:
                    (self._directory / name).unlink(missing_ok=True)
        if self._lease is not None:
            self._lease.release()
        if commit_mark(self._directory) is None:
            remove_if_empty(self._directory)
