"""A fake accelerator that can be wrong the way CUDA is: late, out of order, and without references.

Enters: the package's calls (it is a ``Backend``) and a test's, which plays the trainer. Leaves: tensors whose
bytes change only when their device gets to it. Several devices; streams as queues that run as late as they
may, or at random; a caching allocator that gives freed memory out again at once on the stream that it
belongs to; a table of pinned memory. A queued operation knows addresses, not tensors, as a real one does.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dcp_async._geometry import contiguous_strides
from dcp_async.staging.device import CaptureInProgressError, Purpose

KIND = "cuda"
"""What the fake's devices call themselves."""
_ARENA_BYTES = 1 << 28
_ALIGN = 512


class DeviceError(RuntimeError):
    """What a device that fails says, at the next synchronisation."""


@dataclass(eq=False)
class FakeEvent:
    """A point in a fake stream."""

    fake: FakeAccelerator
    stream: FakeStream | None = None
    done: bool = False

    def synchronize(self) -> None:
        self.fake.run_until(self)


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

    @property
    def nbytes(self) -> int:
        """From the first byte to the last."""
        if 0 in self.shape:
            return 0
        last = sum((extent - 1) * step for extent, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        """A tensor over these bytes, whoever owns them by now."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        memory = (ctypes.c_char * self.nbytes).from_address(self.address)
        return torch.frombuffer(memory, dtype=self.dtype).as_strided(self.shape, self.strides)


Operation = Callable[[], None]


@dataclass(eq=False)
class FakeStream:
    """A queue of one device. Its head runs when the device gets to it, not when it is put there."""

    fake: FakeAccelerator
    device: torch.device
    name: str
    queue: deque[Operation | FakeEvent | tuple[str, FakeEvent]] = field(default_factory=deque)
    is_capturing: bool = False
    broken: bool = False
    fail_copy_after: int | None = None
    """The next batch raises after so many of its pairs were queued."""
    copies: list[int] = field(default_factory=list)
    """How many pairs each batch had."""

    def wait_event(self, event: Any) -> None:
        assert isinstance(event, FakeEvent)
        with self.fake.lock:
            self.queue.append(("wait", event))

    def launch(self, work: Operation) -> None:
        """Queue a kernel."""
        with self.fake.lock:
            self.queue.append(work)

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        assert len(targets) == len(sources) > 0
        self.fake.contexts.add(self.device)
        self.copies.append(len(targets))
        limit, self.fail_copy_after = self.fail_copy_after, None
        for number, (target, source) in enumerate(zip(targets, sources, strict=True)):
            if number == limit:
                raise DeviceError("out of memory")
            assert target.shape == source.shape, (target.shape, source.shape)
            assert self.fake.device_of(target) in (None, self.device)
            assert self.fake.device_of(source) in (None, self.device)
            assert {self.fake.device_of(target), self.fake.device_of(source)} != {None}, (
                "nothing of it is on a device"
            )
            to, out = Memory.of(target), Memory.of(source)
            is_neg, is_conj = source.is_neg(), source.is_conj()

            def work(
                to: Memory = to, out: Memory = out, is_neg: bool = is_neg, is_conj: bool = is_conj
            ) -> None:
                value = out.tensor()
                value = value.conj() if is_conj else value
                to.tensor().copy_(-value if is_neg else value)

            hosts = [
                memory
                for memory in (to, out)
                if self.fake.device_at(memory.address) is None and memory.nbytes
            ]
            if all(map(self.fake.is_pinned, hosts)):
                for memory in hosts:
                    self.fake.in_flight.append(memory)

                def checked(work: Operation = work, hosts: list[Memory] = hosts) -> None:
                    for memory in hosts:
                        self.fake.in_flight.remove(memory)
                        assert self.fake.is_pinned(memory), "memory was unpinned under a copy"
                    work()

                self.launch(checked)
            else:  # through pageable memory: the call returns when the bytes are there
                self.launch(work)
                self.record().synchronize()

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None
    ) -> torch.Tensor:
        made = Memory(0, dtype, tuple(shape), tuple(strides or contiguous_strides(shape)))
        with self.fake.on_stream(self):
            memory = self.fake.empty(made.nbytes, dtype=torch.uint8, device=self.device)
        return memory.view(dtype).as_strided(made.shape, made.strides)

    def record(self) -> FakeEvent:
        event = FakeEvent(self.fake, self)
        with self.fake.lock:
            self.queue.append(event)
        return event

    def synchronize(self) -> None:
        self.record().synchronize()


class FakeAccelerator:
    """The devices, their memory and their streams.

    Args:
        num_devices: how many.
        seed: None: each stream runs as late as it may. Else: streams also run at random whenever the CPU
            calls.
    """

    def __init__(self, num_devices: int = 1, *, seed: int | None = None) -> None:
        self.lock = threading.RLock()
        self.all_devices = [torch.device(KIND, index) for index in range(num_devices)]
        self.contexts: set[torch.device] = set()
        """On which devices somebody made a context."""
        self.pinned: dict[int, tuple[torch.device, int]] = {}
        """Address -> (device, number of bytes)."""
        self.pin_calls: list[tuple[torch.device, int, int]] = []
        self.refuses_pins = False
        self.has_pinned_buffers = True
        self.in_flight: list[Memory] = []
        """Host memory that a queued copy will touch."""
        self.streams: list[FakeStream] = []
        self._random = random.Random(seed) if seed is not None else None
        self._local = threading.local()
        self._default = {device: self.new_stream(device, "default") for device in self.all_devices}
        self._own: dict[tuple[torch.device, str], FakeStream] = {}
        self._memory = {device: _DeviceMemory() for device in self.all_devices}

    # The trainer's side.

    def new_stream(self, device: torch.device, name: str = "trainer") -> FakeStream:
        stream = FakeStream(self, device, name)
        with self.lock:
            self.streams.append(stream)
        return stream

    def current_stream(self, device: torch.device) -> FakeStream:
        current: dict[torch.device, FakeStream] = self._local.__dict__.setdefault("streams", {})
        stream = current.get(device, self._default[device])
        if stream.is_capturing:
            raise CaptureInProgressError("a graph is being captured on the current stream")
        return stream

    @contextlib.contextmanager
    def on_stream(self, stream: FakeStream) -> Iterator[None]:
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
        device = device or self.all_devices[getattr(self._local, "device", 0)]
        numel = 1
        for extent in shape:
            numel *= extent
        stream = self.current_stream(device)
        with self.lock:
            return self._memory[device].allocate(numel * dtype.itemsize, stream).view(dtype).view(shape)

    def tensor(self, value: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """``value`` on a device, there already; strides kept where they are row-major."""
        made = self.empty(*value.shape, dtype=value.dtype, device=device)
        Memory.of(made).tensor().copy_(value)
        return made

    def launch(self, work: Operation, device: torch.device | None = None) -> None:
        """What a training step does: it returns before the device has done anything."""
        self.current_stream(device or self.all_devices[getattr(self._local, "device", 0)]).launch(work)

    def fill(self, tensor: torch.Tensor, value: float) -> None:
        """``tensor.fill_(value)`` on the current stream, later; the version counter moves now."""
        device = self.device_of(tensor)
        assert device is not None
        memory = Memory.of(tensor)
        torch.autograd.graph.increment_version([tensor])

        def work() -> None:
            memory.tensor().fill_(value)

        self.launch(work, device)

    @contextlib.contextmanager
    def capturing(self, stream: FakeStream) -> Iterator[None]:
        """Record a graph of what is queued on ``stream``."""
        stream.is_capturing = True
        try:
            yield
        finally:
            stream.is_capturing = False

    # How the devices run.

    def run_until(self, event: FakeEvent) -> None:
        """Run what ``event`` waits for, and nothing else unless at random."""
        with self.lock:
            self.stir()
            while not event.done:
                assert event.stream is not None
                self._advance(event.stream, set())
            if event.stream is not None and event.stream.broken:
                raise DeviceError("the device is lost")

    def _advance(self, stream: FakeStream, waited: set[int]) -> None:
        """Run the head of ``stream``, and before it what it waits for."""
        assert id(stream) not in waited, "streams wait for each other"
        head = stream.queue[0]
        if isinstance(head, tuple):
            waiting = head[1]
            while not waiting.done:
                assert waiting.stream is not None
                self._advance(waiting.stream, {*waited, id(stream)})
            stream.queue.popleft()
        elif isinstance(head, FakeEvent):
            stream.queue.popleft()
            head.done = True
        else:
            stream.queue.popleft()
            if not stream.broken:
                head()

    def stir(self, most: int = 8) -> None:
        """Let the devices run a little, at random."""
        if self._random is None:
            return
        with self.lock:
            for _ in range(self._random.randrange(most + 1)):
                busy = [stream for stream in self.streams if stream.queue]
                if not busy:
                    return
                self._advance(self._random.choice(busy), set())

    def finish(self) -> None:
        """Run everything."""
        with self.lock:
            while busy := [stream for stream in self.streams if stream.queue]:
                self._advance(busy[0], set())

    # The package's side.

    def device_at(self, address: int) -> torch.device | None:
        for device, memory in self._memory.items():
            if memory.holds(address):
                return device
        return None

    def device_of(self, tensor: torch.Tensor) -> torch.device | None:
        return self.device_at(tensor.data_ptr())

    def devices(self, tensors: Iterable[torch.Tensor]) -> set[torch.device]:
        lie_on = set(map(self.device_of, tensors))
        return {device for device in lie_on if device is not None}

    def resolve(self, device: torch.device | str) -> torch.device:
        wanted = torch.device(device)
        index: int | None = wanted.index
        return self.all_devices[getattr(self._local, "device", 0)] if index is None else wanted

    def record(self, device: torch.device) -> FakeEvent:
        self.contexts.add(device)
        self.stir()
        return self.current_stream(device).record()

    def current_wait(self, device: torch.device, event: Any) -> None:
        self.current_stream(device).wait_event(event)

    def lend(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        for tensor in tensors:
            self._memory[device].lend(tensor, self.current_stream(device))

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
        assert address not in self.pinned
        self.pinned[address] = (device, nbytes)
        return True

    def unpin(self, device: torch.device, address: int) -> None:
        self.contexts.add(device)
        _, nbytes = self.pinned.pop(address)
        with self.lock:
            busy = [memory for memory in self.in_flight if address <= memory.address < address + nbytes]
        assert not busy, "memory is unpinned while a copy may run"

    def pinned_buffer(self, device: torch.device, nbytes: int) -> torch.Tensor | None:
        if not self.has_pinned_buffers:
            return None
        block = (ctypes.c_char * nbytes)()
        address = ctypes.addressof(block)
        self.pinned[address] = (device, nbytes)
        weakref.finalize(block, self.pinned.pop, address, None)
        return torch.frombuffer(block, dtype=torch.uint8)

    def is_pinned(self, memory: Memory) -> bool:
        return any(
            address <= memory.address and memory.address + memory.nbytes <= address + nbytes
            for address, (_, nbytes) in self.pinned.items()
        )


class _DeviceMemory:
    """One device's memory and its caching allocator: what is freed is given out again at once to the stream
    that it belongs to, and to others never, as torch's pools do."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_ARENA_BYTES)
        self._base = ctypes.addressof(self._memory)
        self._used = 0
        self._free: dict[tuple[str, int, int], list[int]] = {}
        """(stream's name and id, size) -> offsets."""
        self._lent: dict[int, list[FakeStream]] = {}

    def holds(self, address: int) -> bool:
        return self._base <= address < self._base + _ARENA_BYTES

    def allocate(self, nbytes: int, stream: FakeStream) -> torch.Tensor:
        size = max(-(-nbytes // _ALIGN) * _ALIGN, _ALIGN)
        key = (stream.name, id(stream), size)
        free = self._free.setdefault(key, [])
        if free:
            offset = free.pop()  # the last one freed, as early as can be
        else:
            offset, self._used = self._used, self._used + size
            assert self._used <= _ARENA_BYTES, "the fake device has no more memory"
        block = (ctypes.c_char * max(nbytes, 1)).from_address(self._base + offset)
        weakref.finalize(block, self._release, key, offset)
        return torch.frombuffer(block, dtype=torch.uint8)[:nbytes]

    def _release(self, key: tuple[str, int, int], offset: int) -> None:
        lent = self._lent.pop(self._base + offset, [])
        # a stream that it was lent to is through with it first: an event, which is not looked at here
        if not any(stream.queue for stream in lent):
            self._free[key].append(offset)

    def lend(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        self._lent.setdefault(tensor.untyped_storage().data_ptr(), []).append(stream)
