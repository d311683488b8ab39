"""The objects under one root: a request for each verb, whose failure names it.

Enters: keys below the root, bytes. Leaves: what the server answered, or a StorageError with its errno:
ENOENT, EACCES, EIO. Invariant: what is returned is of the length that was announced; only obstore talks to a
server.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import anyio

from ..._concurrency import first_failure
from ...errors import StorageError
from .open_uploads import abort_open_uploads, ends_open_uploads
from .options import Credentials, Retries

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

T = TypeVar("T")
R = TypeVar("R")

_QUERY = re.compile(r"\?\S*")
_FORBIDDEN = re.compile(r"status code: 40[13]\b")
# small requests in flight: each waits for a round trip, and they cost the server little
_AT_ONCE = 32
# entries of a page, as servers cut them
_LISTED_AT_ONCE = 1000
# attempts for a body that comes cut short, or breaks off: obstore's own retries end where the body begins
_SHORT_READS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An object, as a server describes it."""

    key: str
    """Below the root."""
    name: str
    """Below its checkpoint."""
    nbytes: int
    modified: float
    """Unix seconds, by the server's clock, which may have whole ones only."""
    version: str
    """Differs from that of what was there before; "" where the server has none."""


class Bucket:
    """The objects under one root. Owns nothing that needs an end: obstore keeps connections by itself."""

    def __init__(
        self, store: ObjectStore, url: str, retries: Retries, credentials: Credentials | None = None
    ) -> None:
        self.store = store
        self._credentials = credentials
        self.url = url
        self.keeps_buffers = type(store).__name__ == "MemoryStore"
        """Whether what was put is what is stored, not a copy of it."""
        self._retries = retries
        # kept, since a fork takes all of this object along and none of the threads that answer it
        self._pid = os.getpid()

    def path_of(self, key: str) -> str:
        """What messages call ``key``."""
        return f"{self.url}/{key}" if key else self.url

    @contextlib.contextmanager
    def asking(self, verb: str, key: str) -> Iterator[None]:
        """Around a request: what obstore raises becomes a StorageError of ``verb`` and ``key``."""
        import obstore.exceptions as raised

        if os.getpid() != self._pid:  # obstore's threads are the parent's: a call would wait for ever
            raise self.refusal(
                verb,
                key,
                errno.EPERM,
                f"this process was forked from {self._pid}, which opened it; open it here anew",
            )
        try:
            yield
        except FileNotFoundError as error:
            raise self.refusal(verb, key, errno.ENOENT, _reason(error)) from error
        except (raised.PermissionDeniedError, raised.UnauthenticatedError) as error:
            raise self.refusal(verb, key, errno.EACCES, _reason(error)) from error
        except (raised.BaseError, ValueError) as error:
            # some requests, lists among them, have no kind of their own for it
            code = errno.EACCES if _FORBIDDEN.search(str(error)) else errno.EIO
            raise self.refusal(verb, key, code, _reason(error)) from error

    def refusal(self, verb: str, key: str, code: int, why: str) -> StorageError:
        return StorageError.of(verb, self.path_of(key), OSError(code, why))

    # -- reading

    async def get(self, key: str) -> bytes:
        """A whole object, a small one."""
        from obstore import get_async

        async def ask() -> bytes:
            with self.asking("read", key):
                answer = await get_async(self.store, key)
                content = bytes(await answer.bytes_async())
            # a server that was cut off may still have ended its answer well
            self._check_length(key, len(content), answer.meta["size"])
            return content

        return await self._persist(ask)

    async def get_range(self, key: str, start: int, stop: int) -> memoryview:
        """The bytes [start, stop) of ``key``, which has them."""
        from obstore import get_range_async

        # not `get_ranges`, which has a bound of its own and gives nothing before the last has come
        async def ask() -> memoryview:
            with self.asking("read", key):
                content = memoryview(await get_range_async(self.store, key, start=start, end=stop))
            self._check_length(key, len(content), stop - start)
            return content

        return await self._persist(ask)

    def _check_length(self, key: str, nbytes: int, announced: int) -> None:
        if nbytes != announced:
            raise self.refusal("read", key, errno.EIO, f"{nbytes} bytes came instead of {announced}")

    async def _persist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What ``ask`` gives. A body that broke off is asked for again."""
        deadline = anyio.current_time() + self._retries.seconds
        pause = self._retries.first_pause
        for _ in range(min(_SHORT_READS, self._retries.attempts)):
            try:
                return await ask()
            except StorageError as error:
                if error.errno != errno.EIO or anyio.current_time() >= deadline:
                    raise
            await anyio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, self._retries.longest_pause)
        return await ask()

    async def head(self, key: str) -> Entry | None:
        """What ``key`` is; None if there is none."""
        from obstore import head_async

        try:
            with self.asking("look at", key):
                return _entry(await head_async(self.store, key))
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    async def entries(self, name: str) -> list[Entry]:
        """All objects of one checkpoint."""

        async def ask() -> list[Entry]:
            # a stream of pages: a prefix of thousands of ranks is never asked for at once
            entries: list[Entry] = []
            with self.asking("list", name):
                async for page in self.store.list(name, chunk_size=_LISTED_AT_ONCE):
                    entries += [_entry(meta) for meta in page]
            return entries

        return await self._persist(ask)

    async def names(self) -> list[str]:
        """What lies under the root and has objects of its own under it."""
        from obstore import list_with_delimiter_async

        async def ask() -> list[str]:
            with self.asking("list", ""):
                listed = await list_with_delimiter_async(self.store, "")
            return [prefix.strip("/") for prefix in listed["common_prefixes"]]

        return [name for name in await self._persist(ask) if not name.startswith(".")]

    # -- writing

    async def put(self, key: str, content: bytes | memoryview) -> None:
        """An object of these bytes, in place of what was there."""
        from obstore import put_async

        with self.asking("write", key):
            await put_async(self.store, key, content, use_multipart=False)

    async def create(self, key: str, content: bytes) -> bool:
        """An object of these bytes; False if there is one. A server without preconditions always says
        True."""
        import obstore.exceptions as raised
        from obstore import put_async

        with self.asking("publish", key):
            try:
                # one request whatever its length: a precondition holds for no multipart upload of obstore's
                await put_async(self.store, key, content, mode="create")
            except raised.AlreadyExistsError:
                return False
        return True

    async def upload(
        self, key: str, parts: AsyncIterable[memoryview], *, part_bytes: int, at_once: int
    ) -> None:
        """An object of ``parts``, each of ``part_bytes`` but the last: a multipart upload, which is aborted
        when ``parts`` raises. A cancellation leaves it open."""
        from obstore import put_async

        with self.asking("write", key):
            await put_async(
                self.store, key, parts, use_multipart=True, chunk_size=part_bytes, max_concurrency=at_once
            )

    async def abort_uploads(self, name: str, uid: str) -> None:
        """End the uploads that the save ``uid`` of ``name`` left open, as far as that can be done here."""
        await abort_open_uploads(self.store, name, uid, self._credentials)

    async def ends_open_uploads(self) -> bool:
        """Whether the bucket itself ends uploads that were left open, some time later."""
        if type(self.store).__name__ != "S3Store":
            return True
        return await ends_open_uploads(self.store, self._credentials)

    async def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are gone are no failure."""
        from obstore import delete_async

        listed = list(keys)
        for start in range(0, len(listed), _LISTED_AT_ONCE):
            batch = listed[start : start + _LISTED_AT_ONCE]
            # one request for a thousand; some servers lack that, and a single key needs none
            try:
                with self.asking("remove", batch[0]):
                    await delete_async(self.store, batch if len(batch) > 1 else batch[0])
            except StorageError as error:
                if error.errno != errno.ENOENT:
                    raise
                if (
                    len(batch) > 1
                ):  # Google's say so of the first that is gone, and the rest may be there still
                    await all_of(lambda key: self.delete([key]), batch)


def _reason(error: BaseException) -> str:
    """The first line, without the queries of URLs, some of which sign."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return _QUERY.sub("", first)


def _entry(meta: ObjectMeta) -> Entry:
    key = meta["path"]
    _, _, name = key.partition("/")
    return Entry(
        key=key,
        name=name,
        nbytes=meta["size"],
        modified=meta["last_modified"].timestamp(),
        version=meta["e_tag"] or "",
    )


async def all_of(fn: Callable[[T], Awaitable[R]], items: Sequence[T], *, at_once: int = _AT_ONCE) -> list[R]:
    """``fn`` of each, in their order, a few at a time. Raises what the first of them raises."""
    # a few workers and one iterator, no task for each: a thousand ranks have a thousand files
    results: dict[int, R] = {}
    waiting = iter(enumerate(items))

    async def work() -> None:
        for index, item in waiting:
            results[index] = await fn(item)

    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            for _ in range(min(at_once, len(items))):
                group.start_soon(work)
    except BaseExceptionGroup as errors:
        failure = first_failure(errors)
    if failure is not None:
        raise failure
    return [results[index] for index in range(len(items))]
