"""What torch does not show of the CUDA runtime: registering memory, the last error, a thread's capture mode.

Enters: addresses. Leaves: registered memory, or a refusal that leaves nothing behind; streams that are not of
torch's pool. Loads the library that torch has loaded; where it can't be found, torch's own binding is used,
streams are torch's, and the capture mode is left as it is.
Source: CUDA Runtime API, sections 6.9 (memory management), 6.3 (error handling) and 6.4 (stream management).
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all devices."""
_NON_BLOCKING = 1
"""cudaStreamNonBlocking: in no order with the legacy default stream, as torch's own."""
_RELAXED = 2
"""cudaStreamCaptureModeRelaxed"""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The runtime, as the process has it; None if it can't be loaded, or on ROCm."""
    if torch.version.cuda is None:
        return None
    name = f"libcudart.so.{torch.version.cuda.split('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        logger.info("%s can't be loaded (%s); saves beside a graph capture may disturb it", name, error)
        return None


def register(address: int, nbytes: int) -> bool:
    """Pin memory for copies; False where CUDA refuses. The caller sets the device."""
    runtime = library()
    if runtime is None:
        # the last error is a thread's own: what a refusal leaves behind ends with this one
        with ThreadPoolExecutor(1, "dcp_async-pin") as thread:
            return thread.submit(_register, torch.cuda.current_device(), address, nbytes).result()
    status = runtime.cudaHostRegister(
        ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(_PORTABLE)
    )
    if status != 0:
        # it stays behind for this thread, and the next kernel that is launched here would raise it as its own
        runtime.cudaGetLastError()
        logger.debug("CUDA refuses to pin %d bytes (status %d)", nbytes, status)
    return bool(status == 0)


def _register(device: int, address: int, nbytes: int) -> bool:
    with torch.cuda.device(device):
        binding = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no annotation for it
        return int(binding.cudaHostRegister(address, nbytes, _PORTABLE)) == 0


def unregister(address: int) -> None:
    """Undo ``register``. Never raises."""
    runtime = library()
    if runtime is None:
        binding = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no annotation for it
        binding.cudaHostUnregister(address)
        return
    if (status := runtime.cudaHostUnregister(ctypes.c_void_p(address))) != 0:
        runtime.cudaGetLastError()
        logger.warning("CUDA could not unpin a staging buffer (status %d)", status)


def new_stream() -> int | None:
    """A stream of the current device that nobody else is given, for ever; None where there is none to be
    had."""
    runtime = library()
    if runtime is None:
        return None
    handle = ctypes.c_void_p()
    status = runtime.cudaStreamCreateWithFlags(ctypes.byref(handle), ctypes.c_uint(_NON_BLOCKING))
    if status != 0:
        runtime.cudaGetLastError()
        logger.info("CUDA makes no stream (status %d); one of torch's is shared", status)
        return None
    return handle.value


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Allow what is forbidden while any thread captures a graph in CUDA's global mode, the default: pinning,
    allocations, waiting. For calls of which nothing goes into a capture.

    The thread's mode is as it was afterwards: it may be the trainer's, which captures later.
    """
    runtime = library()
    if runtime is None:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    # it swaps the two
    runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
