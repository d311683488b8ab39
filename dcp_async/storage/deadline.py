"""Every call to a storage of the user's ends: with what it returns, or in time with an error that names it.

Enters: a Storage that somebody else wrote. Leaves: the same, whose verbs raise StuckCallError when they have
not returned in time. Invariant: whoever waits for a verb stops waiting after ``seconds``, or when ``abandon``
is called, also where the verb ignores its cancellation; until then a buffer belongs to the verb.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import anyio

from .._concurrency import settle
from .base import (
    NO_NAMES,
    NamesUids,
    Reader,
    SharedTransaction,
    SharingStorage,
    Storage,
    StoredCheckpoint,
    Transaction,
    gives_public_names,
    is_sharing,
    turn_to_copy,
)
from .calls import StuckCallError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Task: TypeAlias = "asyncio.Task[tuple[Any, BaseException | None]]"

_LEADER_SECONDS = 30.0
"""More for ``begin`` on ranks that wait there for what the leading one makes."""


class Deadline:
    """Limits calls. Belongs to one engine, and is used on its loop."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._given_up: asyncio.Future[None] | None = None

    def _abandonment(self) -> asyncio.Future[None]:
        # not in __init__, which may run where no loop does
        if self._given_up is None:
            self._given_up = asyncio.get_running_loop().create_future()
        return self._given_up

    def abandon(self) -> None:
        """Nobody waits any more."""
        settle(self._abandonment())

    async def call(
        self, verb: str, path: str, call: Awaitable[T], *, more: float = 0.0, late: set[Task] | None = None
    ) -> T:
        """What ``call`` returns. It joins ``late`` if it goes on after nobody waits for it.

        Cancellation: goes on to ``call``, and is raised once that has ended; from a StuckCallError if it has
        not in time.
        """
        loop = asyncio.get_running_loop()
        scope = anyio.CancelScope()
        # a task of its own: a verb that ignores its cancellation must not keep whoever waits for it
        task = loop.create_task(_outcome(call, scope))
        given_up = self._abandonment()
        deadline = loop.time() + self.seconds + more
        cancelled: asyncio.CancelledError | None = None
        while not task.done() and not given_up.done() and (left := deadline - loop.time()) > 0:
            waits: set[asyncio.Future[Any]] = {task, given_up}
            try:
                # a cancelled scope would interrupt each further wait, and the verb has to be seen to its end
                with anyio.CancelScope(shield=cancelled is not None):
                    await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError as error:
                cancelled = error
                scope.cancel()  # what the verb shields goes on: `begin` must not lose what it has made
        if not task.done():
            # natively: an anyio scope would be waited for
            task.cancel()
            if late is not None:
                late.add(task)
                task.add_done_callback(late.discard)
            stuck = StuckCallError.after(verb, path, None if given_up.done() else self.seconds + more)
            if cancelled is None:
                raise stuck
            # who cancelled gets the cancellation; that a call hangs must not be lost with it
            logger.error("%s", stuck)
            raise cancelled from stuck
        if cancelled is not None:
            raise cancelled
        value, failure = task.result()
        if failure is not None:
            raise failure
        result: T = value
        return result


async def _outcome(call: Awaitable[Any], scope: anyio.CancelScope) -> tuple[Any, BaseException | None]:
    """What it returns and raises; a SystemExit that left a task would end the loop, and all saves with it."""
    with scope:
        try:
            return await call, None
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            return None, error
    # ``scope`` kept its cancellation to itself
    return None, asyncio.CancelledError()


