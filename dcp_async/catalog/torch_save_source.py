"""One file of ``torch.save``, opened as if it were a checkpoint: its tensors are read where they lie in it.

Enters: the place of a directory and the name of a file in it. Leaves: Contents whose items are ranges
of that file. Invariant: the file's pickle is read under a Trust like any leaf, and before anything of it runs
the places of its records were checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import BlockingThreads, collection_paused
from ..errors import CorruptCheckpointError, LoadError, UntrustedCheckpointError
from ..formats import (
    ArchivedItems,
    ArchiveRecords,
    ContentError,
    MadeFile,
    Record,
    find_archive,
)
from ..info import VerifyReport
from ..storage import LocalPlace, LocalReader, Reader
from ..trust import Trust, UntrustedGlobal, is_zip, load_archived
from .contents import Contents
from .source_opener import SourceOpener
from .verification import Verification

_MOST_BYTES = 256 << 20
_WINDOW_BYTES = 64 << 10
"""So much is read at once where the headers of records lie close together."""
_NEAR_BYTES = 8 << 10


@contextlib.contextmanager
def archive_errors(name: str) -> Iterator[None]:
    """Whatever is wrong with the file ``name`` is told by an error of the tree."""
    try:
        yield
    except ContentError as error:
        raise LoadError(f"{name!r}: {error}", checkpoint_id=name) from error
    except UntrustedGlobal as error:
        short = error.name.rpartition(".")[2]
        narrow = f"it with Trust(safe_globals=({short},)), or " if error.allowable else ""
        raise UntrustedCheckpointError(
            f"{name!r} names {error.name}; nothing of it was run or loaded. If you trust it, allow {narrow}"
            "anything with Trust(unsafe=True)",
            checkpoint_id=name,
        ) from error
    except ValueError as error:
        raise CorruptCheckpointError(
            f"{name!r} is damaged, or no file of torch.save's: {error}; nothing was loaded",
            checkpoint_id=name,
        ) from error


class TorchSaveOpener(SourceOpener):
    """Opens one file of ``torch.save`` that holds a dict of names: by its directory and its pickle."""

    def __init__(
        self,
        place: LocalPlace,
        threads: BlockingThreads,
        metadata_of: Callable[[str], Awaitable[Metadata]],
        *,
        timeout: float,
        file: str,
        trust: Trust,
    ) -> None:
        """
        Args:
            timeout: as for SourceOpener.
            file: which one of the directory that is opened.
            trust: what its pickle may name.
        """
        super().__init__(place, threads, metadata_of, timeout=timeout)
        self._file = file
        self._trust = trust

    async def contents(self, name: str, reader: LocalReader) -> Contents:
        with archive_errors(name):
            return await self._contents(name, reader)

    async def _contents(self, name: str, reader: LocalReader) -> Contents:
        nbytes = await reader.size(self._file)
        records = await self._records(reader, nbytes)
        pickled = await self._read(reader, records.pickle.start, records.pickle.stop)
        if (order := records.byteorder) is not None:
            # one word is there; a forged length must not be read
            records.check_byteorder(await self._read(reader, order.start, min(order.stop, order.start + 16)))
        items = await self._items(reader, records, pickled)
        return Contents(
            info=self.info(name, nbytes=nbytes, num_files=1, producer="torch.save"),
            reader=_ArchiveReader(reader, self._file, items.made_name, items.made),
            metadata=Metadata(
                state_dict_metadata=dict(items.metas), planner_data=items.paths, storage_data={}
            ),
            # nothing vouches for the payload; by this ranks tell whether they have opened the same file
            digest=xxhash.xxh3_64_hexdigest(pickled + str(nbytes).encode()),
            manifest=None,
            locations=items.locations,
            transforms={},
            exotic=frozenset(items.exotic),
            strides=items.strides,
            digests={},
            image_bytes={},
            bare=frozenset([self._file]),
            tree=items.tree,
        )

    async def _items(self, reader: LocalReader, records: ArchiveRecords, pickled: bytes) -> ArchivedItems:
        # mostly one pass; each further one holds more, so this ends
        held: dict[str, bytes] = {}
        while True:
            # not on the loop: the pickle of many tensors takes seconds
            made = await self._threads.run(self._made, records, pickled, held)
            if isinstance(made, ArchivedItems):
                return made
            # what is more than bytes, as a sparse tensor, can't be made without them
            for key, record in made.items():
                held[key] = await self._read(reader, record.start, record.stop)

    def _made(
        self, records: ArchiveRecords, pickled: bytes, held: Mapping[str, bytes]
    ) -> ArchivedItems | dict[str, Record]:
        """The items, or the storages that have to be read before these can be made."""
        storages: dict[str, tuple[torch.UntypedStorage, Record]] = {}

        def memory(key: str, nbytes: int) -> torch.UntypedStorage:
            record = records.storage(key, nbytes)
            if key not in storages:
                storages[key] = _memory(nbytes, held.get(key)), record
            return storages[key][0]

        # a state of many tensors is as many objects, all of which live on
        with collection_paused():
            archived = load_archived(pickled, self._trust, memory)
            wanted = set(archived.wanted)
            if not wanted:
                known = {storage._cdata: (key, record) for key, (storage, record) in storages.items()}
                items = ArchivedItems(archived.value, known, self._file)
                wanted = items.wanted
            return {key: storages[key][1] for key in wanted} or items

    async def _records(self, reader: LocalReader, nbytes: int) -> ArchiveRecords:
        window, window_at, last = b"", 0, 0
        wants = find_archive(nbytes)
        try:
            start, length = next(wants)
            while True:
                stop = min(start + length, nbytes)
                if stop - start > _MOST_BYTES:
                    raise ValueError("it has a directory that no file of torch.save's would have")
                if not window_at <= start <= stop <= window_at + len(window):
                    # headers of small tensors are read together, those of large ones lie far apart
                    ahead = _WINDOW_BYTES if 0 < start - last < _NEAR_BYTES else 0
                    window_at, window = start, await self._read(reader, start, min(stop + ahead, nbytes))
                last = stop
                start, length = wants.send(window[start - window_at : stop - window_at])
        except StopIteration as end:
            records: ArchiveRecords = end.value
            return records

    async def _read(self, reader: Reader, start: int, stop: int) -> bytes:
        content = bytearray(max(stop - start, 0))
        if content:
            await reader.read_into(self._file, [(start, memoryview(content))])
        return bytes(content)

    async def verified(self, verification: Verification, contents: Contents) -> VerifyReport:
        # the older format has no checksums; by those of a zip its writer recorded
        head = await self._read(contents.reader, 0, min(contents.info.nbytes, 4))
        nbytes = contents.info.nbytes
        return await verification.run_whole(contents, self._file, nbytes, is_zip=is_zip(head))


def _memory(nbytes: int, content: bytes | None) -> torch.UntypedStorage:
    """A storage that holds ``content``, or is not there."""
    if content:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()
    untyped: Any = torch.UntypedStorage
    # on "meta" it takes no memory, however much a forged pickle asks for
    made: torch.UntypedStorage = untyped(nbytes, device="meta" if content is None else "cpu")
    return made


class _ArchiveReader:
    """Reads a file, and the items that were made up around ranges of it. Owns the file's reader."""

    def __init__(self, reader: LocalReader, file: str, made_name: str, made: MadeFile) -> None:
        self._reader = reader
        self._file = file
        self._made_name = made_name
        self._made = made

    async def metadata(self) -> bytes:
        return await self._reader.metadata()

    async def rank_metadata(self) -> Mapping[int, bytes]:
        return {}

    async def manifest(self) -> Sequence[bytes]:
        return []

    async def size(self, file: str) -> int:
        return self._made.nbytes if file == self._made_name else await self._reader.size(file)

    async def read_into(
        self,
        file: str,
        pieces: Sequence[tuple[int, memoryview]],
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        # ``arrived`` is for checksums of blocks, which made items have none of
        if file != self._made_name:
            await self._reader.read_into(file, pieces, arrived)
            return
        ranges: list[tuple[int, memoryview]] = []
        for offset, buffer in pieces:
            for start, piece in self._made.between(offset, offset + len(buffer)):
                begin = start - offset
                if isinstance(piece, bytes):
                    buffer[begin : begin + len(piece)] = piece
                else:
                    ranges.append((piece[0], buffer[begin : begin + piece[1] - piece[0]]))
        # one call for all of them, as for the pieces of any file
        if ranges:
            await self._reader.read_into(self._file, ranges)

    async def give_back(self) -> None:
        await self._reader.give_back()

    async def close(self) -> None:
        await self._reader.close()
