"""The staging pool: page-aligned slots, leased in runs, shared by all saves of a stager.

Enters: requests for consecutive slots. Leaves: leases. Invariant: bytes in flight never exceed the budget,
and a slot is given out again only after whoever leased it has released it; one that a hanging thread may
still touch is never given out again.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import dataclass, field

from ..._concurrency import settle
from ...errors import StorageError
from .arena import Arena


@dataclass(slots=True, eq=False)
class Lease:
    """Consecutive slots, to be released one by one."""

    arena: Arena
    """Until all are released: who keeps a lease longer keeps no memory."""
    first: int
    count: int
    slot_bytes: int
    held: set[int] = field(default_factory=set)
    """Indices (from 0) that were not released yet."""
    is_lost: bool = False
    """A thread that hangs may still touch some of it."""

    @property
    def offset(self) -> int:
        """Where the lease starts in the arena, in bytes."""
        return self.first * self.slot_bytes

    def memory(self, start: int, stop: int) -> memoryview:
        """The lease's bytes [start, stop)."""
        return self.arena.memory[self.offset + start : self.offset + stop]


class BufferPool:
    """Leases slots; safe to use from several loops. Owns its arenas: one, or more while it grows under
    load."""

    def __init__(self, *, slot_bytes: int, budget_bytes: int | None) -> None:
        self.slot_bytes = slot_bytes
        self._budget = budget_bytes
        self._arenas: list[Arena] = []
        self._reserved: dict[object, int] = {}
        self._lock = threading.Lock()  # engines on several loops may share a stager; never held across a wait
        self._waiters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    def __repr__(self) -> str:
        return f"<BufferPool {self._total()} x {self.slot_bytes} bytes, {self.leased} leased>"

    @property
    def has_budget(self) -> bool:
        """Whether the engines share less than what each of them wants."""
        return self._budget is not None

    @property
    def leased(self) -> int:
        """How many slots are out."""
        return sum(arena.taken.count(1) for arena in self._arenas)

    @property
    def full(self) -> bool:
        """Whether a lease would have to wait."""
        with self._lock:
            # without an arena nothing waits: the first lease maps it
            return (
                bool(self._arenas)
                and all(0 not in arena.taken for arena in self._arenas)
                and not self._growth()
            )

    @property
    def arenas(self) -> tuple[Arena, ...]:
        """The memory that there is by now."""
        with self._lock:
            return tuple(self._arenas)

    def reserve(self, owner: object, num_slots: int) -> None:
        """``owner`` will want that many slots; what the budget allows is there from the next idle time on."""
        with self._lock:
            self._reserved[owner] = num_slots

    def forget(self, owner: object) -> None:
        """``owner`` wants nothing any more."""
        with self._lock:
            self._reserved.pop(owner, None)

    @property
    def num_slots(self) -> int:
        """How many slots there are, or will be."""
        with self._lock:
            return max(self._target_slots(), self._total())

    def _total(self) -> int:
        return sum(len(arena.taken) for arena in self._arenas)

    def _target_slots(self) -> int:
        wanted = sum(self._reserved.values())
        if self._budget is not None:
            wanted = min(wanted, self._budget // self.slot_bytes)
        return max(wanted, 1)

    def _growth(self) -> int:
        return max(self._target_slots() - self._total(), 0)

    def _grow(self) -> None:
        """One arena is best, since runs do not reach over two: while slots are out another is added, and when
        none is all become one."""
        # one that has lost slots stays: its memory can't go, and counts as long as the process lives
        kept = [arena for arena in self._arenas if arena.has_lost]
        others = [arena for arena in self._arenas if not arena.has_lost]
        wanted = self._target_slots() - sum(len(arena.taken) for arena in kept)
        sizes = [len(arena.taken) for arena in others]
        is_idle = all(arena.idle for arena in others)
        if is_idle and wanted > 0 and (len(sizes) > 1 or wanted > sum(sizes)):
            # one that is large enough, as after a load beside a save, is mapped and pinned already. Nothing
            # but these two lists refers to the rest: the old memory goes before the new comes
            largest = max(sizes, default=0)
            others = [others[sizes.index(largest)]] if largest >= wanted else []
            self._arenas = kept + others
        have = sum(len(arena.taken) for arena in others)
        if wanted > have:
            self._arenas.append(Arena(wanted - have, self.slot_bytes))

    def _try_lease(self, wanted: int) -> Lease | None:
        with self._lock:
            self._grow()
            # lost, not merely taken: a slot that is leased comes back, and is waited for
            if all(arena.taken.count(2) == len(arena.taken) for arena in self._arenas):
                raise StorageError(
                    "no staging buffer is left: each is held by a storage or a device that does not answer; "
                    "restart once it does",
                    verb="stage",
                    path="",
                )
            # a shorter run now is better than a longer one later: the disk works meanwhile
            runs = [(arena, *arena.free_run(wanted)) for arena in self._arenas]
            arena, first, count = max(runs, key=lambda run: run[2])
            if count == 0:
                return None
            arena.taken[first : first + count] = bytes([1]) * count
            return Lease(arena, first, count, self.slot_bytes, set(range(count)))

    def lease_now(self, wanted: int) -> Lease | None:
        """As ``lease``, but None instead of a wait."""
        return self._try_lease(wanted)

    async def lease(self, wanted: int) -> Lease:
        """Between 1 and ``wanted`` consecutive slots, as many as there are; waits while there are none.

        Raises: StorageError if no slot will ever be free again.
        """
        while (lease := self._try_lease(wanted)) is None:
            loop = asyncio.get_running_loop()
            waiter = (loop, loop.create_future())
            with self._lock:
                self._waiters.append(waiter)
            try:
                # a slot may have come back between the try and the queue
                if (lease := self._try_lease(wanted)) is not None:
                    return lease
                await waiter[1]
            finally:
                with self._lock:
                    if waiter in self._waiters:
                        self._waiters.remove(waiter)
                self._wake()  # whoever comes next looks too: there may be slots for both
        return lease

    def _wake(self) -> None:
        with self._lock:
            free = any(0 in arena.taken for arena in self._arenas)
            lost = all(1 not in arena.taken for arena in self._arenas)
            if not self._waiters or not (free or lost):
                return
            loop, future = self._waiters.popleft()
        # the slot may have been released on another engine's loop, and a future belongs to its own
        loop.call_soon_threadsafe(settle, future)

    def release(self, lease: Lease, index: int, *, lost: bool = False) -> None:
        """Give back slot ``index`` of ``lease``; ``lost`` if a hanging thread may still touch it."""
        with self._lock:
            # once only: by now somebody else may have leased the slot, or a hanging thread may hold it for
            # good
            if index not in lease.held:
                return
            lease.held.discard(index)
            lease.arena.taken[lease.first + index] = 2 if lost else 0
            if lost:
                lease.is_lost = True
                lease.arena.keep()
            elif not lease.held and not lease.is_lost:  # a thread that hangs may come back and look at it
                del lease.arena
        self._wake()

    def release_all(self, lease: Lease, *, lost: bool = False) -> None:
        """Give back whatever of ``lease`` is still out; ``lost`` as for ``release``."""
        for index in list(lease.held):
            self.release(lease, index, lost=lost)

    def close(self) -> None:
        """Let go of the arena; leases that are out stay valid until they are dropped."""
        with self._lock:
            self._arenas.clear()
