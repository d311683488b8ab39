"""A mapping of slots: the memory that staged bytes lie in, and what a device knows of it.

Enters: a size. Leaves: memory, as tensors and as bytes. Invariant: a device reads and writes this memory only
while it is registered, and it is unregistered before it is unmapped, whoever lets go of the arena last; never
while a copy may run, for whoever copies holds the arena. It is private memory with MADV_DONTFORK: direct I/O
and DMA on private memory that a concurrent fork() marks for copying may corrupt it (open(2)).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable

import torch

from ...errors import StorageError

_MADV_POPULATE_WRITE = 23
"""Linux 5.14: make the pages of a range, and leave what they hold."""

_MAX_TOUCHING = 8
"""Threads that make pages: beyond that the kernel's own locks are what they wait for."""

Ranges = list[tuple[int, int]]
"""[start, stop) in bytes of an arena, ascending."""
Unpin = Callable[[int, Ranges, object], None]
"""Unregisters ranges of the memory at an address; the third argument is the memory, held until that is
done."""


class Arena:
    """A mapping of ``num_slots`` slots. Owns the memory; it goes when the last view of it goes."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        nbytes = num_slots * slot_bytes
        try:
            self._mapping = self._map(nbytes)
        except (OSError, MemoryError) as error:
            raise StorageError(
                f"cannot reserve {nbytes} bytes of memory for staging: {error}; "
                "lower StagingOptions(budget_bytes=...)",
                verb="stage",
                path="",
            ) from error
        self.slot_bytes = slot_bytes
        self.memory = memoryview(self._mapping)
        self.tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self.taken = bytearray(num_slots)
        """Per slot: 0 free, 1 leased, 2 lost to a thread that hangs."""
        self.resident: list[object] = [None] * num_slots
        """Per slot: whose constant bytes it holds, if any."""
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self._registered: Ranges = []
        self._finalizer: weakref.finalize[..., Arena] | None = None

    def __repr__(self) -> str:
        return f"<Arena {len(self.taken)} x {self.slot_bytes} bytes, {len(self._registered)} ranges pinned>"

    @staticmethod
    def _map(nbytes: int) -> mmap.mmap:
        if sys.platform != "linux":
            return mmap.mmap(-1, nbytes)
        # /dev/zero gives anonymous memory that /proc/self/maps can tell from the trainer's; its first touch
        # costs less than that of shared memory
        fd = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
        try:
            mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE)
        finally:
            os.close(fd)
        mapping.madvise(mmap.MADV_DONTFORK)
        # no MADV_HUGEPAGE: where a host backs memory late, the first save took three times as long (ADR 0011)
        return mapping

    @property
    def nbytes(self) -> int:
        """How large it is."""
        return len(self.memory)

    @property
    def idle(self) -> bool:
        return 1 not in self.taken

    @property
    def has_lost(self) -> bool:
        """Whether a thread that hangs may still touch some of it."""
        return 2 in self.taken

    def typed(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole arena as a flat tensor of ``dtype``."""
        if dtype not in self._typed:
            self._typed[dtype] = self.tensor.view(dtype)
        return self._typed[dtype]

    def free_run(self, wanted: int) -> tuple[int, int]:
        """(first slot, length) of the first run of ``wanted`` free slots, or of the longest there is; none
        lies in two registrations."""
        # consecutive slots are filled by one copy, so a long run is worth the search
        best = (0, 0)
        ends = {stop // self.slot_bytes for _, stop in self._registered}
        first = self.taken.find(0)
        while first >= 0:
            end = first + 1
            while end < len(self.taken) and not self.taken[end] and end - first < wanted and end not in ends:
                end += 1
            if end - first > best[1]:
                best = (first, end - first)
            if best[1] == wanted:
                break
            first = self.taken.find(0, end)
        return best

    # what a device knows of it

    def is_pinned(self, start: int, stop: int) -> bool:
        """Whether the bytes [start, stop) are registered right now, and by one registration: CUDA refuses to
        copy a range that lies in two, or half in none."""
        return any(low <= start and stop <= high for low, high in self._registered)

    def pinned(self, start: int, stop: int, unpin: Unpin) -> None:
        """The bytes [start, stop) were registered; ``unpin`` undoes that, and is called by whoever lets go of
        the arena: it neither waits nor touches a device."""
        self._registered.append((start, stop))
        if self._finalizer is None:
            address, ranges = self.tensor.data_ptr(), self._registered
            # with the mapping, for views may be gone before the registration is
            self._finalizer = weakref.finalize(self, unpin, address, ranges, self._mapping)
            # a process that ends takes its registrations with it; a device that hangs would hold up its exit
            self._finalizer.atexit = False
        # after the finaliser is there, as a loser looks for one after it has marked its slot
        if self.has_lost:
            self.keep()

    def unpin(self) -> None:
        """Undo all registrations, unless a copy may run."""
        if self._finalizer is not None:
            self._finalizer()

    def keep(self) -> None:
        """A copy that nobody waits for may run for ever: what a device knows of this memory stays as it is
        until the process ends."""
        if self._finalizer is not None and self._finalizer.detach() is not None:
            _kept.append(self)


_kept: list[Arena] = []
"""Registered memory that a device which hangs may still write to."""


def _madvise() -> Callable[[ctypes.c_void_p, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    advise: Callable[[ctypes.c_void_p, int, int], int] = function
    return advise


_advise = _madvise()


def touch(arena: Arena, start: int, stop: int) -> bool:
    """Make the pages of [start, stop), by several threads, beside whoever uses them. False where the system
    can't: then the first copy makes them."""
    # not mmap.madvise(), which keeps the GIL until all pages are there
    advise = _advise
    if advise is None:
        return False
    num_threads = max(1, min(_MAX_TOUCHING, len(os.sched_getaffinity(0)) // 2))
    share = -(-(stop - start) // num_threads // mmap.PAGESIZE) * mmap.PAGESIZE
    address = arena.tensor.data_ptr()
    statuses: list[int] = []

    def populate(low: int, high: int) -> None:
        statuses.append(advise(ctypes.c_void_p(address + low), high - low, _MADV_POPULATE_WRITE))

    bounds = [(low, min(low + share, stop)) for low in range(start, stop, max(share, mmap.PAGESIZE))]
    helpers = [
        threading.Thread(target=populate, args=bound, name="dcp_async-touch", daemon=True)
        for bound in bounds[1:]
    ]
    for helper in helpers:
        helper.start()
    populate(*bounds[0])
    for helper in helpers:
        helper.join()
    return not any(statuses)
