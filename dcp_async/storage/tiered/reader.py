"""Reads a checkpoint of the near tier, and from far what near has not whole.

Enters: a reader near, and where far is. Leaves: bytes. Invariant: far is asked for nothing that near gives;
what comes from there is the same save's, since each save's files bear its uid.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from ...errors import StorageError
from ..base import LinkError, Reader, Storage

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TieredReader:
    """Owns both readers; the far one is opened by the first file that near has not whole."""

    def __init__(self, near: Reader, far: Storage, name: str) -> None:
        self._near = near
        self._far = far
        self._name = name
        self._far_reader: Reader | None = None
        self._opening = asyncio.Lock()
        self._from_far: set[str] = set()

    def __repr__(self) -> str:
        return f"<TieredReader {self._near!r}, {len(self._from_far)} files from far>"

    async def _opened_far(self) -> Reader:
        async with self._opening:
            if self._far_reader is None:
                self._far_reader = await self._far.open(self._name)
            return self._far_reader

    async def _call(self, file: str, verb: Callable[[Reader], Awaitable[T]]) -> T:
        """``verb`` of the reader that has ``file``. Raises: what near raises, if far has it not either."""
        if file not in self._from_far:
            try:
                return await verb(self._near)
            except LinkError:
                raise
            except StorageError as error:
                if not await self.turn_to_copy(file, str(error)):
                    raise
        return await verb(await self._opened_far())

    async def turn_to_copy(self, file: str, why: str) -> bool:
        """See ``Copies``."""
        if file in self._from_far:
            return False
        try:
            await (await self._opened_far()).size(file)
        except (FileNotFoundError, StorageError) as error:
            logger.debug("%s of %r is not far: %s", file, self._name, error)
            return False
        logger.warning("%s of %r is read from %r: near, %s", file, self._name, self._far, why)
        self._from_far.add(file)
        return True

    async def metadata(self) -> bytes:
        return await self._near.metadata()

    async def rank_metadata(self) -> Mapping[int, bytes]:
        return await self._near.rank_metadata()

    async def manifest(self) -> Sequence[bytes]:
        manifests = await self._near.manifest()
        if manifests:
            return manifests
        try:  # stock's have none; of ours it may be lost
            return await (await self._opened_far()).manifest()
        except (FileNotFoundError, StorageError) as error:
            logger.debug("no manifest of %r is far: %s", self._name, error)
            return manifests

    async def size(self, file: str) -> int:
        return await self._call(file, lambda reader: reader.size(file))

    async def read_into(
        self,
        file: str,
        pieces: Sequence[tuple[int, memoryview]],
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        told = 0

        def tell(count: int) -> None:
            nonlocal told
            told = max(told, count)
            if arrived is not None:
                arrived(count)

        async def read(reader: Reader) -> None:
            # what was told of is verified by now, and no byte of it may be written again
            before = told
            rest = _behind(pieces, before)
            await reader.read_into(
                file, rest, None if arrived is None else lambda count: tell(before + count)
            )

        await self._call(file, read)

    async def give_back(self) -> None:
        await self._near.give_back()

    async def close(self) -> None:
        await self._near.close()
        if self._far_reader is not None:
            await self._far_reader.close()
            self._far_reader = None


def _behind(pieces: Sequence[tuple[int, memoryview]], nbytes: int) -> Sequence[tuple[int, memoryview]]:
    """``pieces`` without their first ``nbytes``."""
    rest = []
    for offset, buffer in pieces:
        skipped = min(nbytes, len(buffer))
        nbytes -= skipped
        if skipped < len(buffer) or not skipped:
            rest.append((offset + skipped, buffer[skipped:]))
    return rest
