"""TorchBackend: accelerators as torch shows them. The only module that queues work on a device.

Enters: tensors on a device, views of host memory, events. Leaves: copies, queued on streams of our own.
Invariant: each call is made with the tensor's own device as the thread's current one, and none changes how
CUDA guards a capture of the trainer's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ..._geometry import contiguous_strides
from . import cuda_runtime
from .backend import CaptureInProgressError, Event, Purpose, Stream
from .batched_copy import copy_batch

logger = logging.getLogger(__name__)


class TorchEvent:
    """An event as torch has it."""

    def __init__(self, device: torch.device, stream: Any) -> None:
        """Recorded in ``stream``, one of torch's."""
        self._device = device
        module = _module(device)
        # blocking: whoever waits for it sleeps, where CUDA would spin
        self._event: Any = module.Event(blocking=True) if device.type == "cuda" else module.Event(device)
        self._event.record(stream)

    def synchronize(self) -> None:
        with _on(self._device):
            self._event.synchronize()

    def hold_back(self, stream: Any) -> None:
        """What is queued on ``stream``, one of torch's, from here on runs after this event."""
        self._event.wait(stream)


class TorchStream:
    """A stream as torch has it."""

    def __init__(self, device: torch.device, stream: Any) -> None:
        """``stream``: one of torch's."""
        self._device = device
        self._stream = stream

    def wait_event(self, event: Event) -> None:
        if not isinstance(event, TorchEvent):  # of a device of another kind, which gives no streams
            event.synchronize()
            return
        with _on(self._device):
            event.hold_back(self._stream)

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        with _on(self._device), self._current():
            copy_batch(targets, sources, non_blocking=True)

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None
    ) -> torch.Tensor:
        with _on(self._device), self._current():
            return _empty(shape, dtype, strides, self._device)

    def record(self) -> Event:
        with _on(self._device):
            return TorchEvent(self._device, self._stream)

    def synchronize(self) -> None:
        # not the stream's own synchronize(), which spins on CUDA: a core would burn until the queue is empty
        self.record().synchronize()

    def borrow(self, tensors: Iterable[torch.Tensor]) -> None:
        """Memory of ``tensors`` is given out again only when this stream is through with it."""
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def _current(self) -> AbstractContextManager[Any]:
        if self._device.type == "cuda":
            return torch.cuda.stream(self._stream)
        stream: AbstractContextManager[Any] = self._stream
        return stream


class Passed:
    """An event of a device without streams: it has passed."""

    def synchronize(self) -> None:
        pass


