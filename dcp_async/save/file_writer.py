"""One rank's data file: parts in any order, then the footer of their checksums.

Enters: StagedParts of one file image. Leaves: a sealed file, and what a manifest says of it. Invariant: what
is checksummed is what the storage was given, and a slot is free again only after both.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

from .._concurrency import BlockingThreads, Pipe, StuckThreadError, run_blocking
from ..formats import BLOCK_BYTES, FileLayout, Footer, block_digests
from ..staging import BufferPool, Lease, num_parts
from ..storage import Transaction
from .failures import in_phase

File = tuple[str, int, str]
"""(name, length, digest) of what a rank wrote."""


@dataclass(frozen=True, slots=True)
class StagedPart:
    """A slot that holds bytes [offset, offset + len(memory)) of the image."""

    number: int
    offset: int
    memory: memoryview
    lease: Lease
    slot: int


class FileWriter:
    """Writes one file into a transaction, and checksums it. Owns nothing."""

    def __init__(
        self,
        name: str,
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
        self.name = name
        self._layout = layout
        self._pool = pool
        self._threads = threads
        self._timeout = timeout
        self._progress = progress
        self._written_bytes = 0
        self._digests = [array("Q")] * num_parts(layout.image_bytes, pool.slot_bytes)

    async def write(
        self, transaction: Transaction, staged: Pipe[StagedPart], written: Pipe[StagedPart]
    ) -> None:
        """Hand parts to the storage as they are; several may do so at once."""
        async for part in staged:
            with in_phase("write"):
                try:
                    await transaction.put(self.name, part.offset, part.memory)
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
                self._digests[part.number] = await run_blocking(
                    self._threads, self._timeout, block_digests, part.memory
                )
            self._pool.release(part.lease, part.slot)
            self._written_bytes += len(part.memory)
            self._progress(self._written_bytes)

    async def complete(self, transaction: Transaction) -> File | None:
        """Append the footer and sync; None if there is nothing to write."""
        layout = self._layout
        if not layout.image_bytes:
            return None
        digests = array("Q")
        for part in self._digests:
            digests.extend(part)
        assert len(digests) == -(-layout.image_bytes // BLOCK_BYTES)
        footer = Footer(image_bytes=layout.image_bytes, digests=digests)
        with in_phase("write"):
            await transaction.put(self.name, layout.image_bytes, memoryview(footer.encode()))
            await transaction.seal(self.name)
        return self.name, layout.file_bytes, footer.digest
