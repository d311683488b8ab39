"""One rank's data files: parts of its image in any order, then the footers of their checksums.

Enters: StagedParts of one image. Leaves: sealed files, and what a manifest says of them. Invariant: what is
checksummed is what the storage was given, and a slot is free again only after both.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .._concurrency import BlockingThreads, Pipe, StuckThreadError, run_blocking
from .._names import blob_file, data_file, digests_file, pieces_file
from ..formats import (
    BLOCK_BYTES,
    LOOSE,
    SECTOR_BYTES,
    FileLayout,
    Footer,
    block_digests,
    footer_bytes,
    num_blocks,
)
from ..staging import BufferPool, Lease, num_parts
from ..storage import Transaction
from .failures import in_phase
from .public_files import Checksums, File, put

_OWN = -2
"""Beside the numbers of public files and LOOSE, the rank's own file."""


@dataclass(frozen=True, slots=True)
class FileNames:
    """What one rank's files of one save are called."""

    rank: int
    uid: str

    def of(self, number: int) -> str:
        """That of the rank's own file, of its loose bytes, or of a public one."""
        if number == _OWN:
            return data_file(self.rank, 0, self.uid)
        return pieces_file(self.rank, self.uid) if number == LOOSE else blob_file(number, self.uid)

    @property
    def pieces(self) -> str:
        """That of the file of loose bytes."""
        return self.of(LOOSE)

    def lengths(self, layout: FileLayout) -> dict[str, int]:
        """All files that this rank alone writes -> their lengths."""
        lengths: dict[str, int] = {}
        if layout.own_bytes:
            lengths[self.of(_OWN)] = layout.own_bytes + footer_bytes(layout.own_bytes)
        if loose := layout.runs.loose_end:
            lengths[self.pieces] = _sectors(loose)
        return lengths

    def public_lengths(self, layout: FileLayout) -> dict[str, int]:
        """Those that all ranks write."""
        return {self.of(number): nbytes for number, (_, nbytes) in enumerate(layout.public)}

    def digests_lengths(self, layout: FileLayout) -> dict[str, int]:
        """The file of the checksums of those, which the coordinator writes."""
        nbytes = sum(footer_bytes(nbytes) for _, nbytes in layout.public)
        return {digests_file(self.uid): nbytes} if nbytes else {}


def _sectors(nbytes: int) -> int:
    return -(-nbytes // SECTOR_BYTES) * SECTOR_BYTES


@dataclass(frozen=True, slots=True)
class StagedPart:
    """A slot that holds bytes [offset, offset + len(memory)) of the image."""

    number: int
    offset: int
    memory: memoryview
    lease: Lease
    slot: int


class FileWriter:
    """Writes the files of one image into a transaction, and checksums them. Owns nothing."""

    def __init__(
        self,
        names: FileNames,
        layout: FileLayout,
        *,
        pool: BufferPool,
        threads: BlockingThreads,
        timeout: float,
        progress: Callable[[int], None],
    ) -> None:
        """
        Args:
            pool: whose slots the parts lie in.
            threads: where parts are checksummed.
            progress: is told how many bytes are written, after each part.
        """
        self.names = names
        self._layout = layout
        self._pool = pool
        self._threads = threads
        self._timeout = timeout
        self._progress = progress
        self._written_bytes = 0
        self._digests = array("Q", bytes(8 * num_blocks(layout.own_bytes)))
        """Those of the blocks of the rank's own file."""
        self.checksums = Checksums(layout)
        self._num_parts = num_parts(layout.image_bytes, pool.slot_bytes)
        self._num_digested = 0

    async def write(
        self, transaction: Transaction, staged: Pipe[StagedPart], written: Pipe[StagedPart]
    ) -> None:
        """Hand parts to the storage as they are; several may do so at once."""
        async for part in staged:
            with in_phase("write"):
                try:
                    for number, offset, memory in self._slices(part):
                        await put(transaction, self.names.of(number), offset, memory)
                except StuckThreadError:
                    # the thread that hangs may still read the slot: nobody may write into it again
                    self._pool.release(part.lease, part.slot, lost=True)
                    raise
            await written.put(part)
        await written.close()

    async def digest(self, written: Pipe[StagedPart]) -> None:
        """Checksum parts and free their slots."""
        # behind the write, not before it: the bytes lie in the slot until they are hashed, so what is checked
        # is what the storage was given, and no write waits for a hash
        async for part in written:
            with in_phase("write"):
                for number, offset, memory in self._slices(part):
                    if number == LOOSE:  # whoever puts them where they belong checksums them
                        continue
                    digests = await run_blocking(self._threads, self._timeout, block_digests, memory)
                    if number == _OWN:
                        first = offset // BLOCK_BYTES
                        self._digests[first : first + len(digests)] = digests
                    else:
                        self.checksums.note(number, offset, digests)
            self._num_digested += 1
            self._pool.release(part.lease, part.slot)
            self._written_bytes += len(part.memory)
            self._progress(self._written_bytes)

    @property
    def lengths(self) -> dict[str, int]:
        """All files that this rank writes into -> their lengths."""
        return self.names.lengths(self._layout) | self.names.public_lengths(self._layout)

    @property
    def pieces(self) -> list[str]:
        """The file of loose bytes, if there is one."""
        return [self.names.pieces] if self._layout.runs.loose_end else []

    def _slices(self, part: StagedPart) -> Iterator[tuple[int, int, memoryview]]:
        """(file, offset in it, bytes) of what lies in ``part``."""
        layout, stop = self._layout, part.offset + len(part.memory)
        # none, under DCP's format: then a part is one slice of the rank's own file
        for low, high, number, offset in layout.runs.between(part.offset, stop):
            start = low
            if number == LOOSE:
                # whole sectors, which can be written directly: what lies around them is nobody's there
                start, high = low // SECTOR_BYTES * SECTOR_BYTES, _sectors(high)
            yield number, offset - low + start, part.memory[start - part.offset : high - part.offset]
        # behind all of them, from a block's start on
        low = max(layout.own_start, part.offset)
        if low < stop:
            yield _OWN, low - layout.own_start, part.memory[low - part.offset :]

    async def complete(self, transaction: Transaction) -> list[File]:
        """Append the footer and sync what this rank alone writes; of no file if there is nothing to write."""
        assert self._num_digested == self._num_parts
        files: list[File] = []
        nbytes = self._layout.own_bytes
        with in_phase("write"):
            if nbytes:
                name, footer = self.names.of(_OWN), Footer(image_bytes=nbytes, digests=self._digests)
                files.append(File(name, nbytes + footer_bytes(nbytes), footer.digest))
                # now that all digests are known: the footer is the one part that depends on the bytes
                await transaction.put(name, nbytes, memoryview(footer.encode()))
            for name in self.names.lengths(self._layout):
                await transaction.seal(name)
        return files
