"""Copies one checkpoint from a reader to another storage, each block checked on the way.

    CopyPlan -[CopyChunk]-> read -> check -> put -> seal -> commit

Enters: a plan, made by whoever knows the format. Leaves: the same checkpoint, or nothing. Invariant: what is
put was checked as it left the reader; `.metadata` is published last; memory is ``concurrency`` chunks.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import anyio

from ..._concurrency import BlockingThreads, for_each, run_blocking
from ...errors import CorruptCheckpointError, StorageError
from ..base import Reader, Storage, Transaction

CHUNK_BYTES = 8 << 20
"""The most that a chunk has: a part of an upload, as ObjectStorage sends it by default."""


@dataclass(frozen=True, slots=True)
class CopyChunk:
    """Bytes [start, stop) of a file; ``start`` is a multiple of 4 KiB."""

    file: str
    start: int
    stop: int
    is_whole: Callable[[memoryview], bool]
    """Whether these bytes are those that the save wrote. Blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPlan:
    """What makes up a checkpoint, for whoever copies it."""

    uid: str
    time: float
    """When it was saved, by the clock of its writer."""
    metadata: bytes
    manifest: bytes
    lengths: Mapping[str, int]
    """File -> length."""
    chunks: Callable[[], Iterator[CopyChunk]]
    """All bytes of all files, each once."""
    public_names: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(self.lengths.values())


async def copy_checkpoint(
    name: str,
    plan: CopyPlan,
    reader: Reader,
    target: Storage,
    *,
    replace: bool,
    concurrency: int,
    threads: BlockingThreads,
    timeout: float,  # noqa: ASYNC109  # of each call in a thread, which a cancel scope could not leave
    turn: Callable[[], Awaitable[None]],
    copied: Callable[[int], None],
    is_current: Callable[[], Awaitable[bool]],
) -> None:
    """Write ``name`` into ``target`` as it is in ``reader``.

    Args:
        turn: awaited before each chunk: whoever must not be disturbed holds it.
        copied: told the length of each chunk that is written.
        is_current: whether the checkpoint is still there, asked right before it is published.
    Raises: CorruptCheckpointError if a block is not what was written; StorageError; FileExistsError.
    Cancellation: nothing is left.
    """
    transaction = await target.begin(name, dict(plan.lengths), uid=plan.uid, replace=replace)
    try:
        left = dict(plan.lengths)
        await _seal_empty(transaction, plan)
        buffers = [memoryview(bytearray(CHUNK_BYTES)) for _ in range(concurrency)]

        async def copy(chunk: CopyChunk) -> None:
            await turn()
            memory = buffers.pop()  # there is one for each of those that are at it at once
            try:
                part = memory[: chunk.stop - chunk.start]
                await reader.read_into(chunk.file, [(chunk.start, part)])
                if not await run_blocking(threads, timeout, chunk.is_whole, part):
                    raise _damaged(name, chunk)
                await transaction.put(chunk.file, chunk.start, part)
            finally:
                buffers.append(memory)
            copied(len(part))
            left[chunk.file] -= len(part)
            if not left[chunk.file]:
                await transaction.seal(chunk.file)

        await for_each(plan.chunks(), copy, at_once=concurrency)
        await _publish(name, plan, transaction, replace=replace, is_current=is_current)
    finally:
        with anyio.CancelScope(shield=True):
            await transaction.abort()


async def _seal_empty(transaction: Transaction, plan: CopyPlan) -> None:
    for file, nbytes in plan.lengths.items():
        if not nbytes:
            await transaction.seal(file)


async def _publish(
    name: str,
    plan: CopyPlan,
    transaction: Transaction,
    *,
    replace: bool,
    is_current: Callable[[], Awaitable[bool]],
) -> None:
    await transaction.verify(plan.lengths)
    if not await is_current():  # removed meanwhile: it must not come back
        raise StorageError.of("copy", name, OSError(errno.ENOENT, "it was removed or replaced meanwhile"))
    # storages without them do not take the argument
    more: dict[str, Any] = {"public_names": plan.public_names} if plan.public_names else {}
    await transaction.commit(plan.metadata, plan.manifest, replace=replace, **more)


def _damaged(name: str, chunk: CopyChunk) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"checkpoint {name!r}: bytes [{chunk.start}, {chunk.stop}) of {chunk.file} are not what was saved",
        checkpoint_id=name,
    )
