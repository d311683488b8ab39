"""Reads all of a checkpoint and tells what of it is damaged, instead of stopping at the first bad byte.

    survey -[Chunk]-> read and check -> DamagedRanges

Enters: a reader of one state of a checkpoint. Leaves: a VerifyReport. Ours is judged by the block checksums
in its footers, stock's by the CRC-32s in its zips. Invariant: what is reported whole was read in this call;
memory is a few chunks, whatever the files say.
"""

from __future__ import annotations

import errno
import logging
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeAlias

import anyio
from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import BlockingThreads, collection_paused, first_failure, run_blocking
from .._names import METADATA
from ..errors import CorruptCheckpointError, StorageError
from ..formats import (
    BLOCK_BYTES,
    RECORD_HEAD_BYTES,
    AttachedEntry,
    FileEntry,
    ItemKey,
    ManifestError,
    Record,
    block_digests,
    check_item,
    check_names,
    decode_manifest,
    find_records,
    locations_of,
    transforms_of,
)
from ..info import Producer, VerifyReport
from ..storage import LinkError, Reader, UnreadableError
from .attached_files import foreign_names, what_is_wrong
from .contents import Contents
from .damage import Damage, Item
from .decoding import RawMetadata, decoded, manifest_of
from .file_checks import footer_of

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 << 20
"""What one call reads; a multiple of a block. As many per reader are the memory that all of it takes."""
_DIRECTORY_BYTES = 64 << 20
"""A zip of torch's with 500,000 records has a directory of this length."""
_DAMAGE = (errno.EIO, errno.ENOENT, errno.ENODATA, errno.EBADMSG, errno.ESTALE, errno.EPERM)
"""What a medium says of bytes that are gone; anything else says that it can't be asked now."""


Progress: TypeAlias = Callable[[int, int], None]
"""Told how much has been done, and of how much."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes [start, stop) of a file that one call reads: blocks of ours, or whole items of stock's."""

    file: str
    start: int
    stop: int
    digests: array[int] | None
    items: Sequence[Item]


def _is_damage(error: StorageError) -> bool:
    return isinstance(error, UnreadableError) or error.errno in _DAMAGE


