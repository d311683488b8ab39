"""Numbered mailboxes on a process group's store: one thread waits, one posts.

Enters: a store that can be cloned. Leaves: plain messages, each delivered once, in the order of its box.
Invariant: a client of a store serves one call at a time, so what blocks has a clone of its own; every key
that was read is deleted. A box that one rank writes is numbered by its writer, a shared one by a counter in
the store. Source: docs/adr/0010.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from .._concurrency import BlockingThreads
from ..errors import EngineStateError
from ..trust import dumps, loads

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
"""Longer messages are cut: one huge value would hold up the store's server, which is a single thread."""
_PATIENCE = timedelta(days=3650)
"""How long a clone waits for a key: c10d complains on stderr when a wait times out, so ours never do."""
_JOIN_SECONDS = 5.0
"""How long calls to a store that is alive may take at the end before their threads are left behind."""
_WHOLE, _CUT, _WAKE, _SKIP = b"m", b"c", b"w", b"s"


class Woken(Exception):
    """The wait for a message was ended by ``wake()``."""


class StoreGoneError(EngineStateError):
    """The store can't be reached; nothing will be sent or received any more."""


class StoreChannel:
    """Sends and receives for one engine. Owns two clones of the store and two threads; never closes the store
    it was given, but keeps it, and with it a server that lives in this process, until ``close()``."""

    def __init__(self, store: dist.Store, prefix: str) -> None:
        self.sent = 0
        """Messages that were put into boxes."""
        self.received = 0
        """Messages that were taken out of the box that is read."""
        self.broken = ""
        """Why a call failed; no further one is made then, since c10d prints a stack for each."""
        self._wait_store: dist.Store
        self._post_store: dist.Store
        self._connected = False
        self._store: dist.Store | None = dist.PrefixStore(prefix, store)
        # one thread each: two that post would put the messages of one box out of order
        self._posting = BlockingThreads("dcp_async-post", 1)
        self._waiting = BlockingThreads("dcp_async-wait", 1)
        self._numbers: Counter[str] = Counter()
        self._box, self._next = "", 1
        self._stopping = False
        self._abandoned = False

    def __repr__(self) -> str:
        state = "broken" if self.broken else "stopping" if self._stopping else "open"
        return f"<StoreChannel {self._box or '-'} next={self._next} {state}>"

    def connect(self) -> None:
        """Make the clones; blocks. Raises EngineStateError for a store that has none."""
        assert self._store is not None
        try:
            # clones are made once: some take seconds, and their sockets pile up
            self._wait_store, self._post_store = _clone(self._store), _clone(self._store)
        except dist.DistError as error:
            raise StoreGoneError(f"the process group's store can't be reached: {error}") from error
        except RuntimeError as error:
            raise EngineStateError(
                f"the process group's store can't be cloned ({str(error).splitlines()[0]}), so a rank could "
                "not wait for a message and send one at the same time. Use a TCPStore, as init_process_group "
                "does by default"
            ) from error
        for store in (self._wait_store, self._post_store):
            store.set_timeout(_PATIENCE)
        self._connected = True

    def wait_with(self, fn: Callable[..., T], *args: object) -> concurrent.futures.Future[T]:
        """Run ``fn`` in the thread that may wait for messages."""
        return self._waiting.submit(fn, *args)

    def post_with(self, fn: Callable[..., T], *args: object) -> concurrent.futures.Future[T]:
        """Run ``fn`` in the thread that posts, after what was given to it before."""
        return self._posting.submit(fn, *args)

    def _call(self, fn: Callable[..., T], *args: object) -> T:
        if self.broken:
            raise StoreGoneError(self.broken)
        try:
            return fn(*args)
        except (RuntimeError, OSError) as error:
            self.broken = (
                "the process group's store is gone: the process that hosts it (rank 0's, or the launcher's) "
                f"ended or can't be reached ({(str(error) or type(error).__name__).splitlines()[0]})"
            )
            raise StoreGoneError(self.broken) from error

    # In the thread that waits.

    def read_from(self, box: str, start: int = 1) -> None:
        """From here on ``take`` reads ``box``."""
        self._box, self._next = box, start

    @property
    def unread(self) -> int:
        """The number of the first message that was not taken."""
        return self._next

    def take(self) -> Any:
        """The next message; blocks until there is one.

        Raises: Woken, with the message left where it is; StoreGoneError; ValueError, see ``plain.loads``.
        """
        while True:
            key = f"{self._box}/{self._next}"
            if self._stopping:  # looked at after the key is known to wake(), or its call could be missed
                raise Woken
            raw = self._call(self._wait_store.get, key)
            if raw != _WAKE:
                if self._stopping:
                    raise Woken
                # counted before the key goes, so that skip_gap() does not take it for one that never came
                self._next += 1
            self._call(self._wait_store.delete_key, key)
            # what is neither of the two, a former reader's wake or a skipped gap, is passed over
            if raw[:1] == _WHOLE:
                self.received += 1
                return loads(raw[1:])
            if raw[:1] == _CUT:
                self.received += 1
                return loads(b"".join(self._chunks(*loads(raw[1:]))))

    def _chunks(self, name: str, count: int) -> Iterable[bytes]:
        for chunk in range(count):
            yield self._call(self._wait_store.get, f"{name}/{chunk}")
            self._call(self._wait_store.delete_key, f"{name}/{chunk}")

    # In the thread that posts.

    def send(self, box: str, message: object) -> None:
        """Put ``message`` into a box that only this rank writes. Raises StoreGoneError, ValueError."""
        self._deliver(box, None, dumps(message))

    def send_shared(self, box: str, message: object) -> None:
        """Put ``message`` into a box that many ranks write. Raises StoreGoneError, ValueError."""
        # before a number is taken: what is no plain data must leave no gap in the box
        raw = dumps(message)
        self._deliver(box, lambda: self._call(self._post_store.add, box, 1), raw)

    def send_each(self, messages: Sequence[tuple[str, object]]) -> None:
        """Put each message into its box; if one can't be encoded, none is sent. Raises as ``send``."""
        encoded: dict[int, bytes] = {}  # by identity: a common answer is encoded once
        for _, message in messages:
            if id(message) not in encoded:
                encoded[id(message)] = dumps(message)
        for box, message in messages:
            self._deliver(box, None, encoded[id(message)])

    def _deliver(self, box: str, number: Callable[[], int] | None, raw: bytes) -> None:
        if len(raw) > CHUNK_BYTES:
            name = f"{box}/chunk/{secrets.token_hex(8)}"
            count = -(-len(raw) // CHUNK_BYTES)
            for chunk in range(count):
                data = raw[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]
                self._call(self._post_store.set, f"{name}/{chunk}", data)
            value = _CUT + dumps((name, count))
        else:
            value = _WHOLE + raw
        if number is None:
            self._numbers[box] += 1
        # after the chunks: from the number on nothing must be able to fail, since the reader waits for it
        position = self._numbers[box] if number is None else number()
        self._call(self._post_store.set, f"{box}/{position}", value)
        self.sent += 1

    def add(self, key: str, amount: int) -> int:
        """Count; a round trip, so what was sent before has arrived when it returns. Raises StoreGoneError."""
        return self._call(self._post_store.add, key, amount)

    def beat(self, mine: str, others: Sequence[str]) -> list[int]:
        """Move this rank's heartbeat and read those of ``others``, which must exist. Raises
        StoreGoneError."""
        self._call(self._post_store.add, mine, 1)
        return [int(raw) for raw in self._call(self._post_store.multi_get, list(others))] if others else []

    def delete(self, keys: Iterable[str]) -> None:
        """Remove keys, there or not. Raises StoreGoneError."""
        for key in keys:
            self._call(self._post_store.delete_key, key)

    def delete_unread(self, box: str, start: int) -> None:
        """Remove what was sent to ``box``, by this rank alone, from number ``start`` on. Raises
        StoreGoneError."""
        self.delete(f"{box}/{number}" for number in range(start, self._numbers.pop(box, 0) + 1))

    def skip_gap(self) -> bool:
        """Whether the message that is waited for was numbered but never came, because its sender died in
        between; then those behind it are read. Raises StoreGoneError."""
        if not self._connected or not self._box:
            return False
        number = self._next
        key = f"{self._box}/{number}"
        # a gap is counted and has no key: whoever took the number died before it wrote
        if self._call(self._post_store.add, self._box, 0) < number or self._call(
            self._post_store.check, [key]
        ):
            return False
        # taken by the other thread between the two looks: the key is gone because it was read
        if number != self._next:
            return False
        self._call(self._post_store.set, key, _SKIP)
        return True

    # The end, on the loop.

    async def stop_taking(self, reader: concurrent.futures.Future[Any]) -> None:
        """Make ``take`` raise Woken and wait until ``reader``, the call that takes, has ended. Where it does
        not end, or nothing can be posted, the threads are abandoned."""
        self._stopping = True
        # what was posted must have ended too; a wake that nobody takes would stay in the store
        last = self.post_with(int if reader.done() else self._wake)
        calls: list[asyncio.Future[Any]] = [asyncio.wrap_future(reader), asyncio.wrap_future(last)]
        for call in calls:  # whoever made it looks at what it raises
            call.add_done_callback(lambda done: done.cancelled() or done.exception())
        loop = asyncio.get_running_loop()
        given_up: asyncio.Future[None] = loop.create_future()
        # a process that is told to end at once must not sit out these seconds
        with self._posting.abandonment(given_up):
            deadline = loop.time() + _JOIN_SECONDS
            while not given_up.done() and (pending := [call for call in calls if not call.done()]):
                left = deadline - loop.time()
                if left <= 0:
                    self.abandon()
                    return
                await asyncio.wait([*pending, given_up], timeout=left, return_when=asyncio.FIRST_COMPLETED)

    def _wake(self) -> None:
        if self._connected and self._box and not self.broken:
            # never over a message; once more by set(), because the older kind of server (libuv off) wakes
            # nobody for the first. A second wake that nobody takes is a key that the next reader passes over.
            key = f"{self._box}/{self._next}"
            if self._call(self._post_store.compare_set, key, "", _WAKE) == _WAKE:
                self._call(self._post_store.set, key, _WAKE)

    def abandon(self) -> None:
        """Threads that hang are left behind, now and by ``close``."""
        self._stopping = True
        self._abandoned = True
        self._posting.abandon()
        self._waiting.abandon()

    def close(self) -> None:
        """Join the threads, which must be idle, unless they were abandoned; drop the clones."""
        self._posting.shutdown()
        self._waiting.shutdown()
        # a thread that was left behind may come back, and looks for its clone here
        if self._connected and not self._abandoned:
            del self._wait_store, self._post_store
        self._store = None


def _clone(store: dist.Store) -> dist.Store:
    clone: dist.Store = store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
    return clone
