"""The end of files that all ranks write: loose bytes come to where they belong, and checksums to one table.

Enters: a plan, sealed pieces files of all ranks. Leaves: public files, whole and sealed; on the coordinator a
File of each. Invariant: a block has one writer, who checksums what it gives to the storage.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import anyio

from .._concurrency import BlockingThreads, run_blocking
from .._names import blob_file, digests_file, pieces_file
from ..formats import BLOCK_BYTES, SECTOR_BYTES, FileLayout, Footer, block_digests, footer_bytes, num_blocks
from ..planning import Assembly, Merge
from ..storage import SharedTransaction, Transaction
from .failures import in_phase

_SPAN_BYTES = 4 << 20
"""How much is put together at a time."""

Blocks = list[tuple[int, int, bytes]]
"""(file, number of its first block, array("Q") of the digests of it and of those behind it) that one rank has
written. Plain data: it travels."""


class File(NamedTuple):
    """What was written of one file. Plain data: it travels."""

    name: str
    nbytes: int
    digest: str
    """Checksum of its footer's table."""
    public_name: str = ""
    footer_offset: int = 0
    """Where in the file of checksums its own begin; of one with a public name."""


class Checksums:
    """Those of the blocks of public files that this rank writes."""

    def __init__(self, layout: FileLayout) -> None:
        self._digests = [array("Q", bytes(8 * num_blocks(nbytes))) for _, nbytes in layout.public]
        self._is_known = [bytearray(len(digests)) for digests in self._digests]

    def note(self, file: int, offset: int, digests: array[int]) -> None:
        """The blocks from ``offset`` on have these."""
        # of each block by itself: no two ranks, and no two parts, have bytes of one
        first = offset // BLOCK_BYTES
        self._digests[file][first : first + len(digests)] = digests
        self._is_known[file][first : first + len(digests)] = b"\1" * len(digests)

    def blocks(self) -> Blocks:
        """All of them."""
        return [
            (file, first, self._digests[file][first:stop].tobytes())
            for file, known in enumerate(self._is_known)
            for first, stop in _ones(known)
        ]

    @staticmethod
    def together(layout: FileLayout, told: Sequence[Blocks]) -> Checksums:
        """Those of all ranks. Raises RuntimeError unless each block has one."""
        whole = Checksums(layout)
        # planned as it is, each block has one writer; a table with a hole would fail the resume, not the save
        for blocks in told:
            for file, first, raw in blocks:
                whole.note(file, first * BLOCK_BYTES, array("Q", raw))
        for (name, _), known in zip(layout.public, whole._is_known, strict=True):
            if (missing := known.find(0)) >= 0:
                raise RuntimeError(f"no rank has written block {missing} of {name}: this is a bug, report it")
        return whole

    async def write(self, layout: FileLayout, uid: str, transaction: Transaction) -> list[File]:
        """Write the footers, which lie in a file of their own: what others read ends where they expect it."""
        files: list[File] = []
        offset = 0
        for number, (name, nbytes) in enumerate(layout.public):
            footer = Footer(image_bytes=nbytes, digests=self._digests[number])
            files.append(File(blob_file(number, uid), nbytes, footer.digest, name, offset))
            await transaction.put(digests_file(uid), offset, memoryview(footer.encode()))
            offset += footer_bytes(nbytes)
        await transaction.seal(digests_file(uid))
        return files


def _ones(flags: bytearray) -> Iterator[tuple[int, int]]:
    stop = 0
    while (start := flags.find(1, stop)) >= 0:
        stop = flags.find(0, start)
        stop = len(flags) if stop < 0 else stop
        yield start, stop


async def put(transaction: Transaction, name: str, offset: int, memory: memoryview) -> None:
    """Write ``memory`` at a sector's start."""
    # the end of a file that is no multiple of a sector apart: the rest can still be written directly
    body = len(memory) // SECTOR_BYTES * SECTOR_BYTES
    if body:
        await transaction.put(name, offset, memory[:body])
    if body < len(memory):
        await transaction.put(name, offset + body, memory[body:])


async def put_together(
    merge: Merge,
    checksums: Checksums,
    transaction: SharedTransaction,
    *,
    uid: str,
    threads: BlockingThreads,
    io_concurrency: int,
    patience: float,
) -> None:
    """Write this rank's share of what several ranks hold, once all of them have sealed their pieces.

    ``patience`` in seconds, for each call. Memory: two times 4 MiB for each of ``io_concurrency``. Raises:
    PhaseFailure.
    """
    assembly = await threads.run(Assembly, merge)
    spans = (
        (file, low, min(low + _SPAN_BYTES, stop))
        for file, start, stop in merge["spans"]
        for low in range(start, stop, _SPAN_BYTES)
    )

    async def work() -> None:
        # a map, whose start is a page's, and not the pool's: that may be full of saves that wait for this one
        with mmap.mmap(-1, _SPAN_BYTES) as mapped, memoryview(mapped) as buffer, in_phase("write"):
            for file, low, high in spans:
                with buffer[: high - low] as memory:
                    # asked for each: all of them at once would be an object per tensor and rank
                    for read in await threads.run(assembly.reads, file, low, high, _SPAN_BYTES):
                        source = memoryview(bytearray(read.stop - read.start))
                        await transaction.fetch(pieces_file(read.rank, uid), read.start, source)
                        await run_blocking(threads, patience, read.scatter, source, memory)
                    await put(transaction, blob_file(file, uid), low, memory)
                    checksums.note(file, low, await run_blocking(threads, patience, block_digests, memory))

    # one waits for the disk while another puts together
    async with anyio.create_task_group() as group:
        for _ in range(io_concurrency):
            group.start_soon(work)


def as_shared(transaction: Transaction) -> SharedTransaction:
    """What an engine of several ranks was refused without, if its format needs it."""
    assert hasattr(transaction, "fetch")
    return cast(SharedTransaction, transaction)