class Verification:
    """One reading of all of one checkpoint. Owns nothing; ``run`` is called once."""

    def __init__(
        self,
        name: str,
        reader: Reader,
        threads: BlockingThreads,
        *,
        io_concurrency: int,
        timeout: float,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            timeout: seconds, for each call in a thread.
            progress: told how many bytes were read, and of how many.
        """
        self._name = name
        self._reader = reader
        self._threads = threads
        self._io_concurrency = io_concurrency
        self._timeout = timeout
        self._damage = Damage()
        self._attached: dict[str, AttachedEntry] = {}
        self._chunks: list[Iterator[_Chunk]] = []
        self._unrecorded: dict[str, None] = {}
        self._nbytes = 0
        self._total_bytes = 0
        self._progress = progress

    async def run(self, raw: RawMetadata) -> VerifyReport:
        """Read what ``raw``, its `.metadata`, tells of, and all that belongs to it.

        Raises: StorageError if the medium can't be asked; LoadError, UntrustedCheckpointError as for opening.
        """
        begun = time.monotonic()
        entries = await self._survey(raw)
        files = dict.fromkeys([*(entries or ()), *self._damage.items])
        for file in files:
            await self._look_at(file, entries)
        for file, attached in self._attached.items():
            await self._check_attached(file, attached)
        known = [entry for entry in (entries or {}).values() if entry is not None]
        foreign = await foreign_names(self._reader, files, known, self._attached)
        num_files = len(files) + len(self._attached)
        return await self._report("stock" if entries is None else "dcp_async", num_files, begun, foreign)

    async def run_bare(self, contents: Contents) -> VerifyReport:
        """Read all that ``contents`` locate, of which nobody recorded a checksum. Raises StorageError if the
        medium can't be asked."""
        return await self._run_items(contents, contents.locations, packed=contents.locations.keys())

    async def run_whole(self, contents: Contents, file: str, nbytes: int, *, is_zip: bool) -> VerifyReport:
        """Read all of ``file``, which is one of ``torch.save``'s: a zip by its own CRC-32s. Raises as
        ``run_bare``."""
        key: ItemKey = (file, None)
        return await self._run_items(
            contents, {key: (file, 0, nbytes)}, packed=frozenset() if is_zip else {key}
        )

    async def _run_items(
        self,
        contents: Contents,
        locations: Mapping[ItemKey, tuple[str, int, int]],
        *,
        packed: Set[ItemKey],
    ) -> VerifyReport:
        begun = time.monotonic()
        self._list(locations, packed=packed)
        for file, items in self._damage.items.items():
            self._add_items(file, items)
        return await self._report(contents.info.producer, len(self._damage.items), begun)

    async def _report(
        self, producer: Producer, num_files: int, begun: float, foreign: tuple[str, ...] = ()
    ) -> VerifyReport:
        await self._read_all()
        # who verifies reads everything once: the trainer's pages shall not have to go for it
        await self._reader.give_back()
        return VerifyReport(
            checkpoint_id=self._name,
            producer=producer,
            damage=tuple(self._damage.merged()),
            unrecorded=tuple(self._unrecorded),
            num_files=num_files,
            foreign=foreign,
            nbytes=self._nbytes,
            seconds=time.monotonic() - begun,
        )

    async def _survey(self, raw: RawMetadata) -> Mapping[str, FileEntry | None] | None:
        """Where all items lie, and what is promised of the files: file -> entry of the manifest, where it is
        whole; None for stock's."""
        try:
            manifest = await manifest_of(self._name, self._reader, raw)
        except CorruptCheckpointError as error:
            return await self._survey_damaged(raw, error)
        try:
            await self._locate(await decoded(self._name, raw, self._threads))
        except CorruptCheckpointError as error:  # stock's, or written wrong: it is what the manifest names
            self._damage.add(METADATA, 0, sum(map(len, raw.values())), str(error))
        if manifest is None:
            return None
        self._attached = manifest.attached_files
        return {entry.name: entry for entry in manifest.files}

    async def _survey_damaged(
        self, raw: RawMetadata, error: CorruptCheckpointError
    ) -> Mapping[str, FileEntry | None]:
        """`.metadata` or the manifest is damaged: whatever is left tells what the data files are."""
        contents = await self._reader.manifest()
        whole = []
        for content in contents:
            try:
                whole.append(decode_manifest(content))
            except ManifestError as problem:
                logger.debug("a manifest of %r is damaged: %s", self._name, problem)
        if whole:  # each has a checksum of itself, so it is `.metadata` that has changed
            self._damage.add(METADATA, 0, len(raw[None]), str(error))
            for manifest in whole:
                self._attached |= manifest.attached_files
            return {entry.name: entry for manifest in whole for entry in manifest.files}
        metadata = await decoded(self._name, raw, self._threads)
        await self._locate(metadata)
        file = getattr(metadata.storage_meta, "save_id", None) or "manifest-*.json"
        self._damage.add(file, 0, max(map(len, contents), default=0), str(error))
        return dict.fromkeys(self._damage.items)

    async def _locate(self, metadata: Metadata) -> None:
        with collection_paused():
            packed = transforms_of(self._name, metadata)
            self._list(locations_of(self._name, metadata), packed=packed.keys())

    def _list(self, locations: Mapping[ItemKey, tuple[str, int, int]], *, packed: Set[ItemKey]) -> None:
        for key, (file, offset, length) in locations.items():
            item = Item(offset, offset + length, key[0], key in packed)
            self._damage.items.setdefault(file, []).append(item)
        for items in self._damage.items.values():
            items.sort(key=lambda item: item.start)

    async def _look_at(self, file: str, entries: Mapping[str, FileEntry | None] | None) -> None:
        """Open ``file``, and list what of it is to be read."""
        items = self._damage.items.get(file, [])
        end = max((item.stop for item in items), default=0)
        entry = entries.get(file) if entries is not None else None
        try:
            nbytes = await self._reader.size(file)
        except StorageError as error:
            # behind a link that is not followed all may be whole: nobody can say, and that is an error
            if isinstance(error, LinkError) or not _is_damage(error):
                raise
            self._damage.add(file, 0, entry.nbytes if entry else end, str(error))
            return
        promised = entry.nbytes if entry else None
        if nbytes < end or promised not in (None, nbytes):
            expected = f"at least {end}" if promised is None else str(promised)
            self._damage.add(file, 0, max(promised or 0, end), f"it has {nbytes} bytes instead of {expected}")
            return
        if entries is None or file not in entries:  # stock's, or of another directory
            if entries is not None and "/" not in file:
                self._damage.add(file, 0, end, ".metadata names it, the manifest does not")
            self._add_items(file, items)
            return
        try:
            footer = await footer_of(self._name, self._reader, file, nbytes, entry)
        except CorruptCheckpointError as error:
            # nothing else tells whether its blocks are whole
            self._damage.add(file, 0, nbytes, str(error))
            return
        self._chunks.append(self._chunks_of_blocks(file, footer.image_bytes, footer.digests))
        self._total_bytes += footer.image_bytes

    def _add_items(self, file: str, items: Sequence[Item]) -> None:
        self._chunks.append(self._chunks_of_items(file, items))
        self._total_bytes += sum(item.stop - item.start for item in items)

    async def _check_attached(self, file: str, entry: AttachedEntry) -> None:
        try:
            why = await what_is_wrong(self._reader, file, entry)
        except StorageError as error:
            if isinstance(error, LinkError) or not _is_damage(error):
                raise
            why = str(error)
        if why:
            self._damage.add(file, 0, entry.nbytes, f"{why}; it holds {entry.name!r}")
        else:
            self._nbytes += entry.nbytes

    def _chunks_of_blocks(self, file: str, nbytes: int, digests: array[int]) -> Iterator[_Chunk]:
        for start in range(0, nbytes, _CHUNK_BYTES):
            stop = min(start + _CHUNK_BYTES, nbytes)
            yield _Chunk(file, start, stop, digests[start // BLOCK_BYTES : -(-stop // BLOCK_BYTES)], ())

    def _chunks_of_items(self, file: str, items: Sequence[Item]) -> Iterator[_Chunk]:
        """Neighbours that fit into one call, and each larger one by itself."""
        first = 0
        while first < len(items):
            last = first + 1
            while last < len(items) and items[last].stop - items[first].start <= _CHUNK_BYTES:
                last += 1
            stop = max(item.stop for item in items[first:last])
            yield _Chunk(file, items[first].start, stop, None, items[first:last])
            first = last

    async def _read_all(self) -> None:
        chunks = (chunk for listed in self._chunks for chunk in listed)

        async def read_some() -> None:
            # one per reader, so that memory does not grow with the checkpoint
            memory = memoryview(bytearray(_CHUNK_BYTES))
            for chunk in chunks:  # shared: each takes the next one
                if chunk.digests is not None:
                    await self._check_blocks(chunk, memory)
                elif chunk.stop - chunk.start <= len(memory):
                    await self._check_items(chunk, memory)
                else:
                    for item in chunk.items:
                        await self._check_long(chunk.file, item, memory)

        failed: BaseException | None = None
        try:
            async with anyio.create_task_group() as group:
                for _ in range(self._io_concurrency):
                    group.start_soon(read_some)
        except BaseExceptionGroup as errors:
            failed = first_failure(errors)
        if failed is not None:
            raise failed

    async def _read(self, file: str, start: int, memory: memoryview) -> bool:
        """Fill ``memory``; where the medium has lost bytes, say which."""
        try:
            await self._reader.read_into(file, [(start, memory)])
        except StorageError as error:
            if not _is_damage(error):
                raise
            if len(memory) <= BLOCK_BYTES or error.errno != errno.EIO:
                self._damage.add(file, start, start + len(memory), str(error))
                return False
            # by halves: one bad sector must not condemn all that was read with it
            half = -(-len(memory) // (2 * BLOCK_BYTES)) * BLOCK_BYTES
            first = await self._read(file, start, memory[:half])
            return await self._read(file, start + half, memory[half:]) and first
        self._nbytes += len(memory)
        if self._progress is not None:
            # gaps between items are read through, so there may be a little more than was announced
            self._progress(self._nbytes, max(self._total_bytes, self._nbytes))
        return True

    async def _check_blocks(self, chunk: _Chunk, memory: memoryview) -> None:
        assert chunk.digests is not None
        memory = memory[: chunk.stop - chunk.start]
        # unread bytes do not match either, and are told once
        whole = await self._read(chunk.file, chunk.start, memory)
        bad = await run_blocking(self._threads, self._timeout, bad_blocks, memory, chunk.digests)
        known = [] if whole else self._damage.of(chunk.file)
        for index in bad:
            start = chunk.start + index * BLOCK_BYTES
            stop = min(start + BLOCK_BYTES, chunk.stop)
            if not any(damage.start <= start and stop <= damage.stop for damage in known):
                self._damage.add(chunk.file, start, stop, "its bytes do not match their checksum")

    async def _check_items(self, chunk: _Chunk, memory: memoryview) -> None:
        if not await self._read(chunk.file, chunk.start, memory[: chunk.stop - chunk.start]):
            return
        for item in chunk.items:
            if item.is_packed:  # as it lies there it is no zip, and what it is tells only its compressor
                self._unrecorded[item.name] = None
                continue
            stored = memory[item.start - chunk.start : item.stop - chunk.start]
            await self._judge(chunk.file, item, stored)

    async def _judge(self, file: str, item: Item, stored: memoryview) -> None:
        try:
            recorded = await run_blocking(self._threads, self._timeout, check_item, stored)
        except ValueError as error:
            self._damage.add(file, item.start, item.stop, str(error))
        else:
            if not recorded:
                self._unrecorded[item.name] = None

    async def _check_long(self, file: str, item: Item, memory: memoryview) -> None:
        """An item that memory does not hold: its directory first, then one record after another."""
        try:
            # packed, it is read all the same: whether the medium still has it shows then
            whole = Record("", 0, 0, 0, item.stop - item.start)
            records = [whole] if item.is_packed else await self._records(file, item)
            if records is None:
                return
            for record in records:
                crc = 0
                for start in range(record.start, record.stop, len(memory)):
                    part = memory[: min(len(memory), record.stop - start)]
                    if not await self._read(file, item.start + start, part):
                        return
                    crc = await run_blocking(self._threads, self._timeout, zlib.crc32, part, crc)
                record.check(crc)
        except ValueError as error:
            self._damage.add(file, item.start, item.stop, str(error))
        else:
            if not all(record.is_recorded for record in records):
                self._unrecorded[item.name] = None

    async def _records(self, file: str, item: Item) -> list[Record] | None:
        """The records of an item by its directory; None if the medium has lost it. Raises ValueError."""
        length = item.stop - item.start
        wants = find_records(length)
        try:
            offset, nbytes = next(wants)
            while True:
                nbytes = min(nbytes, max(length - offset, 0))
                if nbytes > _DIRECTORY_BYTES:
                    raise ValueError("its zip has a directory that no checkpoint's would have")
                part = bytearray(nbytes)
                if nbytes and not await self._read(file, item.start + offset, memoryview(part)):
                    return None
                offset, nbytes = wants.send(bytes(part))
        except StopIteration as end:
            records: list[Record] = end.value
        head = bytearray(min(length, RECORD_HEAD_BYTES))
        if not await self._read(file, item.start, memoryview(head)):
            return None
        check_names(records, bytes(head))
        return records


def bad_blocks(memory: memoryview, digests: array[int]) -> list[int]:
    """Which blocks of ``memory``, which starts at a block's start, do not match ``digests``."""
    digested = block_digests(memory)
    return [index for index, digest in enumerate(digests) if digested[index] != digest]
