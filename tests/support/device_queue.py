"""Queues of a fake device: what waits in them, and how a copy gets there.

Enters: kernels, copies, marks and waits. Leaves: entries that accelerator.py runs when their time has come.
An operation knows addresses, not tensors, as a real one does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dcp_async._geometry import contiguous_strides
from tests.support.device_memory import Memory

if TYPE_CHECKING:
    from tests.support.accelerator import FakeAccelerator

Operation = Callable[[], None]


class DeviceError(RuntimeError):
    """What a device that fails says."""


@dataclass(eq=False)
class FakeEvent:
    """A point in a fake stream."""

    fake: FakeAccelerator
    stream: FakeStream
    done: bool = False

    def synchronize(self) -> None:
        self.fake.run_until(self)


@dataclass(frozen=True, eq=False)
class Work:
    run: Operation
    hosts: tuple[Memory, ...] = ()
    """Host memory that it touches when it runs."""


@dataclass(frozen=True, eq=False)
class Wait:
    event: FakeEvent


@dataclass(eq=False)
class FakeStream:
    """A queue of one device. Its head runs when the device gets to it, not when it is put there."""

    fake: FakeAccelerator
    device: torch.device
    name: str
    queue: deque[Work | Wait | FakeEvent] = field(default_factory=deque)
    is_capturing: bool = False
    broken: bool = False
    """Each call raises from here on, and what is queued may still be under way: it never runs, and the host
    memory that it names stays in flight."""
    fail_copy_after: int | None = None
    """The next batch raises after so many of its pairs were queued."""
    batches_before_failure: int = 0
    """Not the next batch, but one so many later."""
    copies: list[int] = field(default_factory=list)
    """How many pairs each batch had."""

    def wait_event(self, event: Any) -> None:
        assert isinstance(event, FakeEvent)
        self._put(Wait(event))

    def launch(self, work: Operation) -> None:
        """Queue a kernel."""
        if not self.is_capturing:
            self._put(Work(work))

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        assert len(targets) == len(sources) > 0
        self.copies.append(len(targets))
        limit = None
        if self.batches_before_failure:
            self.batches_before_failure -= 1
        else:
            limit, self.fail_copy_after = self.fail_copy_after, None
        for number, (target, source) in enumerate(zip(targets, sources, strict=True)):
            if number == limit:
                raise DeviceError("out of memory")
            self._copy(target, source)

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None
    ) -> torch.Tensor:
        strides = contiguous_strides(shape) if strides is None else strides
        return self.fake.allocate(Memory(0, dtype, tuple(shape), tuple(strides)), self)

    def record(self) -> FakeEvent:
        event = FakeEvent(self.fake, self)
        self._put(event)
        return event

    def synchronize(self) -> None:
        self.record().synchronize()

    def _put(self, entry: Work | Wait | FakeEvent) -> None:
        self.fake.contexts.add(self.device)
        with self.fake.lock:
            if self.broken:
                raise DeviceError("the device is lost")
            if self.is_capturing:
                raise DeviceError("operation would make the capture depend on what is not captured")
            self.queue.append(entry)
            self.fake.stir()

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """As Tensor.copy_ with non_blocking=True on CUDA, which asks no one whether the host's memory lives
        on."""
        assert target.shape == source.shape, (target.shape, source.shape)
        lie_on = self.fake.device_of(target), self.fake.device_of(source)
        assert set(lie_on) in ({self.device}, {self.device, None}), f"a copy from {lie_on[1]} to {lie_on[0]}"
        assert not target.is_conj(), "only sources are lazily conjugated"
        assert not target.is_neg(), "only sources are lazily negated"
        to, out = Memory.of(target), Memory.of(source)
        is_neg, is_conj = source.is_neg(), source.is_conj()

        def value() -> torch.Tensor:
            values = out.tensor()
            values = values.conj() if is_conj else values
            return -values if is_neg else values

        hosts = tuple(
            memory for memory, device in zip((to, out), lie_on, strict=True) if not device and memory.nbytes
        )
        for memory in hosts:
            self.fake.check_registered(memory)
        if all(memory.is_dense and self.fake.is_pinned(memory) for memory in hosts):
            self._put(Work(lambda: void(to.tensor().copy_(value())), hosts))
        elif lie_on[0] is None:  # to pageable memory: it returns when the bytes are there
            self._put(Work(lambda: void(to.tensor().copy_(value()))))
            self.synchronize()
        else:  # from pageable memory: it returns when the bytes were read, the device has them later
            self.synchronize()
            taken = value().clone()
            self._put(Work(lambda: void(to.tensor().copy_(taken))))


def is_waiting(entry: Work | Wait | FakeEvent) -> bool:
    return isinstance(entry, Wait) and not entry.event.done


def touched(stream: FakeStream) -> Iterator[Memory]:
    return (memory for entry in stream.queue if isinstance(entry, Work) for memory in entry.hosts)


def void(_: object) -> None:
    """Turn an expression into a statement: an operation has no value."""
