"""A committed checkpoint in a bucket: few requests, many at once, for the bytes that are wanted.

Enters: pieces of files. Leaves: their bytes, in the caller's buffers. Invariant: a request asks for bytes
that the object has, and its answer has the length asked for.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..._names import METADATA, is_manifest, rank_of_metadata
from .bucket import Bucket, all_of

# between two pieces of one request, read and dropped: less than a round trip takes at a few MB/s and more
_GAP_BYTES = 128 << 10
# the most of one request. A connection brings some 50 to 100 MB/s, so that several at once are faster, and
# what is lost with one that breaks is little
_REQUEST_BYTES = 8 << 20


@dataclass(slots=True)
class _Request:
    """The bytes [start, stop) of a file, and the pieces that lie in it."""

    start: int
    stop: int
    pieces: list[tuple[int, memoryview]] = field(default_factory=list)


def requests_for(pieces: Sequence[tuple[int, memoryview]]) -> Iterator[_Request]:
    """What to ask for, so that each piece is in one request or cut into several."""
    request: _Request | None = None
    # by offset: what the caller has in its order of items may lie side by side in the file
    for offset, buffer in sorted(pieces, key=lambda piece: piece[0]):
        for start in range(0, len(buffer), _REQUEST_BYTES):
            part = buffer[start : start + _REQUEST_BYTES]
            first, last = offset + start, offset + start + len(part)
            if (
                request is None
                or first - request.stop > _GAP_BYTES
                or max(last, request.stop) - request.start > _REQUEST_BYTES
            ):
                if request is not None:
                    yield request
                request = _Request(first, last)
            request.stop = max(request.stop, last)
            request.pieces.append((first, part))
    if request is not None:
        yield request


class ObjectReader:
    """Reads one checkpoint. Holds nothing open: what is removed meanwhile is an ENOENT."""

    def __init__(
        self,
        bucket: Bucket,
        name: str,
        metadata: bytes | None,
        *,
        concurrency: int,
        closed: Callable[[ObjectReader], None],
    ) -> None:
        """``metadata``: as it was just now; None if there is only that of stock's ranks. ``closed`` is called
        when it is."""
        self._bucket = bucket
        self._name = name
        self._closed = closed
        self._metadata = metadata
        self._concurrency = concurrency
        self._sizes: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<ObjectReader {self._bucket.path_of(self._name)}>"

    @property
    def name(self) -> str:
        """The checkpoint's."""
        return self._name

    def _key(self, file: str) -> str:
        key = f"{self._name}/{file}"
        parts = file.split("/")
        if os.path.isabs(file) or not all(parts) or {".", ".."} & {*parts}:
            raise self._bucket.refusal("open", key, errno.EACCES, "its path leaves the checkpoint")
        return key

    async def metadata(self) -> bytes:
        metadata, self._metadata = self._metadata, None
        # the first time: what ``open`` has read; then, as it is now
        return metadata if metadata is not None else await self._bucket.get(f"{self._name}/{METADATA}")

    async def _listed(self) -> list[str]:
        entries = await self._bucket.entries(self._name)
        self._sizes = {entry.name: entry.nbytes for entry in entries}
        return list(self._sizes)

    async def rank_metadata(self) -> Mapping[int, bytes]:
        files = {rank: file for file in await self._listed() if (rank := rank_of_metadata(file)) is not None}
        contents = await all_of(self._bucket.get, [self._key(file) for file in files.values()])
        return dict(zip(files, contents, strict=True))

    async def manifest(self) -> Sequence[bytes]:
        # listed now, not when it was opened: the manifest of a `.metadata` is there before that is
        files = [file for file in await self._listed() if is_manifest(file)]
        return await all_of(self._bucket.get, [self._key(file) for file in files])

    async def names(self) -> Sequence[str]:
        # of what lies deeper, what leads there, as in a directory
        return sorted({file.partition("/")[0] for file in await self._listed()})

    async def size(self, file: str) -> int:
        key = self._key(file)
        # files of one save are never written again, so that what was listed holds
        nbytes = self._sizes.get(file)
        if nbytes is None:
            entry = await self._bucket.head(key)
            if entry is None:
                raise self._bucket.refusal("open", key, errno.ENOENT, "the checkpoint has no such file")
            nbytes = self._sizes[file] = entry.nbytes
        return nbytes

    async def read_into(
        self,
        file: str,
        pieces: Sequence[tuple[int, memoryview]],
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        # ``arrived`` is not called: answers come in any order, and to hash them here would stop the loop
        key, nbytes = self._key(file), await self.size(file)
        end = max((offset + len(buffer) for offset, buffer in pieces), default=0)
        if end > nbytes:
            raise self._bucket.refusal(
                "read", key, errno.EIO, f"it ends at byte {nbytes}; byte {end} is wanted"
            )

        async def fetch(request: _Request) -> None:
            # a copy of what obstore holds, which reads into no buffer of ours: a millisecond for 8 MiB
            content = await self._bucket.get_range(key, request.start, request.stop)
            for offset, buffer in request.pieces:
                start = offset - request.start
                buffer[:] = content[start : start + len(buffer)]

        await all_of(fetch, list(requests_for(pieces)), at_once=self._concurrency)

    async def give_back(self) -> None:
        """Nothing: no cache of this machine's was filled."""

    async def close(self) -> None:
        self._closed(self)
        self._sizes.clear()
        self._metadata = None
