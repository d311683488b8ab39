"""Loads leave the system's page cache as they found it: a restore must not push a data set out of memory.

Enters: an open file. Leaves: which of its ranges the cache did not hold, and, later, those of them given back
that were read. What another process brought in meanwhile goes with them: to it that costs time, nothing else.
Where the system does not tell (Linux before 6.5, other systems, a file that this process may neither write
nor owns) nothing is known, and nothing is given back.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

_CACHESTAT = 451
"""The number of the system call, the same on all architectures; the C library has no name for it yet."""
_GRAIN_BYTES = 1 << 20
"""A range that is held in part is looked at no closer than this, and stays."""


def absent_ranges(fd: int, nbytes: int) -> list[tuple[int, int]] | None:
    """(offset, length) of what the page cache does not hold of the file's first ``nbytes``, ascending; None
    where the system does not tell."""
    if sys.platform != "linux":
        return None
    if nbytes == 0:
        return []
    try:
        return list(_absent(ctypes.CDLL(None, use_errno=True), fd, 0, nbytes))
    except OSError:
        return None


def _absent(libc: ctypes.CDLL, fd: int, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
    counts = (ctypes.c_uint64 * 5)()  # cached pages come first
    span = (ctypes.c_uint64 * 2)(offset, nbytes)
    if libc.syscall(_CACHESTAT, fd, span, counts, 0) != 0:
        raise OSError(ctypes.get_errno(), "cachestat")
    if counts[0] == 0:
        yield offset, nbytes
    # by halves: the call counts the pages of a range, and does not say which they are
    elif counts[0] < -(-nbytes // mmap.PAGESIZE) and nbytes > _GRAIN_BYTES:
        half = -(-nbytes // (2 * _GRAIN_BYTES)) * _GRAIN_BYTES
        yield from _absent(libc, fd, offset, half)
        yield from _absent(libc, fd, offset + half, nbytes - half)


def overlaps(absent: Sequence[tuple[int, int]], read: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, length) of what lies both in ``absent``, as ``absent_ranges`` gives it, and in ``read``, which
    holds (start, stop) in any order."""
    ranges: list[tuple[int, int]] = []
    index, done = 0, 0
    for start, stop in sorted(read):
        done = max(done, start)  # reads may overlap, blocks of checksums being read whole
        while index < len(absent) and done < stop:
            offset, length = absent[index]
            low, high = max(offset, done), min(offset + length, stop)
            if low < high and ranges and sum(ranges[-1]) == low:
                # as one: a folio that two ranges share would stay
                ranges[-1] = (ranges[-1][0], high - ranges[-1][0])
            elif low < high:
                ranges.append((low, high - low))
            if offset + length > stop:
                break
            index += 1
        done = max(done, stop)
    return ranges


def give_back(fd: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Let the page cache forget ``ranges``; what is being written or mapped stays."""
    for offset, nbytes in ranges:
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