class PlainStream:
    """The one queue of a device that gives no other: work of ours is in the order of the calls, and each call
    returns when it is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def wait_event(self, event: Event) -> None:
        event.synchronize()

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        copy_batch(targets, sources, non_blocking=False)
        self.synchronize()  # copies on the device do not wait for themselves

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None
    ) -> torch.Tensor:
        return _empty(shape, dtype, strides, self._device)

    def record(self) -> Event:
        self.synchronize()
        return Passed()

    def synchronize(self) -> None:
        # of the whole device: what the caller queued on a stream that we do not know counts as well
        torch.get_device_module(self._device).synchronize()

    def borrow(self, tensors: Iterable[torch.Tensor]) -> None:
        """All work is in one queue, and so is what comes after it."""


class TorchBackend:
    """Devices as ``torch.accelerator`` shows them; plain copies where it shows no streams. Owns a stream per
    device and purpose."""

    def __init__(self) -> None:
        self._streams: dict[tuple[torch.device, Purpose], TorchStream | PlainStream] = {}
        self._has_streams: dict[str, bool] = {}
        """By kind of device."""
        self._lock = threading.Lock()

    def device_of(self, tensor: torch.Tensor) -> torch.device | None:
        return None if tensor.is_cpu else tensor.device

    def devices(self, tensors: Iterable[torch.Tensor]) -> set[torch.device]:
        return {tensor.device for tensor in tensors if not tensor.is_cpu}

    def resolve(self, device: torch.device | str) -> torch.device:
        wanted = torch.device(device)
        index: int | None = wanted.index
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None and wanted.type != "cpu":
            raise RuntimeError("there is no accelerator here")
        if index is None and accelerator is not None and accelerator.type == wanted.type:
            return torch.device(wanted.type, torch.accelerator.current_device_index())
        return wanted

    def current_device(self) -> torch.device | None:
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None:
            return None
        module = torch.get_device_module(accelerator)
        # MPS, which has no such question, is always
        if hasattr(module, "is_initialized") and not module.is_initialized():
            return None
        return torch.device(accelerator.type, torch.accelerator.current_device_index())

    def pinned_among(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        if self.current_device() is None:  # to ask would make a context
            return []
        return [index for index, tensor in enumerate(tensors) if tensor.is_cpu and tensor.is_pinned()]

    def current_stream(self, device: torch.device) -> Stream:
        return self._current_stream(device)

    def _current_stream(self, device: torch.device) -> TorchStream | PlainStream:
        if not self._gives_streams(device):
            return PlainStream(device)
        if device.type != "cuda":
            return TorchStream(device, torch.accelerator.current_stream(device))
        with torch.cuda.device(device):  # the question is of the current device's stream
            if torch.cuda.is_current_stream_capturing():
                raise CaptureInProgressError(
                    "a CUDA graph is being captured on the current stream; save or load before or after that"
                )
        return TorchStream(device, torch.cuda.current_stream(device))

    def record(self, device: torch.device) -> Event:
        return self._current_stream(device).record()

    def lend(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        self._current_stream(device).borrow(tensors)

    def stream(self, device: torch.device, purpose: Purpose) -> Stream:
        with self._lock:
            if (known := self._streams.get((device, purpose))) is None:
                if self._gives_streams(device):
                    with _on(device):
                        known = TorchStream(device, _new_stream(device))
                else:
                    known = PlainStream(device)
                self._streams[device, purpose] = known
            return known

    def _gives_streams(self, device: torch.device) -> bool:
        if (known := self._has_streams.get(device.type)) is None:
            known = self._has_streams[device.type] = _makes_streams(device.type)
        return known

    def can_pin(self, device: torch.device) -> bool:
        # torch has no call that pins memory which is there already but CUDA's
        return device.type == "cuda"

    def pin(self, device: torch.device, address: int, nbytes: int) -> bool:
        if not self.can_pin(device):
            return False
        with _on(device):
            return cuda_runtime.register(address, nbytes)

    def unpin(self, device: torch.device, address: int) -> None:
        try:
            with _on(device):
                cuda_runtime.unregister(address)
        except RuntimeError as error:  # a device that is lost, or this is the child of a fork
            logger.warning("a staging buffer stays registered with %s: %s", device, error)

    def pinned_buffer(self, device: torch.device, nbytes: int) -> torch.Tensor | None:
        try:
            with _on(device):
                return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            logger.info("no pinned memory for %s: %s", device, error)
            return None


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """With ``device`` as the thread's current one, which else is 0 in a thread of ours, and would get a
    context there; beside a capture of the trainer's, which our calls are no part of."""
    with torch.accelerator.device_index(device.index):
        if device.type != "cuda":
            yield
            return
        with cuda_runtime.relaxed_capture():
            yield


def _new_stream(device: torch.device) -> Any:
    """One that is nobody else's, if that can be had. The caller sets the device."""
    if device.type != "cuda":
        return torch.Stream(device)
    # torch deals the same 32 out in turn, so that one day the trainer is given ours; if it captures a graph
    # there, our copies become part of that (pytorch/pytorch#185836)
    handle, cuda = cuda_runtime.new_stream(), _module(device)
    return cuda.Stream(device) if handle is None else cuda.ExternalStream(handle, device=device)


def _module(device: torch.device) -> Any:
    # on CUDA its own classes: torch.Event ignores blocking=True (2.11 to 2.15), and the two do not mix
    return torch.cuda if device.type == "cuda" else torch


def _makes_streams(kind: str) -> bool:
    """Whether torch makes further streams, and events, on devices of that kind."""
    if kind == "cuda":
        return True
    accelerator = torch.accelerator.current_accelerator()
    # whoever asks for a stream of mps is given the only one
    if accelerator is None or accelerator.type != kind or kind == "mps":
        return False
    try:
        torch.Event(torch.device(kind)).record(torch.Stream(torch.device(kind)))
    except (RuntimeError, NotImplementedError) as error:
        logger.info("%s has no streams of ours (%s); copies from and to it are synchronous", kind, error)
        return False
    return True


def _empty(
    shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None, device: torch.device
) -> torch.Tensor:
    strides = contiguous_strides(shape) if strides is None else strides
    return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device=device)
