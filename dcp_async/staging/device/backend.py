"""What the package needs of accelerators, as protocols: streams, events, memory.

Contract: what is queued on a stream of ours runs after the events that it was told to wait for, and beside
whatever the trainer queues; nothing waits for a device but ``synchronize``, and that sleeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import torch

Purpose = Literal["save", "load"]
"""What a stream of ours is for: saves and loads run beside each other."""


class CaptureInProgressError(RuntimeError):
    """The caller's stream is recording a graph: what is queued now would run at each replay, and not now."""


class Event(Protocol):
    """A point in one of a device's queues."""

    def synchronize(self) -> None:
        """Return once the device has come there. The calling thread sleeps. Raises the device's error."""


class Stream(Protocol):
    """A queue of ours on one device, beside the trainer's. Methods queue work at its end and return."""

    def wait_event(self, event: Event) -> None:
        """What is queued from here on runs after ``event``, which may be of any stream of any device."""

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Copy each of ``sources`` into its target, as one batch: to the device, from it or on it.

        Host memory has to be pinned for the copy to be asynchronous; with other memory this returns when the
        bytes are there. Both must live until the copy is done. If this raises, part of the batch may be
        queued.
        """

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Memory of the device, which this stream may write at once: freed, it comes back to this stream.
        Row-major without ``strides``. Raises what the device does if it has none left."""

    def record(self) -> Event:
        """Mark the present end of the queue."""

    def synchronize(self) -> None:
        """Return once all that was queued is done. The calling thread sleeps. Raises the device's error."""


class Backend(Protocol):
    """What the package needs of accelerators; the tests pass a fake."""

    def device_of(self, tensor: torch.Tensor) -> torch.device | None:
        """The accelerator on which the bytes of ``tensor`` lie; None where the CPU can read them."""

    def devices(self, tensors: Iterable[torch.Tensor]) -> set[torch.device]:
        """The accelerators on which any of ``tensors`` lies."""

    def resolve(self, device: torch.device | str) -> torch.device:
        """``device`` with an index: that of the caller's current one where none was given. Raises where no
        such device is."""

    def current_device(self) -> torch.device | None:
        """The caller's current accelerator; None while none is initialised, and none is for this."""

    def pinned_among(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """Which of ``tensors`` lie in pinned host memory, which a device may still be filling."""

    def current_stream(self, device: torch.device) -> Stream:
        """The stream that the caller queues on at present. Raises CaptureInProgressError."""

    def record(self, device: torch.device) -> Event:
        """Mark the present end of the caller's current stream of ``device``. Raises
        CaptureInProgressError."""

    def lend(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        """The caller's current stream of ``device`` will use ``tensors``, which a stream of ours allocated:
        once they are dropped their memory is given out again only when that stream is through with them."""

    def stream(self, device: torch.device, purpose: Purpose) -> Stream:
        """The stream of that purpose, one per device as long as the backend lives."""

    def can_pin(self, device: torch.device) -> bool:
        """Whether ``pin`` may succeed for copies from and to ``device``."""

    def pin(self, device: torch.device, address: int, nbytes: int) -> bool:
        """Register host memory for copies from and to ``device``; False where that is refused, after which
        nothing of the attempt is left."""

    def unpin(self, device: torch.device, address: int) -> None:
        """Undo ``pin``. Never raises: the memory goes, whatever the device says."""

    def pinned_buffer(self, device: torch.device, nbytes: int) -> torch.Tensor | None:
        """Host memory, uint8, that was pinned when it was allocated; None where there is no such thing."""
