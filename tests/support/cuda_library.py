"""A fake of the CUDA runtime's library: what cuda_runtime.py calls, with the states that are a thread's own.

Enters: calls as ctypes makes them. Leaves: status codes. A failed call leaves a last error behind, which the
next kernel that its thread launches takes for its own. While a thread captures a graph, calls that might
get into it are refused, and the capture is lost.
Source: CUDA Runtime API, cudaThreadExchangeStreamCaptureMode, cudaGetLastError, cudaHostRegister.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

GLOBAL, THREAD_LOCAL, RELAXED = range(3)
NON_BLOCKING = 1
OUT_OF_MEMORY, NOT_REGISTERED, REGISTERED, CAPTURE_UNSUPPORTED = 2, 713, 712, 900


class FakeCudaLibrary:
    """One process's runtime."""

    def __init__(self) -> None:
        self.registered: dict[int, tuple[int, int]] = {}
        """Address -> (number of bytes, flags)."""
        self.refuses = False
        self.refuses_streams = False
        self.num_streams = 0
        self.callers: list[int] = []
        """Which threads asked to register."""
        self._captures: dict[int, int] = {}
        """Thread -> the mode in which it captures."""
        self._lost: set[int] = set()
        self._local = threading.local()

    # What ctypes finds: names are CUDA's.

    def cudaHostRegister(self, address: Any, nbytes: Any, flags: Any) -> int:  # noqa: N802 - CUDA's name
        self.callers.append(threading.get_ident())
        if not self._admitted():
            return self._failed(CAPTURE_UNSUPPORTED)
        if address.value in self.registered:
            return self._failed(REGISTERED)
        if self.refuses:
            return self._failed(OUT_OF_MEMORY)
        self.registered[address.value] = nbytes.value, flags.value
        return 0

    def cudaHostUnregister(self, address: Any) -> int:  # noqa: N802 - CUDA's name
        if not self._admitted():
            return self._failed(CAPTURE_UNSUPPORTED)
        if self.registered.pop(address.value, None) is None:
            return self._failed(NOT_REGISTERED)
        return 0

    def cudaStreamCreateWithFlags(self, stream: Any, flags: Any) -> int:  # noqa: N802 - CUDA's name
        assert flags.value == NON_BLOCKING
        if self.refuses_streams:
            return self._failed(OUT_OF_MEMORY)
        self.num_streams += 1
        stream._obj.value = self.num_streams << 12
        return 0

    def cudaGetLastError(self) -> int:  # noqa: N802 - CUDA's name
        error, self._local.error = self.last_error, 0
        return error

    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> int:  # noqa: N802 - CUDA's name
        pointed_at: ctypes.c_int = mode._obj  # what byref() was given
        pointed_at.value, self._local.mode = self.mode, pointed_at.value
        return 0

    # What the trainer does, and what a test asks.

    @property
    def last_error(self) -> int:
        error: int = getattr(self._local, "error", 0)
        return error

    @property
    def mode(self) -> int:
        """The calling thread's."""
        mode: int = getattr(self._local, "mode", GLOBAL)
        return mode

    def launch(self) -> None:
        """A kernel: torch asks for the last error after it."""
        if error := self.cudaGetLastError():
            raise RuntimeError(f"CUDA error {error}")

    def wait(self) -> None:
        """cudaEventSynchronize(), cudaMalloc() and others that a capture forbids."""
        if not self._admitted():
            raise RuntimeError(f"CUDA error {self._failed(CAPTURE_UNSUPPORTED)}")

    @contextlib.contextmanager
    def capture(self, mode: int = GLOBAL) -> Iterator[None]:
        """The calling thread captures a graph. Raises at the end if somebody made it worthless."""
        thread = threading.get_ident()
        self._captures[thread] = mode
        try:
            yield
        finally:
            del self._captures[thread]
        if thread in self._lost:
            raise RuntimeError("CUDA error 901: the capture was invalidated")

    def _admitted(self) -> bool:
        thread = threading.get_ident()
        disturbed = {
            capturing
            for capturing, mode in self._captures.items()
            if (capturing == thread and mode != RELAXED)
            or (capturing != thread and mode == GLOBAL and self.mode == GLOBAL)
        }
        if self.mode == RELAXED or not disturbed:
            return True
        self._lost |= disturbed
        return False

    def _failed(self, status: int) -> int:
        self._local.error = status
        return status
