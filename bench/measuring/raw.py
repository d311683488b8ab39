"""What the machine can do with the same bytes and no checkpoint around them: one copy, one write, one read.

In: the tensors of a workload and a directory. Out: seconds of each floor. They are the denominators of the
goals.
Keeps: the arena is plain, page-aligned, private memory that was touched before anything is timed; a write is
durable (file and directory synced) when its time ends; a read ends in the arena.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..engines import sync

ALIGNMENT = 4096
CHUNK_BYTES = 32 << 20
NUM_THREADS = 2
COPIES_A_SAMPLE = 3


def packed_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """How much memory they take one behind the other, whole pages of it."""
    return -(-_offsets(tensors)[-1] // ALIGNMENT) * ALIGNMENT


def packed_views(whole: torch.Tensor, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """A tensor like each of these, one behind the other in ``whole``, which is bytes."""
    return tuple(
        whole[offset : offset + t.nbytes].view(t.dtype).view(t.shape)
        for offset, t in zip(_offsets(tensors), tensors, strict=False)
    )


def _offsets(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list(itertools.accumulate((-(-t.nbytes // 64) * 64 for t in tensors), initial=0))


class Raw:
    """The floors over one state; owns its arena and its file, closes both in `close()`."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], directory: Path) -> None:
        self._sources = list(tensors)
        self.nbytes = packed_bytes(tensors)
        self._arena = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._arena)
        whole = torch.frombuffer(self._arena, dtype=torch.uint8)
        whole.zero_()
        self.copies = packed_views(whole, tensors)
        self._directory = directory
        self.path = directory / "raw.bin"
        self.direct = self._takes_direct()

    def copy(self) -> float:
        """Seconds of one `_foreach_copy_` of all tensors into the arena, the best of a few.

        No neighbour may raise a floor: the barrier after each large tensor makes this call lose more to a
        busy core than any engine loses (up to 10 x was seen).
        """
        best = float("inf")
        for _ in range(COPIES_A_SAMPLE):
            start = time.perf_counter()
            torch._foreach_copy_(list(self.copies), self._sources)
            best = min(best, time.perf_counter() - start)
        return best

    def write(self) -> float:
        """Seconds to a durable fresh file of the arena's bytes, direct where the file system takes it."""
        self.discard()
        start = time.perf_counter()
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | (os.O_DIRECT if self.direct else 0)
        descriptor = os.open(self.path, flags)
        try:
            self._each_chunk(lambda offset, chunk: os.pwrite(descriptor, chunk, offset))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync(self._directory)
        return time.perf_counter() - start

    def read(self, *, direct: bool) -> float:
        """Seconds to read the file back into the arena."""
        start = time.perf_counter()
        descriptor = os.open(self.path, os.O_RDONLY | (os.O_DIRECT if direct and self.direct else 0))
        try:
            self._each_chunk(lambda offset, chunk: os.preadv(descriptor, [chunk], offset))
        finally:
            os.close(descriptor)
        return time.perf_counter() - start

    def discard(self) -> None:
        """Remove the file, and wait until the file system has let go of it."""
        self.path.unlink(missing_ok=True)
        sync(self._directory)

    def close(self) -> None:
        self.discard()
        self.copies = ()

    def _each_chunk(self, call: Callable[[int, memoryview], int]) -> None:
        offsets = iter(range(0, self.nbytes, CHUNK_BYTES))
        lock = threading.Lock()
        failures: list[BaseException] = []

        def run() -> None:
            try:
                while True:
                    with lock:
                        offset = next(offsets, None)
                    if offset is None:
                        return
                    chunk = self._view[offset : offset + CHUNK_BYTES]
                    if (done := call(offset, chunk)) != len(chunk):
                        raise OSError(
                            f"{self.path}: {done} of {len(chunk)} bytes at {offset}: is the disk full?"
                        )
            except OSError as error:
                failures.append(error)

        threads = [threading.Thread(target=run) for _ in range(NUM_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def _takes_direct(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
            try:
                os.pwrite(descriptor, self._view[:ALIGNMENT], 0)
            finally:
                os.close(descriptor)
        except OSError:
            return False
        finally:
            self.discard()
        return True
