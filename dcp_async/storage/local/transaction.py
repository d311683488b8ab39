"""One rank's files of one save, on a local (or mounted) file system.

Enters: parts of file images, then the metadata. Leaves: a checkpoint, or nothing. Invariant: what `.metadata`
names is on the medium, under the names and in the files that were written, when `.metadata` is linked.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import ParamSpec, TypeVar

from ..._concurrency import StuckThreadError
from ..._names import METADATA, manifest_file, temporary_metadata
from ..base import NO_NAMES
from ..calls import BlockingCalls
from .attached_names import give_names
from .files import DataFile, commit_mark, make_directory, read_exactly, refuse_link, sync, sync_directory
from .lease import Beat, Lease, remove_if_empty, sweep_directory, take_lease
from .public_names import PublicNames

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class LeasingCalls(BlockingCalls):
    """What a transaction needs of its storage."""

    beat: Beat
    lease_max_age: float


class LocalTransaction:
    """One rank's files of one save. Owns their descriptors and the lease."""

    def __init__(self, storage: LeasingCalls, directory: Path, uid: str, lease: Lease | None) -> None:
        self._storage = storage
        self._directory = directory
        self._uid = uid
        self._lease = lease
        """The leading rank's; None on the others."""
        self._paths: list[Path] = []
        self._files: dict[str, DataFile] = {}
        self._sealed: dict[str, DataFile] = {}
        """Open still: an inode that is held is not given to another file."""
        self._expected: Mapping[str, int] = {}
        """What is about to be published: file -> length."""
        self._stuck = False
        self._publishing = False
        self._published = False

    def __repr__(self) -> str:
        state = "published" if self._published else "open"
        return f"<LocalTransaction {self._directory.name} {self._uid} {state}>"

    @classmethod
    def begin(
        cls,
        storage: LeasingCalls,
        directory: Path,
        files: Mapping[str, int | None],
        shared: Mapping[str, int],
        uid: str,
        replace: bool,
        lead: bool,
    ) -> LocalTransaction:
        """Take the lease, if this rank leads, and make the files; those of ``shared`` are the leading rank's.
        Blocks."""
        if lead:
            refuse_link(directory)
            make_directory(directory)
            # early, so that nothing is written in vain; ``publish`` has the last word
            if not replace and commit_mark(directory) is not None:
                raise FileExistsError(
                    errno.EEXIST, "a checkpoint of this name is committed", os.fspath(directory)
                )
            # before the first file, which without it a sweeper would take for a leftover
            lease = take_lease(directory, uid)
            storage.beat.add(lease)
        else:
            lease = None
        transaction = cls(storage, directory, uid, lease)
        try:
            for name, nbytes in files.items():
                transaction._files[name] = DataFile(directory / name, nbytes)
                transaction._paths.append(directory / name)
            for name, nbytes in shared.items():
                # of their whole length from the beginning: which rank writes the last byte is not told
                transaction._files[name] = DataFile(directory / name, nbytes, made_by_another=not lead)
                if lead:
                    os.truncate(transaction._files[name].fd, nbytes)
        except BaseException:
            transaction._discard()
            raise
        return transaction

    async def _run(self, verb: str, path: Path, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            # a small call must not wait behind gigabytes of another save
            run = self._storage.run_bulk if verb in ("write", "sync") else self._storage.run
            return await run(verb, path, fn, *args, **kwargs)
        except StuckThreadError:
            self._stuck = True
            raise

    async def put(self, file: str, offset: int, buffer: memoryview) -> None:
        data = self._files[file]
        await self._run("write", data.path, data.write, offset, buffer)

    async def fetch(self, file: str, offset: int, buffer: memoryview) -> None:
        path = self._directory / file

        await self._run("read", path, read_exactly, path, offset, buffer)

    async def drop(self, files: Sequence[str]) -> None:
        def remove() -> None:
            for name in files:
                (self._directory / name).unlink()
                if name in self._sealed:
                    self._sealed.pop(name).close()

        await self._run("remove", self._directory, remove)

    async def seal(self, file: str) -> None:
        data = self._files[file]

        def seal() -> None:
            size = os.fstat(data.fd).st_size
            if data.nbytes is not None and size != data.nbytes:
                raise OSError(errno.EIO, f"it has {size} bytes instead of {data.nbytes}")
            # direct writes too: they reach the drive, but neither leave its cache nor make the length durable
            sync(data.fd)
            data.end_direct()

        await self._run("sync", data.path, seal)
        self._sealed[file] = self._files.pop(file)

    async def verify(self, files: Mapping[str, int]) -> None:
        self._expected = files
        await self._run("verify", self._directory, self._check)

    def _check(self) -> None:
        """Raises OSError unless everything that is about to be published is what was written."""
        why = (
            "the save was taken for dead and swept (did this process stand still for long?), or somebody "
            "removed its files; save again"
        )
        if self._lease is not None and not self._lease.is_held():
            raise OSError(errno.ESTALE, f"{self._lease.path.name} is gone: {why}")
        for name, nbytes in self._expected.items():
            try:
                status = os.stat(self._directory / name, follow_symlinks=False)
            except FileNotFoundError as error:
                raise OSError(errno.ESTALE, f"{name} is gone: {why}") from error
            mine = self._sealed.get(name)
            if mine is not None and not os.path.samestat(status, os.fstat(mine.fd)):
                raise OSError(errno.ESTALE, f"{name} is another file than the one that was written: {why}")
            if status.st_size != nbytes:
                raise OSError(errno.ESTALE, f"{name} has {status.st_size} bytes instead of {nbytes}: {why}")

    def hand_over(self) -> None:
        if self._lease is None:
            self._paths.clear()

    async def commit(
        self,
        metadata: bytes,
        manifest: bytes,
        *,
        replace: bool,
        public_names: Mapping[str, str] = NO_NAMES,
    ) -> None:
        lease = self._lease
        assert lease is not None, "only the rank that leads commits"
        final, names = self._directory / METADATA, PublicNames(self._directory, self._uid, public_names)
        temporary = self._directory / temporary_metadata(self._uid)
        await self._write_small(self._directory / manifest_file(self._uid), manifest)
        await self._write_small(temporary, metadata)

        def named(published: bytes, uids: Set[str]) -> Set[str]:
            if published == metadata:
                return uids & {self._uid}
            # another replace has published since. It could not sweep ours, whose lease was held, so that is
            # done here; what else its `.metadata` names is for others to say
            return uids if self._uid.encode() in published else uids - {self._uid}

        def publish() -> None:
            names.prepare()
            # the names of the data files, before `.metadata` names them
            sync_directory(self._directory)
            if self._stuck:  # a save that was given up meanwhile must not appear
                raise OSError(errno.ETIMEDOUT, "the save was given up before this call returned")
            self._check()
            if replace:
                os.rename(temporary, final)
            elif commit_mark(self._directory) is not None:  # stock's ranks may have been here meanwhile
                raise FileExistsError(
                    errno.EEXIST, "a checkpoint of this name is committed", os.fspath(final)
                )
            else:
                os.link(temporary, final)  # of two writers of one fresh name, one gets FileExistsError
            self._published = True  # whatever fails from here on, these files are the checkpoint's
            self._show(final, temporary, names, replace=replace)
            temporary.unlink(missing_ok=True)
            self._release_lease()
            self._close_files()
            try:
                sweep_directory(self._directory, named, max_age=self._storage.lease_max_age)
            except OSError as error:  # the checkpoint is there and durable; the next save sweeps again
                logger.warning("could not remove older files from %s: %s", self._directory, error)

        # before the call: should it hang, it may publish whenever it comes back
        self._publishing = True
        await self._run("publish", final, publish)

    def _show(self, final: Path, temporary: Path, names: PublicNames, *, replace: bool) -> None:
        """What was published is to be found under its public names, and after a power cut too."""
        try:
            names.give()
            sync_directory(self._directory)
            sync_directory(self._directory.parent)
        except OSError:
            # a save that fails must not appear; what replace overwrote can't come back
            if not replace and os.path.samefile(final, temporary):
                final.unlink()
                names.remove()
                self._published = False
            raise
        give_names(self._directory, self._uid)  # before the lease goes, by which a sweep would finish it

    async def _write_small(self, path: Path, content: bytes) -> None:
        def write() -> None:
            # "x": one that lies there is another save's, whose uid would be ours
            with open(path, "xb", buffering=0) as file:
                left = memoryview(content)
                while left:
                    left = left[file.write(left) :]
                sync(file.fileno())

        await self._run("write", path, write)

    async def abort(self) -> None:
        await self._run("remove", self._directory, self._discard)

    def _discard(self) -> None:
        if self._stuck and self._publishing:
            return  # a call that hangs may still publish: nothing is deleted, and the lease protects it
        if not self._stuck:
            # a thread that hangs in write() must never find its descriptor's number given to another file
            self._close_files()
        # what was published is the checkpoint's, and may be another rank's by now
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
        self._release_lease()
        if commit_mark(self._directory) is None:
            remove_if_empty(self._directory)

    def _close_files(self) -> None:
        for data in (*self._files.values(), *self._sealed.values()):
            data.close()
        self._files.clear()
        self._sealed.clear()

    def _release_lease(self) -> None:
        if self._lease is not None:
            self._storage.beat.discard(self._lease)
            self._lease.release()
