"""Saves as an engine makes them, by the verbs of a storage alone.

Enters: a storage. Leaves: checkpoints of which every byte is known, and what a reader finds of them.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager

import pytest

from .._names import data_file, manifest_file
from ..errors import StorageError
from ..storage import Reader, Storage, Transaction

NAME, OTHER = "step-00000001", "step-00000002"
FIRST, SECOND = "0123456789abcdef", "fedcba9876543210"
"""Uids of two saves."""
ALIGN = 4096
CONTENT = bytes(range(256)) * (3 * ALIGN // 256) + b"a tail of no round length"


def file_of(uid: str) -> str:
    return data_file(0, 0, uid)


def metadata_of(uid: str) -> bytes:
    # what a storage must never decode: it names its save's file in words that only its reader knows
    return f"not a pickle; its file is {file_of(uid)}, its manifest {manifest_file(uid)}".encode()


def manifest_of(uid: str) -> bytes:
    return f'{{"uid": "{uid}"}}'.encode()


def uids_named_in(metadata: bytes, uids: Set[str]) -> Set[str]:
    return {uid for uid in uids if uid.encode() in metadata}


async def put(transaction: Transaction, uid: str, content: bytes = CONTENT) -> None:
    """Write and seal ``content`` as a save does: aligned parts, the tail last."""
    file = file_of(uid)
    part = max(ALIGN, len(content) // 4 // ALIGN * ALIGN)
    for offset in range(0, len(content), part):
        # writable, as the slots are that an engine writes from
        await transaction.put(file, offset, memoryview(bytearray(content[offset : offset + part])))
    await transaction.seal(file)


async def write(
    storage: Storage, name: str, uid: str, *, content: bytes = CONTENT, replace: bool = False
) -> Transaction:
    """A save of ``name`` that has done everything but to commit."""
    transaction = await storage.begin(name, {file_of(uid): len(content)}, uid=uid, replace=replace)
    await put(transaction, uid, content)
    await transaction.verify({file_of(uid): len(content)})
    return transaction


async def commit(transaction: Transaction, uid: str, *, replace: bool = False) -> None:
    await transaction.commit(metadata_of(uid), manifest_of(uid), replace=replace)
    await transaction.abort()  # as an engine does, which after a commit only releases


async def save(
    storage: Storage, name: str, uid: str, *, content: bytes = CONTENT, replace: bool = False
) -> None:
    await commit(await write(storage, name, uid, content=content, replace=replace), uid, replace=replace)


async def committed(storage: Storage) -> set[str]:
    return {stored.name for stored in await storage.list() if stored.committed}


async def read(reader: Reader, file: str, offset: int = 0, nbytes: int | None = None) -> bytes:
    target = bytearray(await reader.size(file) - offset if nbytes is None else nbytes)
    await reader.read_into(file, [(offset, memoryview(target))])
    return bytes(target)


@asynccontextmanager
async def opened(storage: Storage, name: str) -> AsyncIterator[Reader]:
    reader = await storage.open(name)
    try:
        yield reader
    finally:
        await reader.close()


async def check_whole(storage: Storage, name: str, uid: str, content: bytes = CONTENT) -> None:
    """``name`` is the checkpoint that the save ``uid`` wrote, to the last byte."""
    async with opened(storage, name) as reader:
        assert await reader.metadata() == metadata_of(uid)
        assert manifest_of(uid) in list(await reader.manifest())
        assert await read(reader, file_of(uid)) == content


async def check_opened(reader: Reader, keeps_opened_files: bool) -> None:
    """What a reader opened, and somebody has removed since, is as it was, or gone where nothing is held
    open."""
    try:
        content = await read(reader, file_of(FIRST))
    except StorageError as error:
        if keeps_opened_files or error.errno != errno.ENOENT:
            raise
    else:
        assert content == CONTENT


async def check_absent(storage: Storage, name: str) -> None:
    assert name not in await committed(storage)
    with pytest.raises(FileNotFoundError):
        await storage.open(name)
