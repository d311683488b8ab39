"""What torch does not show of the CUDA runtime: registering memory, the last error, a thread's capture mode.

Enters: addresses. Leaves: registered memory, or a refusal that leaves nothing behind. Loads the library that
torch has loaded; where it can't be found, torch's own binding is used and the rest is left undone.
Source: CUDA Runtime API, sections 6.9 (memory management), 6.3 (error handling) and 6.4 (stream management).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading

import torch

logger = logging.getLogger(__name__)

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all devices."""
_RELAXED = 2
"""cudaStreamCaptureModeRelaxed"""

_threads = threading.local()


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The runtime, as the process has it."""
    if torch.version.cuda is None:
        return None
    name = f"libcudart.so.{torch.version.cuda.split('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        logger.info(
            "%s can't be loaded (%s); CUDA's last error is not cleared after a refused pin", name, error
        )
        return None


def register(address: int, nbytes: int) -> bool:
    """Pin memory for copies; False where CUDA refuses. The caller sets the device."""
    library = _library()
    if library is None:
        binding = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no annotation for it
        return int(binding.cudaHostRegister(address, nbytes, _PORTABLE)) == 0
    status = library.cudaHostRegister(
        ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(_PORTABLE)
    )
    if status != 0:
        # it stays behind for this thread, and the next kernel that is launched here would raise it as its own
        library.cudaGetLastError()
        logger.debug("CUDA refuses to pin %d bytes (status %d)", nbytes, status)
    return bool(status == 0)


def unregister(address: int) -> None:
    """Undo ``register``. Never raises."""
    library = _library()
    if library is None:
        binding = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no annotation for it
        binding.cudaHostUnregister(address)
        return
    if (status := library.cudaHostUnregister(ctypes.c_void_p(address))) != 0:
        library.cudaGetLastError()
        logger.warning("CUDA could not unpin a staging buffer (status %d)", status)


def relax_capture() -> None:
    """Let this thread call what is forbidden while any thread captures a graph in CUDA's global mode; once.

    Capturing threads are the trainer's; nothing of this thread is captured, so nothing of it is forbidden.
    """
    if getattr(_threads, "is_relaxed", False):
        return
    _threads.is_relaxed = True
    if (library := _library()) is not None:
        mode = ctypes.c_int(_RELAXED)
        library.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
