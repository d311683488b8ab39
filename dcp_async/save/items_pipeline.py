"""The path of items that a planner of DCP's resolves: one rank's file, without a capture and without ranks.

    fill -[StagedPart]-> write -[StagedPart]-> digest -> complete

Enters: ResolvedItems, an open Transaction. Leaves: a sealed file. What rank 0 publishes, and when, is the
business of whoever plans. Invariant: however it ends, its tasks have ended and its slots are free.
"""

from __future__ import annotations

import anyio

from .._concurrency import BlockingThreads, Pipe, StuckThreadError, run_blocking
from ..staging import BufferPool, Lease, num_parts, parts_between
from ..storage import Transaction
from .failures import in_phase
from .file_writer import FileNames, FileWriter, StagedPart
from .public_files import File
from .resolved_items import ResolvedItems


async def write_items(
    items: ResolvedItems,
    names: FileNames,
    transaction: Transaction,
    *,
    pool: BufferPool,
    threads: BlockingThreads,
    io_concurrency: int,
    patience: float,
) -> list[File]:
    """Write ``items`` as files of these names; none if there are no items. ``patience`` in seconds, for each
    call.

    Raises: PhaseFailure. Cancellation: calls in progress are joined; the caller aborts the transaction.
    """
    layout = items.layout
    writer = FileWriter(names, layout, pool=pool, threads=threads, timeout=patience, progress=lambda _: None)
    staged: Pipe[StagedPart] = Pipe(pool.num_slots)
    written: Pipe[StagedPart] = Pipe(pool.num_slots, producers=io_concurrency)
    leases: list[Lease] = []

    async def fill() -> None:
        count = num_parts(layout.image_bytes, pool.slot_bytes)
        for number, (offset, nbytes) in enumerate(
            parts_between(0, count, pool.slot_bytes, layout.image_bytes)
        ):
            # one by one: while all slots are being written nothing is filled, and memory stays bounded
            lease = await pool.lease(1)
            leases.append(lease)
            memory = lease.memory(0, nbytes)
            with in_phase("stage"):
                try:
                    await run_blocking(threads, patience, items.fill, memory, offset)
                except StuckThreadError:
                    pool.release_all(lease, lost=True)  # the thread that hangs may still write into it
                    raise
            await staged.put(StagedPart(number, offset, memory, lease, 0))
        await staged.close()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(fill)
            for _ in range(io_concurrency):
                group.start_soon(writer.write, transaction, staged, written)
            group.start_soon(writer.digest, written)
    finally:
        for lease in leases:
            pool.release_all(lease)
    return await writer.complete(transaction)
