"""What near breaks off in its middle is finished by far, and nothing verified is written twice."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dcp_async.errors import StorageError
from dcp_async.storage import LocalStorage, TieredStorage
from dcp_async.testing.saves import CONTENT, FIRST, NAME, file_of, save


class BreakingReader:
    """Fills and tells of ``good`` bytes, then fails."""

    def __init__(self, inner: Any, good: int) -> None:
        self._inner, self._good = inner, good

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def read_into(
        self,
        file: str,
        pieces: Sequence[tuple[int, memoryview]],
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        left = self._good
        for _, buffer in pieces:
            part = buffer[: min(left, len(buffer))]
            part[:] = b"n" * len(part)  # what only near has
            left -= len(part)
        if arrived is not None:
            arrived(self._good)
        raise StorageError("broken", verb="read", path=file, errno=errno.EIO)


class BreakingStorage(LocalStorage):
    async def open(self, name: str) -> Any:
        return BreakingReader(await super().open(name), 5000)


async def test_what_near_has_told_of_is_not_read_again(tmp_path: Path) -> None:
    near, far = BreakingStorage(tmp_path / "near"), LocalStorage(tmp_path / "far")
    for tier in (near, far):
        await save(tier, NAME, FIRST)
    reader = await TieredStorage(near, far).open(NAME)
    first, second = bytearray(4096), bytearray(4096)
    counts: list[int] = []
    pieces = [(0, memoryview(first)), (8192, memoryview(second))]
    await reader.read_into(file_of(FIRST), pieces, counts.append)
    assert first == b"n" * 4096
    assert second == b"n" * 904 + CONTENT[8192 + 904 : 8192 + 4096]
    assert counts == sorted(counts)
    # from here on it is far's, which near is not asked for
    await reader.read_into(file_of(FIRST), pieces)
    assert first + second == CONTENT[:4096] + CONTENT[8192:12288]
    await reader.close()
    await near.close()
    await far.close()