class LimitedStorage:
    """A Storage whose verbs end. Owns nothing; ``close`` and ``connect`` are the inner storage's."""

    def __init__(self, inner: Storage, seconds: float) -> None:
        self._inner = inner
        self._deadline = Deadline(seconds)

    def __repr__(self) -> str:
        return repr(self._inner)

    async def connect(self) -> None:
        await self._deadline.call("open", repr(self._inner), self._inner.connect())

    async def close(self) -> None:
        await self._deadline.call("close", repr(self._inner), self._inner.close())

    def abandon(self) -> None:
        """Stops waiting; the inner storage may serve others, whose calls may be fine."""
        self._deadline.abandon()

    async def begin(
        self,
        name: str,
        files: Mapping[str, int | None],
        *,
        uid: str,
        replace: bool,
        led_from: str | None = None,
    ) -> Transaction:
        return await self._begun(
            name,
            lambda: self._inner.begin(name, files, uid=uid, replace=replace, led_from=led_from),
            is_led=led_from is not None,
        )

    @property
    def gives_public_names(self) -> bool:
        """Whether the storage within lets a file be found under another name."""
        return gives_public_names(self._inner)

    @property
    def shares_files(self) -> bool:
        """Whether the storage within lets ranks share files."""
        return is_sharing(self._inner)

    async def begin_shared(
        self,
        name: str,
        files: Mapping[str, int | None],
        shared: Mapping[str, int],
        *,
        uid: str,
        replace: bool,
        led_from: str | None = None,
    ) -> SharedTransaction:
        inner = cast(SharingStorage, self._inner)
        return await self._begun(
            name,
            lambda: inner.begin_shared(name, files, shared, uid=uid, replace=replace, led_from=led_from),
            is_led=led_from is not None,
        )

    async def _begun(
        self, name: str, begin: Callable[[], Awaitable[Transaction]], *, is_led: bool
    ) -> LimitedTransaction:
        """The transaction that ``begin`` gives; a rank that is led waits for the one that leads as well."""
        path = f"{name!r} in {self._inner!r}"
        begun = await self._obtain(
            path,
            "create",
            begin,
            "remove",
            lambda transaction: transaction.abort(),
            more=_LEADER_SECONDS if is_led else 0.0,
        )
        return LimitedTransaction(begun, self._deadline, path)

    async def list(self) -> Sequence[StoredCheckpoint]:
        return await self._deadline.call("list", repr(self._inner), self._inner.list())

    async def remove(self, name: str, *, unless_read: bool = False) -> None:
        removing = self._inner.remove(name, unless_read=unless_read)
        await self._deadline.call("remove", f"{name!r} in {self._inner!r}", removing)

    async def sweep(self, *, named: NamesUids) -> None:
        await self._deadline.call("sweep", repr(self._inner), self._inner.sweep(named=named))

    async def open(self, name: str) -> Reader:
        path = f"{name!r} in {self._inner!r}"
        opened = await self._obtain(
            path, "open", lambda: self._inner.open(name), "close", lambda reader: reader.close()
        )
        return LimitedReader(opened, self._deadline, path)

    async def _obtain(
        self,
        path: str,
        verb: str,
        call: Callable[[], Awaitable[T]],
        release_verb: str,
        release: Callable[[T], Awaitable[None]],
        *,
        more: float = 0.0,
    ) -> T:
        """What ``call`` gives. Where nobody waits for it any more it is released as soon as it is there."""
        # what ``call`` has made must be known here even if the wait for it is cancelled at that moment
        obtained: list[T] = []

        async def obtain() -> None:
            obtained.append(await call())
            if has_left:  # nobody waits: what came late would stay open for ever
                await release(obtained[0])

        has_left = False
        try:
            await self._deadline.call(verb, path, obtain(), more=more)
        except BaseException:
            has_left = True
            if obtained:  # it was cancelled just then
                with anyio.CancelScope(shield=True):
                    await self._deadline.call(release_verb, path, release(obtained[0]))
            raise
        return obtained[0]


