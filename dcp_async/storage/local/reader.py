"""Reads one checkpoint from a local (or mounted) file system.

Enters: the directory of a committed checkpoint. Leaves: the bytes of its files. Invariant: a file that was
opened once stays open until ``close``, and readable whatever happens to its name.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from ..._concurrency import StuckThreadError
from ..._names import METADATA
from ...errors import StorageError
from ..base import LinkError, UnreadableError
from ..calls import BlockingCalls
from .files import ReadFile, commit_mark, manifest_files, rank_metadata_files, why_no_checkpoint
from .read_lease import ReadLease
from .safe_open import CheckpointDirectory, read_small, unfit_entries

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class LocalReader:
    """Reads one checkpoint. Owns the descriptors that it opened, its directory's first."""

    def __init__(
        self, calls: BlockingCalls, root: Path, name: str, *, follow_links: bool, only_committed: bool = True
    ) -> None:
        self._calls = calls
        self._root = root
        self._name = name
        self._follow_links = follow_links
        self._only_committed = only_committed
        self._path = root / name
        self._directory: CheckpointDirectory | None = None
        self._files: dict[str, ReadFile] = {}
        self._lease: ReadLease | None = None
        # apart: a read that hangs does not use the directory, nor a look the files
        self._reading_hangs = False
        self._looking_hangs = False

    def enter(self) -> str:
        """Open the directory; why there is no checkpoint, "" if there is one. Blocks. Raises: LinkError;
        UnreadableError; OSError."""
        try:
            self._directory = CheckpointDirectory(self._root, self._name, follow_links=self._follow_links)
        except FileNotFoundError:
            return "there is no such directory"
        with unfit_entries("open", self._path):
            if not self._only_committed or commit_mark(self._directory.fd):
                return ""
            return why_no_checkpoint(self._directory.fd)

    @property
    def _opened(self) -> CheckpointDirectory:
        assert self._directory is not None, "the reader was entered"
        return self._directory

    async def _run(self, verb: str, path: Path, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that looks into the directory."""
        try:
            return await self._calls.run(verb, path, fn, *args, **kwargs)
        except StuckThreadError:
            self._looking_hangs = True
            raise

    async def _read_small(self, name: str, *, leased: bool = False) -> bytes:
        """``leased``: from here on others know that the checkpoint is being read."""
        path = self._path / name

        def read() -> bytes:
            with unfit_entries("read", path):
                fd = self._opened.open_file(name)
                if leased and self._lease is None:
                    self._lease = ReadLease(fd)
                return read_small(fd)

        try:
            return await self._run("open", path, read)
        except LinkError as error:  # nobody moves these away for their size: it is no checkpoint's
            raise UnreadableError(str(error), verb=error.verb, path=error.path, errno=errno.EPERM) from error

    async def metadata(self) -> bytes:
        return await self._read_small(METADATA, leased=True)

    async def rank_metadata(self) -> Mapping[int, bytes]:
        names = await self._run("list", self._path, rank_metadata_files, self._opened.fd)
        # rank 0's makes it a checkpoint
        return {rank: await self._read_small(name, leased=rank == 0) for rank, name in names.items()}

    async def names(self) -> list[str]:
        """The names of all that lies in the directory."""
        return sorted(await self._run("list", self._path, os.listdir, self._opened.fd))

    async def manifest(self) -> Sequence[bytes]:
        # all of them: which one counts is known by the digest of `.metadata`, which only its reader computes
        names = await self._run("list", self._path, manifest_files, self._opened.fd)
        manifests: list[bytes] = []
        unreadable: UnreadableError | None = None
        for name in names:
            try:
                manifests.append(await self._read_small(name))
            except UnreadableError as error:  # if it is not the one that counts, it does no harm
                unreadable = error
            except StorageError as error:
                if error.errno != errno.ENOENT:  # removed by a replace since it was listed
                    raise
        if unreadable is not None and not manifests:
            raise unreadable
        return manifests

    def _open(self, file: str) -> ReadFile:
        if file not in self._files:
            self._files[file] = ReadFile(self._opened.open_file(file))
        return self._files[file]

    async def size(self, file: str) -> int:
        return (await self._run("open", self._path / file, self._open, file)).nbytes

    async def read_into(
        self,
        file: str,
        pieces: Sequence[tuple[int, memoryview]],
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        if file not in self._files:  # opened by a thread for small calls: opening may wait for a server
            await self.size(file)
        try:
            await self._calls.run_bulk("read", self._path / file, self._files[file].read, pieces, arrived)
        except StuckThreadError:
            self._reading_hangs = True
            raise

    async def give_back(self) -> None:
        files = list(self._files.values())

        def give_back() -> None:
            for file in files:
                file.give_back()

        try:
            await self._calls.run("close", self._path, give_back)
        except (StorageError, StuckThreadError) as error:
            # a call that hangs uses the descriptors of the files, as a read does
            self._reading_hangs = self._reading_hangs or isinstance(error, StuckThreadError)
            logger.debug("what was read stays in the page cache: %s", error)

    async def close(self) -> None:
        self.release()

    def release(self) -> None:
        """Close the descriptors but those of calls that hang: their threads must never find a descriptor's
        number given to another file."""
        if not self._reading_hangs:
            for file in self._files.values():
                file.close()
        self._files.clear()
        if self._lease is not None:
            self._lease.release()
        if self._directory is not None and not self._looking_hangs:
            self._directory.close()
        self._directory = None
