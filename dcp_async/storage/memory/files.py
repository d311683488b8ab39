"""Bytes of files in memory: copies that leave the interpreter to others meanwhile.

Enters: buffers. Leaves: the bytes of a file, complete. Invariant: nothing is copied past an end.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Sequence
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import TypeAlias

Content: TypeAlias = "mmap | bytearray"
"""The bytes of a file, which nobody changes once it is complete."""

_STEP_BYTES = 4 << 20
"""The most that is copied in one call: what the processor's caches still hold when it is verified."""
_SMALL_BYTES = 64 << 10
"""Below it a copy is over sooner than a thread that released the interpreter has it again."""


def _copy(target: memoryview, source: memoryview) -> None:
    if len(source) < _SMALL_BYTES or source.readonly:  # ctypes can't look into what is read-only
        target[:] = source
    else:
        # an assignment of slices would stop the trainer's thread until all of it is copied
        to, start = ctypes.c_char.from_buffer(target), ctypes.c_char.from_buffer(source)
        ctypes.memmove(ctypes.addressof(to), ctypes.addressof(start), len(source))


def _allocate(nbytes: int) -> Content:
    # a bytearray is filled with zeros first, and meanwhile nobody else has the interpreter
    return mmap(-1, nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS) if nbytes else bytearray()


class MemoryFile:
    """A file being written."""

    def __init__(self, nbytes: int | None) -> None:
        """``nbytes``: the length announced; None if it is known at the end."""
        self._nbytes = nbytes
        self._content = _allocate(nbytes or 0)
        # of a file of unknown length each part is kept for itself. No lock among the threads that write one
        # file: to set an item and to append are one step
        self._parts: dict[int, Content] = {}
        self._ends: list[int] = [0]

    def write(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        if self._nbytes is None:
            part = _allocate(len(buffer))
            _copy(memoryview(part), buffer)
            self._parts[offset] = part
        elif end > self._nbytes:
            raise OSError(errno.EFBIG, f"it would have {end} bytes instead of {self._nbytes}")
        else:
            _copy(memoryview(self._content)[offset:end], buffer)
        self._ends.append(end)

    def complete(self) -> Content:
        """What was written. Raises: OSError if it has not the length announced."""
        written = max(self._ends)
        if self._nbytes is None:
            self._content = _allocate(written)
            whole = memoryview(self._content)
            for offset in sorted(self._parts):
                part = self._parts.pop(offset)
                _copy(whole[offset : offset + len(part)], memoryview(part))
        elif written != self._nbytes:
            raise OSError(errno.EIO, f"it has {written} bytes instead of {self._nbytes}")
        return self._content


def read_pieces(
    content: Content, pieces: Sequence[tuple[int, memoryview]], arrived: Callable[[int], None] | None
) -> None:
    """Fill each buffer from its offset; none if one lies past the end, which is an OSError."""
    for offset, buffer in pieces:
        if offset + len(buffer) > len(content):
            raise OSError(errno.EIO, f"it ends at byte {len(content)}; byte {offset + len(buffer)} is wanted")
    whole = memoryview(content)
    done = told = 0
    for offset, buffer in pieces:
        # in steps only where each is verified at once: a thread waits for the interpreter after each of them
        most = _STEP_BYTES if arrived is not None else max(1, len(buffer))
        for start in range(0, len(buffer), most):
            part = buffer[start : start + most]
            _copy(part, whole[offset + start : offset + start + len(part)])
            done += len(part)
            if arrived is not None and done - told >= most:
                arrived(done)
                told = done
