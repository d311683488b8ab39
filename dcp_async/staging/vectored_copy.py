"""Many small tensors into one buffer by few system calls.

Enters: addresses of raw tensors, and where their bytes go. Leaves: filled memory. ``_foreach_copy_`` spends 2
us on each tensor, the kernel a tenth of that on each entry of a ``process_vm_writev`` from this process to
itself. Invariant: memory that is not there is a refusal, never a crash, and nothing beside the buffer is
written to.
"""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

_ENTRIES = 512
"""How many tensors one call copies: each takes two of the 1024 entries that the kernel takes at once
(UIO_MAXIOV)."""
_WORD = array("Q").itemsize


def _process_vm_writev() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).process_vm_writev
    word = ctypes.c_ulong
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, word, ctypes.c_void_p, word, word)
    function.restype = ctypes.c_ssize_t
    return cast("Callable[..., int]", function)


_copy = _process_vm_writev()


class RefusedError(Exception):
    """The kernel does not copy these bytes: it forbids it, or the memory is not there."""


@dataclass(frozen=True, slots=True)
class _Call:
    first: int
    """Entry of ``_sources`` that it begins with."""
    count: int
    target: int
    """Address that it writes to, and how much."""
    nbytes: int


class VectoredCopy:
    """A copy of some tensors to one place: each next one behind the one before and the bytes between them.

    A source list is made once and refilled with addresses; safe for one copy at a time.
    """

    def __init__(self, targets: Sequence[int], lengths: Sequence[int], run_starts: Sequence[int]) -> None:
        """Tensor i goes to ``targets[i]``, ascending. A tensor whose index is in ``run_starts`` has something
        else before it; between others lie constant bytes, which stay."""
        count = len(targets)
        ends = array("Q", map(sum, zip(targets, lengths, strict=True)))
        starts = set(run_starts) | {0}
        self._sources = array("Q", bytes(4 * _WORD * count))
        # (address, length) of a tensor, then of the constant bytes behind it: they are written over
        # themselves, which costs less than an entry for each target
        self._sources[1::4] = array("Q", lengths)
        self._sources[2::4] = ends
        gaps = array("Q", bytes(_WORD * count))
        self._calls: list[_Call] = []
        first = 0
        for index in range(1, count + 1):
            # a call ends where something else than constant bytes comes next, or where the kernel takes no
            # more entries
            if index < count and index not in starts and index - first < _ENTRIES:
                gaps[index - 1] = targets[index] - ends[index - 1]
            else:
                self._calls.append(
                    _Call(2 * first, 2 * (index - first), targets[first], ends[index - 1] - targets[first])
                )
                first = index
        self._sources[3::4] = gaps
        self._pointers: Sequence[int] | None = None

    @property
    def num_calls(self) -> int:
        """System calls that fill the buffer."""
        return len(self._calls)

    def read_from(self, pointers: Sequence[int]) -> None:
        """Say where the tensors lie. The same list as before is taken to be the same in all its parts."""
        if pointers is not self._pointers:
            self._sources[0::4] = array("Q", pointers)
            self._pointers = pointers

    def copy(self, first: int, stop: int) -> None:
        """Make these of the calls. Raises RefusedError, after which part of the buffer may be filled."""
        if _copy is None:
            raise RefusedError("this system has no process_vm_writev")
        address, _ = self._sources.buffer_info()
        # writev of the own process: the kernel checks each address, where memcpy of a freed one would crash
        target = (ctypes.c_uint64 * 2)()
        for call in self._calls[first:stop]:
            target[0], target[1] = call.target, call.nbytes
            # the process's id is asked each time: kept, it would be the parent's in a forked child
            done = _copy(os.getpid(), address + 2 * _WORD * call.first, call.count, target, 1, 0)
            # fewer bytes are no success: it stops without an error at the first address that is not there
            if done != call.nbytes:
                reason = os.strerror(ctypes.get_errno()) if done < 0 else f"{done} of {call.nbytes} bytes"
                raise RefusedError(f"process_vm_writev: {reason}")
