"""A fake accelerator that can be wrong the way CUDA is: late, out of order, and without references.

Enters: the package's calls (it is a ``Backend``) and a test's, which plays the trainer. Leaves: tensors whose
bytes change only when their device gets to it. Several devices; streams as queues that run as late as they
may, the trainer's or the package's first, or at random; a caching allocator (device_memory.py); a table of
pinned memory. What no device may meet, as a copy into memory that was unpinned, is kept in ``violations``.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch

from dcp_async.staging.device import CaptureInProgressError, Purpose
from tests.support.device_memory import DeviceMemory, Memory
from tests.support.device_queue import (
    DeviceError,
    FakeEvent,
    FakeStream,
    Operation,
    Wait,
    is_waiting,
    touched,
    void,
)

KIND = "cuda"
"""What the fake's devices call themselves."""

Order = Literal["late", "trainer first", "package first"]
"""Who runs ahead: nobody until waited for, or all of one side's streams at each call."""


class FakeAccelerator:
    """The devices, their memory and their streams.

    Args:
        num_devices: how many.
        seed: streams run at random whenever the CPU calls, each seed in another order.
        order: who runs ahead, where there is no seed.
    """

    def __init__(self, num_devices: int = 1, *, seed: int | None = None, order: Order = "late") -> None:
        self.lock = threading.RLock()
        self.all_devices = [torch.device(KIND, index) for index in range(num_devices)]
        self.contexts: set[torch.device] = set()
        """On which devices somebody made a context."""
        self.pinned: dict[int, tuple[torch.device, int]] = {}
        """Address -> (device, number of bytes)."""
        self.pin_calls: list[tuple[torch.device, int, int]] = []
        self.refuses_pins = False
        self.has_pinned_buffers = True
        self.violations: list[str] = []
        """What no real device may meet; a test of many steps ends with a look at it."""
        self.streams: list[FakeStream] = []
        self._random = random.Random(seed) if seed is not None else None
        self._order = order
        self._local = threading.local()
        self._default = {device: self.new_stream(device, "default") for device in self.all_devices}
        self._own: dict[tuple[torch.device, str], FakeStream] = {}
        self._memory = {device: DeviceMemory() for device in self.all_devices}

    # The trainer's side.

    def new_stream(self, device: torch.device, name: str = "trainer") -> FakeStream:
        stream = FakeStream(self, device, name)
        with self.lock:
            self.streams.append(stream)
        return stream

    def current_stream(self, device: torch.device) -> FakeStream:
        stream = self._current_stream(device)
        if stream.is_capturing:
            raise CaptureInProgressError("a graph is being captured on the current stream")
        return stream

    def _current_stream(self, device: torch.device) -> FakeStream:
        current: dict[torch.device, FakeStream] = self._local.__dict__.setdefault("streams", {})
        return current.get(device, self._default[device])

    @contextlib.contextmanager
    def on_stream(self, stream: FakeStream) -> Iterator[None]:
        """With ``stream`` as the thread's current one of its device."""
        current: dict[torch.device, FakeStream] = self._local.__dict__.setdefault("streams", {})
        before = current.get(stream.device)
        current[stream.device] = stream
        try:
            yield
        finally:
            if before is None:
                del current[stream.device]
            else:
                current[stream.device] = before

    def set_stream(self, stream: FakeStream) -> None:
        """``stream`` is the thread's current one of its device, from here on."""
        self._local.__dict__.setdefault("streams", {})[stream.device] = stream

    @contextlib.contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        """With that device as the thread's current one."""
        before = getattr(self._local, "device", 0)
        self._local.device = index
        try:
            yield
        finally:
            self._local.device = before

    def empty(
        self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> torch.Tensor:
        """Memory of a device, with whatever lies there."""
        device = device or self._current_device()
        return self.allocate(Memory.row_major(shape, dtype), self._current_stream(device))

    def allocate(self, like: Memory, stream: FakeStream) -> torch.Tensor:
        """Memory that belongs to ``stream``."""
        self.contexts.add(stream.device)
        with self.lock:
            return self._memory[stream.device].allocate(like, id(stream))

    def tensor(self, value: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """``value`` on a device, row-major, there already."""
        made = self.empty(*value.shape, dtype=value.dtype, device=device)
        # what was queued on its stream may still write what lay here before
        self._current_stream(device or self._current_device()).synchronize()
        Memory.of(made).tensor().copy_(value)
        return made

    def launch(self, work: Operation, device: torch.device | None = None) -> None:
        """What a training step does: it returns before the device has done anything."""
        self._current_stream(device or self._current_device()).launch(work)

    def change(self, tensor: torch.Tensor, kernel: Callable[[torch.Tensor], object]) -> None:
        """An operation in place on the current stream, later; the version counter moves now."""
        device = self.device_of(tensor)
        assert device is not None
        memory = Memory.of(tensor)
        torch.autograd.graph.increment_version([tensor])
        self.launch(lambda: void(kernel(memory.tensor())), device)

    def fill(self, tensor: torch.Tensor, value: float) -> None:
        """``tensor.fill_(value)`` on the current stream, later."""
        self.change(tensor, lambda values: values.fill_(value))

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor.cpu()``: what it holds once the current stream has come here."""
        device = self.device_of(tensor)
        assert device is not None
        self.current_stream(device).synchronize()
        return Memory.of(tensor).tensor().clone()

    @contextlib.contextmanager
    def capturing(self, stream: FakeStream) -> Iterator[None]:
        """Kernels that are launched on ``stream`` go into a graph, which nobody replays."""
        stream.is_capturing = True
        try:
            yield
        finally:
            stream.is_capturing = False

    def lose(self, device: torch.device) -> None:
        """Each call of this device fails from here on."""
        with self.lock:
            for stream in self.streams:
                stream.broken = stream.broken or stream.device == device

    def _current_device(self) -> torch.device:
        return self.all_devices[getattr(self._local, "device", 0)]

    # How the devices run.

    def run_until(self, event: FakeEvent) -> None:
        """Run what ``event`` waits for, and nothing else unless at random."""
        with self.lock:
            self.stir()
            while not event.done:
                self._advance(event.stream)
            if event.stream.broken:
                raise DeviceError("the device is lost")

    def _advance(self, stream: FakeStream) -> None:
        """Run the head of ``stream``, and before it what it waits for."""
        if stream.broken:
            raise DeviceError("the device is lost")
        head = stream.queue[0]
        if isinstance(head, Wait):
            # in the order of their calls: what is waited for was recorded before, so this comes to an end
            while not head.event.done:
                self._advance(head.event.stream)
            stream.queue.popleft()
        elif isinstance(head, FakeEvent):
            stream.queue.popleft()
            head.done = True
        else:
            stream.queue.popleft()
            if not all(map(self.is_pinned, head.hosts)):
                self._violated(f"{stream.name}: memory was unpinned under a copy")
            head.run()

    def stir(self, most: int = 8) -> None:
        """Let the devices run as far as the order has it."""
        with self.lock:
            if self._random is not None:
                for _ in range(self._random.randrange(most + 1)):
                    if not (ready := self._ready(lambda stream: True)):
                        return
                    self._advance(self._random.choice(ready))
            elif self._order != "late":
                ours = self._order == "package first"
                while ready := self._ready(lambda stream: (stream in self._own.values()) == ours):
                    self._advance(ready[0])

    def _ready(self, belongs: Callable[[FakeStream], bool]) -> list[FakeStream]:
        """Streams of that kind whose head waits for nobody."""
        return [
            stream
            for stream in self.streams
            if stream.queue and not stream.broken and belongs(stream) and not is_waiting(stream.queue[0])
        ]

    def finish(self) -> None:
        """Run everything that can."""
        with self.lock:
            while ready := self._ready(lambda stream: True):
                self._advance(ready[0])

    def _violated(self, what: str) -> None:
        # kept as well as raised: it may be raised in a thread of the package, as a save's failure
        self.violations.append(what)
        raise AssertionError(what)

    # The package's side.

    def device_at(self, address: int) -> torch.device | None:
        for device, memory in self._memory.items():
            if memory.holds(address):
                return device
        return None

    def device_of(self, tensor: torch.Tensor) -> torch.device | None:
        return self.device_at(tensor.untyped_storage().data_ptr())  # that of no elements points nowhere

    def devices(self, tensors: Iterable[torch.Tensor]) -> set[torch.device]:
        lie_on = set(map(self.device_of, tensors))
        return {device for device in lie_on if device is not None}

    def resolve(self, device: torch.device | str) -> torch.device:
        wanted = torch.device(device)
        index: int | None = wanted.index
        return self._current_device() if index is None and wanted.type == KIND else wanted

    def current_device(self) -> torch.device | None:
        return self._current_device() if self.contexts else None

    def pinned_among(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        host = [(index, Memory.of(tensor)) for index, tensor in enumerate(tensors)]
        return [index for index, memory in host if memory.nbytes and self.is_pinned(memory)]

    def record(self, device: torch.device) -> FakeEvent:
        return self.current_stream(device).record()

    def lend(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        stream = self.current_stream(device)

        def mark() -> Callable[[], bool]:
            event = stream.record()
            return lambda: event.done

        for tensor in tensors:
            self._memory[device].lend(tensor, mark)

    def stream(self, device: torch.device, purpose: Purpose) -> FakeStream:
        self.contexts.add(device)
        with self.lock:
            if (device, purpose) not in self._own:
                self._own[device, purpose] = self.new_stream(device, purpose)
            return self._own[device, purpose]

    def can_pin(self, device: torch.device) -> bool:
        return True

    def pin(self, device: torch.device, address: int, nbytes: int) -> bool:
        self.contexts.add(device)
        self.pin_calls.append((device, address, nbytes))
        if self.refuses_pins:
            return False
        with self.lock:
            for known, (_, length) in list(self.pinned.items()):
                if known < address + nbytes and address < known + length:
                    self._violated("memory is pinned that is pinned already")
            self.pinned[address] = (device, nbytes)
        return True

    def unpin(self, device: torch.device, address: int) -> None:
        self.contexts.add(device)
        with self.lock:
            if address not in self.pinned:
                self._violated("memory is unpinned that is not pinned")
            _, nbytes = self.pinned.pop(address)
            if any(
                memory.overlaps(address, nbytes)
                for stream in self.streams
                if not stream.broken  # its copies may never end, and the memory has to go some time
                for memory in touched(stream)
            ):
                self._violated("memory is unpinned while a copy may run")

    def pinned_buffer(self, device: torch.device, nbytes: int) -> torch.Tensor | None:
        if not self.has_pinned_buffers:
            return None
        self.contexts.add(device)
        block = (ctypes.c_char * nbytes)()
        address = ctypes.addressof(block)
        self.pinned[address] = (device, nbytes)
        # whichever thread drops it: who looks through the table looks at a copy
        weakref.finalize(block, self.pinned.pop, address, None)
        return torch.frombuffer(block, dtype=torch.uint8)

    def is_pinned(self, memory: Memory) -> bool:
        with self.lock:
            return any(
                address <= memory.address and memory.address + memory.nbytes <= address + nbytes
                for address, (_, nbytes) in list(self.pinned.items())
            )

    def check_registered(self, memory: Memory) -> None:
        """CUDA refuses to copy a range that is registered in part, or in two parts."""
        with self.lock:
            touched = [at for at, (_, nbytes) in self.pinned.items() if memory.overlaps(at, nbytes)]
            if touched and not self.is_pinned(memory):
                self._violated("a copy reaches over the end of registered memory")

    # What a test asks.

    @property
    def in_flight(self) -> list[Memory]:
        """Host memory that a queued copy will touch."""
        with self.lock:
            return [memory for stream in self.streams for memory in touched(stream)]

    def assert_idle(self, address: int, nbytes: int) -> None:
        """No queued copy will touch these bytes of the host."""
        with self.lock:
            if any(memory.overlaps(address, nbytes) for memory in self.in_flight):
                self._violated("host memory is given out while a copy may run")
