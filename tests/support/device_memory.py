"""Memory as a fake accelerator knows it: addresses, and whose they are at the moment.

Enters: tensors of a test, allocations of both sides. Leaves: views of bytes by address alone, so that a
queued operation sees what lies there when it runs, whoever owns it by then. A device's memory is host memory
in truth; its caching allocator gives out again at once what was freed on the same stream, as torch's does.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dcp_async._geometry import contiguous_strides

_DEVICE_BYTES = 1 << 28
_ALIGN = 512


@dataclass(frozen=True)
class Memory:
    """A strided range of bytes by address: what a queued operation knows of a tensor."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Memory:
        return cls(tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))

    @classmethod
    def row_major(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Memory:
        """Some that lies nowhere yet."""
        return cls(0, dtype, shape, tuple(contiguous_strides(shape)))

    @property
    def nbytes(self) -> int:
        """From the first byte to the last."""
        if 0 in self.shape:
            return 0
        last = sum((extent - 1) * step for extent, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether one memcpy takes it."""
        expected = 1
        for extent, step in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and step != expected:
                return False
            expected *= extent
        return True

    def overlaps(self, address: int, nbytes: int) -> bool:
        return self.address < address + nbytes and address < self.address + self.nbytes

    def tensor(self) -> torch.Tensor:
        """A tensor over these bytes, whoever owns them by now."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        memory = (ctypes.c_char * self.nbytes).from_address(self.address)
        raw = torch.frombuffer(memory, dtype=torch.uint8)
        return raw.view(self.dtype).as_strided(self.shape, self.strides)


class DeviceMemory:
    """One device's memory and its caching allocator: a block that was freed goes to the next who asks on the
    stream that it belongs to, even while work is queued there that names it; to other streams never."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _DEVICE_BYTES)  # pages come as they are touched
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._used = 0
        self._free: dict[tuple[int, int], list[tuple[int, list[Callable[[], bool]]]]] = {}
        """(key of the stream, size) -> offsets, each with what must be so before it is given out."""
        self._lent: dict[int, list[Callable[[], Callable[[], bool]]]] = {}

    def holds(self, address: int) -> bool:
        return self._base <= address < self._base + _DEVICE_BYTES

    def allocate(self, like: Memory, stream: int) -> torch.Tensor:
        """A block that belongs to ``stream``, of the strides of ``like``."""
        size = max(-(-like.nbytes // _ALIGN) * _ALIGN, _ALIGN)
        free = self._free.setdefault((stream, size), [])
        # the one that was freed last first: as early as can be
        usable = [
            number for number, (_, conditions) in enumerate(free) if all(is_met() for is_met in conditions)
        ]
        if usable:
            offset, _ = free.pop(usable[-1])
        else:
            offset, self._used = self._used, self._used + size
            assert self._used <= _DEVICE_BYTES, "the fake device has no more memory"
        block = (ctypes.c_char * size).from_address(self._base + offset)
        weakref.finalize(block, self._release, stream, size, offset)
        raw = torch.frombuffer(block, dtype=torch.uint8)
        return raw[: like.nbytes].view(like.dtype).as_strided(like.shape, like.strides)

    def lend(self, tensor: torch.Tensor, mark: Callable[[], Callable[[], bool]]) -> None:
        """When ``tensor`` is freed ``mark`` is called; its memory waits until what that returns says True."""
        self._lent.setdefault(tensor.untyped_storage().data_ptr() - self._base, []).append(mark)

    def _release(self, stream: int, size: int, offset: int) -> None:
        conditions = [mark() for mark in self._lent.pop(offset, [])]
        self._free[stream, size].append((offset, conditions))
