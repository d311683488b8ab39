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

import aiofiles

from .._concurrency import StuckThreadError
from ..errors import StorageError
from .calls import BlockingCalls
from .files import METADATA, ReadFile, rank_metadata_files

logger = logging.getLogger(__name__)


class LocalReader:
    """Reads one checkpoint. Owns the descriptors that it opened."""

    def __init__(self, storage: BlockingCalls, root: Path, directory: Path) -> None:
        self._storage = storage
        self._root = root
        self._directory = directory
        self._files: dict[str, ReadFile] = {}
        self._stuck = False

    async def _read_small(self, path: Path) -> bytes:
        try:
            file = await aiofiles.open(path, "rb", executor=self._storage.threads)
            try:
                content: bytes = await file.read()
            finally:
                await file.close()
        except OSError as error:
            raise StorageError.of("read", os.fspath(path), error) from error
        return content

    async def metadata(self) -> bytes:
        return await self._read_small(self._directory / METADATA)

    async def rank_metadata(self) -> Mapping[int, bytes]:
        paths = await self._storage.run("list", self._directory, rank_metadata_files, self._directory)
        return {rank: await self._read_small(path) for rank, path in paths.items()}

    async def manifest(self) -> Sequence[bytes]:
        paths = await self._storage.run(
            "list", self._directory, lambda: sorted(self._directory.glob("manifest-*.json"))
        )
        found = []
        for path in paths:
            try:
                found.append(await self._read_small(path))
            except StorageError as error:
                if error.errno != errno.ENOENT:  # removed by a replace since it was listed
                    raise
        return found

    def _open(self, file: str) -> ReadFile:
        if file not in self._files:
            path = self._directory / file
            root = os.path.realpath(self._root)
            if os.path.commonpath((os.path.realpath(path), root)) != root:
                raise OSError(
                    errno.EPERM, "the path leaves the root; a checkpoint may not name files outside of it"
                )
            self._files[file] = ReadFile(path)
        return self._files[file]

    async def size(self, file: str) -> int:
        return (await self._storage.run("open", self._directory / file, self._open, file)).nbytes

    async def read_into(
        self,
        file: str,
        pieces: Sequence[tuple[int, memoryview]],
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        def read() -> None:
            self._open(file).read(pieces, arrived)

        try:
            await self._storage.run_bulk("read", self._directory / file, read)
        except StuckThreadError:
            self._stuck = True
            raise

    async def give_back(self) -> None:
        files = list(self._files.values())

        def give_back() -> None:
            for file in files:
                file.give_back()

        try:
            await self._storage.run("close", self._directory, give_back)
        except (StorageError, StuckThreadError) as error:
            logger.debug("what was read stays in the page cache: %s", error)

    async def close(self) -> None:
        if (
            not self._stuck
        ):  # a thread that hangs in a read must never find its descriptor's number given away
            for file in self._files.values():
                file.close()
        self._files.clear()
