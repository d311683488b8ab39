"""Checkpoints in this process's memory, under names that all of the process shares.

Enters: parts of file images. Leaves: one frozen value per checkpoint. Invariant: what is published is never
written to again; what is not belongs to its transaction alone.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from ..base import NO_NAMES, NamesUids, StoredCheckpoint
from ..calls import BlockingCalls
from .files import Content, MemoryFile, read_pieces
from .root import LiveSave, MemoryCheckpoint, MemoryRoot, checked_name, refusal


class MemoryTransaction:
    """One save. Owns its bytes until they are published; they go when it does."""

    def __init__(
        self, calls: BlockingCalls, root: MemoryRoot, name: str, files: Mapping[str, int | None]
    ) -> None:
        self.save = LiveSave(name=name)
        self._calls = calls
        self._root = root
        self._path = f"{root.url}/{name}"
        self._files = {file: MemoryFile(nbytes) for file, nbytes in files.items()}
        self._sealed: dict[str, Content] = {}

    def __repr__(self) -> str:
        return f"<MemoryTransaction {self._path}>"

    async def put(self, file: str, offset: int, buffer: memoryview) -> None:
        await self._calls.run_bulk("write", f"{self._path}/{file}", self._files[file].write, offset, buffer)

    async def seal(self, file: str) -> None:
        complete = self._files[file].complete
        self._sealed[file] = await self._calls.run_bulk("sync", f"{self._path}/{file}", complete)
        del self._files[file]

    async def verify(self, files: Mapping[str, int]) -> None:
        self._root.check_lives(self.save)
        for file, nbytes in files.items():
            content = self._sealed.get(file)
            if content is None or len(content) != nbytes:
                has = "is not sealed" if content is None else f"has {len(content)} bytes"
                raise refusal(
                    "verify", f"{self._path}/{file}", errno.ESTALE, f"it {has}, instead of {nbytes} bytes"
                )

    def hand_over(self) -> None:
        """Nothing: there is no other rank."""

    async def commit(
        self,
        metadata: bytes,
        manifest: bytes,
        *,
        replace: bool,
        public_names: Mapping[str, str] = NO_NAMES,
    ) -> None:
        # the same bytes twice: nobody writes to them any more
        named = {name: self._sealed[file] for name, file in public_names.items()}
        checkpoint = MemoryCheckpoint(
            files=self._sealed | named, metadata=metadata, manifest=manifest, modified=time.time()
        )
        self._root.publish(self.save, checkpoint, replace=replace)
        # or whoever keeps the transaction would keep a checkpoint that was removed since
        self._files, self._sealed = {}, {}

    async def abort(self) -> None:
        self._root.discard(self.save)
        self._files, self._sealed = {}, {}


class MemoryReader:
    """Reads the checkpoint that it was opened on, whatever is published or removed since. Holds its bytes
    until ``close``."""

    def __init__(self, calls: BlockingCalls, path: str, checkpoint: MemoryCheckpoint) -> None:
        self._calls = calls
        self._path = path
        self._checkpoint: MemoryCheckpoint | None = checkpoint
        checkpoint.readers.add(self)

    def __repr__(self) -> str:
        return f"<MemoryReader {self._path}>"

    @property
    def _opened(self) -> MemoryCheckpoint:
        assert self._checkpoint is not None, "the reader is open"
        return self._checkpoint

    async def metadata(self) -> bytes:
        return self._opened.metadata

    async def rank_metadata(self) -> Mapping[int, bytes]:
        return {}  # stock's, which writes no checkpoint to this storage

    async def manifest(self) -> Sequence[bytes]:
        return (self._opened.manifest,)

    def _content(self, file: str) -> Content:
        content = self._opened.files.get(file)
        if content is None:
            raise refusal("open", f"{self._path}/{file}", errno.ENOENT, "the checkpoint has no such file")
        return content

    async def size(self, file: str) -> int:
        return len(self._content(file))

    async def read_into(
        self,
        file: str,
        pieces: Sequence[tuple[int, memoryview]],
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        content = self._content(file)
        await self._calls.run_bulk("read", f"{self._path}/{file}", read_pieces, content, pieces, arrived)

    async def give_back(self) -> None:
        """Nothing: the bytes are the checkpoint itself."""

    async def close(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.readers.discard(self)
        self._checkpoint = None


class MemoryStorage(BlockingCalls):
    """Checkpoints in this process's memory, as whole and as exclusive as on a disk, and gone with the
    process: for tests of training code, and for a state that is handed on within one process.

    Storages of one name share their checkpoints, whichever threads, loops and engines use them, as two
    engines on one directory do; ``CheckpointEngine("memory://run1")`` is on ``MemoryStorage("run1")``.
    Without a name a storage has its own. Owns the threads that copy; ``close()`` ends them and keeps the
    checkpoints.

    Memory: a checkpoint takes as many bytes as its files would on a disk. It is freed when it is replaced or
    removed, or ``clear`` is called, and no reader has it open any more; without a name also when the storage
    is no longer referred to. A save that fails or is dropped takes its bytes along.

    Ranks: one process sees it, so an engine over several refuses it in ``open()``; so does a forked child.
    """

    gives_public_names = True

    def __init__(self, name: str | None = None, *, io_concurrency: int = 2, timeout: float = 600.0) -> None:
        """
        Args:
            name: what stands behind `memory://`; None for a storage that nobody shares.
            io_concurrency: copies at a time.
            timeout: seconds after which a copy that does not return fails its save.
        """
        super().__init__(io_concurrency=io_concurrency, timeout=timeout)
        self._root = MemoryRoot(None) if name is None else MemoryRoot.of(checked_name(name))

    def __repr__(self) -> str:
        name = self._root.name
        return "MemoryStorage()" if name is None else f"MemoryStorage({name!r})"

    @staticmethod
    def clear(name: str) -> None:
        """Remove every checkpoint of this name; a save in flight will fail, a reader keeps what it opened."""
        MemoryRoot.of(checked_name(name)).clear()

    def refuse_ranks(self) -> NoReturn:
        """Raises: StorageError, which says why several ranks can't use this."""
        self._root.refuse_ranks()

    async def connect(self) -> None:
        self._root.list()  # refused in a forked child, now rather than at the first save
        assert self.bulk_threads is not None  # started now: at interpreter exit it would be too late

    async def begin(
        self,
        name: str,
        files: Mapping[str, int | None],
        *,
        uid: str,
        replace: bool,
        led_from: str | None = None,
    ) -> MemoryTransaction:
        if led_from is not None:
            self.refuse_ranks()
        transaction = MemoryTransaction(self, self._root, name, files)
        self._root.add(transaction.save, replace=replace)
        return transaction

    async def list(self) -> Sequence[StoredCheckpoint]:
        return self._root.list()

    async def remove(self, name: str, *, unless_read: bool = False) -> None:
        if self._root.pop(name, unless_read=unless_read) is None:
            raise refusal("remove", f"{self._root.url}/{name}", errno.ENOENT, "there is no such checkpoint")

    async def sweep(self, *, named: NamesUids) -> None:
        """Nothing: what a dead save wrote went with its transaction."""

    async def open(self, name: str) -> MemoryReader:
        path = f"{self._root.url}/{name}"
        checkpoint = self._root.get(name)
        if checkpoint is None:
            raise FileNotFoundError(errno.ENOENT, "no checkpoint of this name is committed", path)
        return MemoryReader(self, path, checkpoint)