class _Limited:
    """What transactions and readers share: calls that hang, while nothing that they use may be released."""

    def __init__(self, deadline: Deadline, path: str) -> None:
        self._deadline, self._path = deadline, path
        # calls that nobody waits for any more, and that may still use buffers and descriptors
        self._late: set[Task] = set()
        self._ending: asyncio.Task[None] | None = None

    async def _call(self, verb: str, file: str, call: Awaitable[T]) -> T:
        path = f"{file} of {self._path}" if file else self._path
        return await self._deadline.call(verb, path, call, late=self._late)

    def _end_later(self, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Release what calls that hang use, should they come back."""

        async def wait_and_end() -> None:
            while self._late:
                # in a loop: another call may join while these are waited for
                await asyncio.wait(self._late)
            try:
                await end()
            except Exception as error:
                logger.warning("could not release %s: %s", self._path, error)

        # once: ``close`` and ``abort`` may be called again while it waits
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(wait_and_end())


class LimitedTransaction(_Limited):
    """A Transaction whose verbs end."""

    def __init__(self, inner: Transaction, deadline: Deadline, path: str) -> None:
        super().__init__(deadline, path)
        self._inner = inner

    def __repr__(self) -> str:
        return repr(self._inner)

    async def put(self, file: str, offset: int, buffer: memoryview) -> None:
        await self._call("write", file, self._inner.put(file, offset, buffer))

    async def seal(self, file: str) -> None:
        await self._call("sync", file, self._inner.seal(file))

    async def verify(self, files: Mapping[str, int]) -> None:
        verify = getattr(self._inner, "verify", None)  # storages that were written before it have none
        if verify is not None:
            await self._call("verify", "", verify(files))

    def hand_over(self) -> None:
        self._inner.hand_over()

    async def fetch(self, file: str, offset: int, buffer: memoryview) -> None:
        inner = cast(SharedTransaction, self._inner)
        await self._call("read", file, inner.fetch(file, offset, buffer))

    async def drop(self, files: Sequence[str]) -> None:
        await self._call("remove", ", ".join(files), cast(SharedTransaction, self._inner).drop(files))

    async def commit(
        self,
        metadata: bytes,
        manifest: bytes,
        *,
        replace: bool,
        public_names: Mapping[str, str] = NO_NAMES,
    ) -> None:
        # storages that were written before them know no public names
        more = {"public_names": public_names} if public_names else {}
        await self._call("publish", "", self._inner.commit(metadata, manifest, replace=replace, **more))

    async def abort(self) -> None:
        if self._late:  # a write that hangs may still write, and a commit publish
            self._end_later(self._inner.abort)
            raise StuckCallError.after("remove", self._path, self._deadline.seconds)
        await self._call("remove", "", self._inner.abort())


class LimitedReader(_Limited):
    """A Reader whose verbs end."""

    def __init__(self, inner: Reader, deadline: Deadline, path: str) -> None:
        super().__init__(deadline, path)
        self._inner = inner

    def __repr__(self) -> str:
        return repr(self._inner)

    async def metadata(self) -> bytes:
        return await self._call("read", ".metadata", self._inner.metadata())

    async def rank_metadata(self) -> Mapping[int, bytes]:
        return await self._call("read", "__*.metadata", self._inner.rank_metadata())

    async def manifest(self) -> Sequence[bytes]:
        return await self._call("read", "manifest-*.json", self._inner.manifest())

    async def size(self, file: str) -> int:
        return await self._call("open", file, self._inner.size(file))

    async def read_into(
        self,
        file: str,
        pieces: Sequence[tuple[int, memoryview]],
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        await self._call("read", file, self._inner.read_into(file, pieces, arrived))

    async def turn_to_copy(self, file: str, why: str) -> bool:
        return await self._call("open", file, turn_to_copy(self._inner, file, why))

    async def give_back(self) -> None:
        try:
            await self._call("close", "", self._inner.give_back())
        except StuckCallError as error:  # it raises nothing
            logger.debug("what was read stays in caches: %s", error)

    async def close(self) -> None:
        if self._late:
            logger.warning("%s stays open while a call to it hangs", self._path)
            self._end_later(self._inner.close)
            return
        try:
            await self._call("close", "", self._inner.close())
        except StuckCallError as error:  # what was read is right all the same
            logger.warning("%s", error)
