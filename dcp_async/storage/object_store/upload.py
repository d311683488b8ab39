"""One file as one object: parts in, a multipart upload out.

Enters: buffers at offsets. Leaves: an object, or nothing. Invariant: a buffer that fills parts of the upload
is sent from where it lies, and ``put`` returns when nobody reads it any more. What fills no part, or comes
out of its turn, is copied: to wait for its neighbours would hold a slot that they may need.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import weakref

import anyio

from ..._concurrency import settle
from ...errors import StorageError
from .bucket import Bucket

logger = logging.getLogger(__name__)

MOST_PARTS = 10_000
"""S3 takes no more for one upload, Azure 50,000."""
LEAST_PART_BYTES = 5 << 20
"""S3 takes no shorter one but as the last."""
# parts that were copied and that obstore has not asked for
_COPIES_WAITING = 2
# for an upload to be aborted by obstore itself, which waits for an answer before it looks
_STOP_SECONDS = 10.0


def part_bytes_for(nbytes: int | None, least: int) -> int:
    """The length of the parts of a file of ``nbytes``; None if that is known at the end."""
    # doubled, so that parts still divide the engine's slots, which are sent without a copy then
    part_bytes = least
    while nbytes is not None and part_bytes * MOST_PARTS < nbytes:
        part_bytes *= 2
    return part_bytes


class _StoppedError(Exception):
    """Raised into obstore, which aborts its upload then."""


class _Collected:
    """A part that comes in pieces: a copy."""

    def __init__(self, nbytes: int) -> None:
        self.content = bytearray(nbytes)
        self.filled = 0
        self.end = 0

    def add(self, offset: int, piece: memoryview) -> None:
        self.content[offset : offset + len(piece)] = piece
        self.filled += len(piece)
        self.end = max(self.end, offset + len(piece))


class Upload:
    """One file on its way. Belongs to the loop it was made on. Owns its upload: ``finish`` or ``stop`` it."""

    def __init__(
        self, bucket: Bucket, key: str, nbytes: int | None, *, part_bytes: int, at_once: int
    ) -> None:
        """``nbytes``: the length announced. ``at_once``: parts in flight."""
        self.key = key
        self._bucket = bucket
        self._nbytes = nbytes
        self._part_bytes = part_bytes_for(nbytes, part_bytes)
        self._at_once = at_once
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._changed, self._room = asyncio.Event(), asyncio.Event()
        # whole parts that obstore has not taken yet
        self._ready: dict[int, memoryview] = {}
        self._collected: dict[int, _Collected] = {}
        # the first part that is not ready
        self._in_turn = 0
        # parts that obstore has taken
        self._taken = 0
        self._written = self._end = 0
        self._complete = self._stopped = False
        # by part, to buffers that obstore may read: kept, or nobody would be told when it lets go
        self._references: dict[int, weakref.ref[memoryview]] = {}

    # -- what comes in

    async def put(self, offset: int, buffer: memoryview) -> None:
        """Returns when ``buffer`` is no longer read. Raises: StorageError."""
        end = offset + len(buffer)
        if self._nbytes is not None and end > self._nbytes:
            raise self._refusal(errno.EFBIG, f"it would have {end} bytes instead of {self._nbytes}")
        self._raise_failure()
        released: list[asyncio.Future[None]] = []
        for start in range(offset - offset % self._part_bytes, end, self._part_bytes):
            number = start // self._part_bytes
            first, last = max(start, offset), min(start + self._part_bytes, end)
            piece = buffer[first - offset : last - offset]
            if self._is_sendable(number, piece):
                released.append(self._send(number, piece))
                del piece  # or this frame would be the last to read it
            else:
                self._collect(number, first - start, piece)
        self._written += len(buffer)
        self._end = max(self._end, end)
        if released:
            await self._wait_for(released)
        else:
            await self._wait_for_room()
        self._raise_failure()

    @property
    def _is_multipart(self) -> bool:
        """Whether it can't be one small request."""
        return self._nbytes is None or self._nbytes > self._part_bytes

    def _is_sendable(self, number: int, piece: memoryview) -> bool:
        """Whether ``piece`` is a part as it is, and the next one."""
        # a short last one is not: obstore holds it until it hears that nothing follows, which is at the end
        is_part = self._is_multipart and len(piece) == self._part_bytes
        return is_part and number == self._in_turn and not self._bucket.keeps_buffers

    def _nbytes_of(self, number: int) -> int:
        rest = self._part_bytes if self._nbytes is None else self._nbytes - number * self._part_bytes
        return min(self._part_bytes, rest)

    def _send(self, number: int, part: memoryview) -> asyncio.Future[None]:
        """Queue ``part``, and say when nobody holds it."""
        released = self._loop.create_future()

        def release(_: weakref.ref[memoryview]) -> None:
            # on whichever thread of obstore's let go of it
            self._references.pop(number, None)
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waits
                self._loop.call_soon_threadsafe(settle, released)

        self._references[number] = weakref.ref(part, release)
        self._queue(number, part)
        return released

    def _collect(self, number: int, offset: int, piece: memoryview) -> None:
        whole = self._nbytes_of(number)
        collected = self._collected.get(number)
        if collected is None:
            collected = self._collected[number] = _Collected(whole)
        collected.add(offset, piece)
        if collected.filled >= whole and self._is_multipart:
            del self._collected[number]
            self._queue(number, memoryview(collected.content))

    def _queue(self, number: int, part: memoryview) -> None:
        self._ready[number] = part
        while self._in_turn in self._ready:
            self._in_turn += 1
        if self._task is None:
            self._task = self._loop.create_task(self._run())
        self._changed.set()

    async def _wait_for(self, released: list[asyncio.Future[None]]) -> None:
        """Until obstore holds none of these buffers, whatever happens to whoever waits."""
        try:
            await asyncio.wait(released)
        except asyncio.CancelledError:
            # the caller wants its buffer back: no part of this file is of use without this one
            with anyio.CancelScope(shield=True):
                await self.stop()
                await asyncio.wait(released)
            raise

    async def _wait_for_room(self) -> None:
        """Until few copies wait for obstore, or a network slower than the disk would fill the memory."""
        # those in their turn alone, which are sent whatever comes: nobody may wait for what comes too early
        while self._in_turn - self._taken > _COPIES_WAITING and not self._stopped:
            self._room.clear()
            await self._room.wait()

    # -- what goes out

    def __aiter__(self) -> Upload:
        return self

    async def __anext__(self) -> memoryview:
        """The next part, for obstore. Nothing here holds it afterwards."""
        while not self._stopped:
            if self._taken in self._ready:
                self._taken += 1
                self._room.set()
                return self._ready.pop(self._taken - 1)
            if self._complete:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        raise _StoppedError

    async def _run(self) -> None:
        try:
            await self._bucket.upload(self.key, self, part_bytes=self._part_bytes, at_once=self._at_once)
        finally:
            # those that were never sent: whoever waits for them is told by that they are let go
            self._stopped = True
            self._ready.clear()
            self._room.set()

    def _raise_failure(self) -> None:
        """Raises: StorageError if the upload has ended by one."""
        task = self._task
        if self._stopped:
            failure = None if task is None or not task.done() or task.cancelled() else task.exception()
            if isinstance(failure, StorageError):  # a fresh one: several may wait
                raise StorageError(
                    str(failure), verb=failure.verb, path=failure.path, errno=failure.errno
                ) from failure
            raise self._refusal(errno.ECANCELED, "its upload was stopped") from failure

    def _refusal(self, code: int, why: str) -> StorageError:
        return self._bucket.refusal("write", self.key, code, why)

    # -- the end

    async def finish(self) -> int:
        """Make the object; its length. Raises: StorageError unless all of it was written."""
        self._raise_failure()
        expected = self._end if self._nbytes is None else self._nbytes
        if self._written != expected:
            raise self._refusal(errno.EIO, f"it has {self._written} bytes instead of {expected}")
        if self._task is None and len(self._collected) < 2:
            parts = [memoryview(part.content)[: part.end] for part in self._collected.values()]
            await self._bucket.put(self.key, parts[0] if parts else b"")
            return expected
        for number in sorted(self._collected):  # of a file of unknown length: the last
            collected = self._collected.pop(number)
            self._queue(number, memoryview(collected.content)[: collected.end])
        self._complete = True
        self._changed.set()
        assert self._task is not None
        await asyncio.wait({self._task})
        if self._task.cancelled() or self._task.exception() is not None:
            self._raise_failure()
        return expected

    async def stop(self) -> bool:
        """Leave no open upload and no buffer that is read; False if an upload may be open all the same."""
        self._stopped = True
        self._collected.clear()
        self._changed.set()
        task = self._task
        if task is None:
            return True
        await asyncio.wait({task}, timeout=_STOP_SECONDS)
        if not task.done():  # obstore waits for a server that does not answer
            task.cancel()
            await asyncio.wait({task})
        failure = asyncio.CancelledError() if task.cancelled() else task.exception()
        logger.debug("stopped the upload of %s: %r", self.key, failure)
        # one that failed was aborted by a request that may have failed like it
        return failure is None or isinstance(failure, _StoppedError)
