"""Accelerators: events, side streams, pinned memory. The only module that speaks to ``torch.accelerator``.

Enters: tensors on a device and views of host memory. Leaves: filled host memory, after the device has written
it. Invariant: a copy starts after everything that was queued when the state was captured, and runs beside
whatever is queued later.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)


class Event(Protocol):
    """A point in a device's queue."""


class Backend(Protocol):
    """What staging needs of devices; the tests pass a fake."""

    def devices(self, tensors: Iterable[torch.Tensor]) -> set[torch.device]:
        """The accelerators on which any of ``tensors`` lies."""

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        """Whether the CPU can read its bytes."""

    def record(self, device: torch.device) -> Event:
        """Mark the present end of the device's current stream."""

    def copy_to_host(
        self,
        device: torch.device,
        event: Event,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
    ) -> None:
        """Copy on a side stream after ``event``; return when the bytes are in host memory."""

    def pin(self, address: int, nbytes: int) -> bool:
        """Register host memory for fast copies; False where that is refused."""

    def unpin(self, address: int) -> None:
        """Undo ``pin``."""


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no annotation for it


class TorchBackend:
    """Devices as ``torch.accelerator`` shows them. Owns a side stream per device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.Stream] = {}

    def devices(self, tensors: Iterable[torch.Tensor]) -> set[torch.device]:
        # each device has a queue, and so needs an event, of its own
        return {tensor.device for tensor in tensors if not tensor.is_cpu}

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cpu

    def record(self, device: torch.device) -> Event:
        event = torch.Event(device)
        # of the caller's stream: what it has queued there so far makes up the state that it saves
        event.record(torch.accelerator.current_stream(device))
        return event

    def copy_to_host(
        self,
        device: torch.device,
        event: Event,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
    ) -> None:
        assert isinstance(event, torch.Event)
        # a thread of ours sits on device 0 until told otherwise
        with torch.accelerator.device_index(device.index):
            stream = self._streams.setdefault(device, torch.Stream(device))
            stream.wait_event(event)
            with stream:
                torch._foreach_copy_(list(targets), list(sources), non_blocking=True)
            # the side stream alone is waited for, so what the trainer queues meanwhile goes on; and the bytes
            # must be there, since the slots go to the disk next
            stream.synchronize()

    def pin(self, address: int, nbytes: int) -> bool:
        # torch has no call that pins memory which is there already but CUDA's
        if not torch.cuda.is_available():
            return False
        status = _cudart().cudaHostRegister(address, nbytes, 0)
        if int(status) != 0:
            logger.info(
                "the staging pool could not be pinned (CUDA status %s); copies go through pageable memory",
                status,
            )
        return int(status) == 0

    def unpin(self, address: int) -> None:
        _cudart().cudaHostUnregister(address)
