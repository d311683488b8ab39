"""What the package relies on in a ``Backend``, as tests that any of them passes.

Enters: a rig, which is a backend with what a trainer does on one of its devices. Leaves: tests, by
inheritance: ``class TestMine(BackendContract)`` with a fixture ``rig``. Where the CPU plays the device
everything is done at once, and what is left of the contract is that the right bytes are in the right place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest
import torch

from dcp_async.staging.device import Backend, TorchBackend
from tests.support.accelerator import FakeAccelerator
from tests.support.doubles import assert_same, random_tensor

SIZE = 10_000
View = Callable[[torch.Tensor], Any]
ROW_MAJOR_OR_NOT: list[View] = [
    lambda t: t,
    lambda t: t.transpose(0, 1),
    lambda t: t[:, ::2],
    lambda t: t[3, 5],
    lambda t: t[:0],
]
LAZY: list[View] = [lambda t: t.conj(), lambda t: t.conj().transpose(0, 1), lambda t: t.conj().imag]


class Rig(Protocol):
    """A trainer on one device."""

    backend: Backend
    device: torch.device
    has_queues: bool
    """Whether the device runs behind the calls."""

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        """``value``, there already."""

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        """What ``tensor`` holds once the current stream has come here."""

    def fill(self, tensor: torch.Tensor, value: float) -> None:
        """Queue on the current stream."""

    def keep_busy(self) -> None:
        """Let the current stream be long at what comes before anything queued from here on."""

    def on_another_stream(self) -> contextlib.AbstractContextManager[None]:
        """The caller's current stream is another one."""


class FakeRig:
    """The fake in one of its orders. All of them are busy until waited for, but for those that run ahead."""

    has_queues = True

    def __init__(self, fake: FakeAccelerator) -> None:
        self.backend: Backend = fake
        self._fake = fake
        self.device = fake.all_devices[-1]

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        return self._fake.tensor(value, self.device)

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._fake.values(tensor)

    def fill(self, tensor: torch.Tensor, value: float) -> None:
        self._fake.fill(tensor, value)

    def keep_busy(self) -> None:
        pass

    @contextlib.contextmanager
    def on_another_stream(self) -> Iterator[None]:
        with self._fake.on_stream(self._fake.new_stream(self.device)):
            yield


class TorchRig:
    """Whatever torch has."""

    def __init__(self, device: torch.device) -> None:
        self.backend: Backend = TorchBackend()
        self.device = self.backend.resolve(device)
        self.has_queues = device.type != "cpu"

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        made = value.to(self.device, copy=True)
        self._module.synchronize()
        return made

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", copy=True)

    def fill(self, tensor: torch.Tensor, value: float) -> None:
        tensor.fill_(value)

    def keep_busy(self) -> None:
        if self.device.type == "cuda":
            torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # a tenth of a second

    @contextlib.contextmanager
    def on_another_stream(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.stream(torch.cuda.Stream(self.device)):  # type: ignore[no-untyped-call]
            yield

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.device)


def pinned(rig: Rig, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Host memory, pinned where that can be had."""
    like = torch.empty(shape, dtype=dtype)
    memory = rig.backend.pinned_buffer(rig.device, max(like.nbytes, 1))
    return like if memory is None else memory[: like.nbytes].view(dtype).view(shape)


def queued_alone(rig: Rig, target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy on the stream for loads, and have the caller's stream wait for it."""
    stream = rig.backend.stream(rig.device, "load")
    stream.wait_event(rig.backend.record(rig.device))
    stream.copy([target], [source])
    rig.backend.current_stream(rig.device).wait_event(stream.record())


class BackendContract:
    """Give a fixture ``rig``."""

    def test_tells_on_which_device_bytes_lie(self, rig: Rig) -> None:
        where = rig.device if rig.has_queues else None
        on_device, on_host = rig.tensor(torch.ones(2)), torch.ones(2)
        assert rig.backend.device_of(on_device) == where
        assert rig.backend.device_of(on_host) is None
        assert rig.backend.devices([on_host, on_device, on_host]) == ({where} if where else set())
        assert rig.backend.resolve(rig.device) == rig.device
        assert rig.backend.resolve("cpu") == torch.device("cpu")

    def test_a_stream_is_the_same_for_each_who_asks(self, rig: Rig) -> None:
        save, load = (rig.backend.stream(rig.device, purpose) for purpose in ("save", "load"))
        assert rig.backend.stream(rig.device, "save") is save
        assert rig.backend.stream(rig.device, "load") is load
        assert save is not load

    def test_a_copy_from_the_device_holds_what_was_queued_before_the_event(self, rig: Rig) -> None:
        source, target = rig.tensor(torch.zeros(SIZE)), pinned(rig, SIZE)
        with rig.on_another_stream():
            rig.keep_busy()
            rig.fill(source, 1)
            event = rig.backend.record(rig.device)
        stream = rig.backend.stream(rig.device, "save")
        stream.wait_event(event)
        stream.copy([target], [source])
        stream.synchronize()
        assert_same(target, torch.ones(SIZE))

    def test_what_waits_for_a_copy_is_not_in_it(self, rig: Rig) -> None:
        source, target = rig.tensor(torch.ones(SIZE)), pinned(rig, SIZE)
        stream = rig.backend.stream(rig.device, "save")
        stream.wait_event(rig.backend.record(rig.device))
        stream.copy([target], [source])
        arrived = stream.record()
        rig.backend.current_stream(rig.device).wait_event(arrived)
        rig.fill(source, 2)
        arrived.synchronize()
        assert_same(target, torch.ones(SIZE))
        assert_same(rig.values(source), torch.full((SIZE,), 2.0))

    def test_a_copy_to_the_device_wins_over_what_the_caller_queued_before(self, rig: Rig) -> None:
        target, source = rig.tensor(torch.zeros(SIZE)), pinned(rig, SIZE).fill_(3)
        with rig.on_another_stream():
            rig.keep_busy()
            rig.fill(target, 9)
            queued_alone(rig, target, source)
            assert_same(rig.values(target), torch.full((SIZE,), 3.0))

    @pytest.mark.parametrize(
        "dtype",
        [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64],
    )
    def test_a_batch_of_any_strides_arrives_row_major(self, rig: Rig, dtype: torch.dtype) -> None:
        value = random_tensor(dtype, (34, 20), 1)
        memory = rig.tensor(value)
        sources = [view(memory) for view in ROW_MAJOR_OR_NOT]
        targets = [pinned(rig, *source.shape, dtype=dtype) for source in sources]
        stream = rig.backend.stream(rig.device, "save")
        stream.wait_event(rig.backend.record(rig.device))
        stream.copy(targets, sources)
        stream.synchronize()
        assert_same(targets, [view(value).contiguous() for view in ROW_MAJOR_OR_NOT])

    def test_lazily_conjugated_and_negated_sources_arrive_as_their_elements(self, rig: Rig) -> None:
        value = torch.complex(torch.arange(64.0), torch.arange(64.0) + 1).view(8, 8)
        memory = rig.tensor(value)
        stream = rig.backend.stream(rig.device, "save")
        stream.wait_event(rig.backend.record(rig.device))
        for view in LAZY:
            expected = view(value).resolve_conj().resolve_neg().contiguous()
            target = pinned(rig, *expected.shape, dtype=expected.dtype)
            stream.copy([target], [view(memory)])
            stream.synchronize()
            assert_same(target, expected)

    def test_copies_to_the_device_convert_and_keep_the_strides_of_the_target(self, rig: Rig) -> None:
        value = torch.arange(24.0).view(4, 6)
        for made in (torch.zeros(6, 4).t(), torch.zeros(8, 6)[::2], torch.zeros(4, 6).bfloat16()):
            base = rig.tensor(torch.zeros(100, dtype=made.dtype))
            target = base.as_strided(made.shape, made.stride())
            source = pinned(rig, 4, 6).copy_(value)
            queued_alone(rig, target, source)
            stored = rig.values(base).as_strided(made.shape, made.stride())
            assert_same(stored.contiguous(), value.to(made.dtype))

    def test_a_copy_to_pageable_memory_is_there_when_it_returns(self, rig: Rig) -> None:
        source, target = rig.tensor(torch.zeros(SIZE)), torch.zeros(SIZE)
        rig.keep_busy()
        rig.fill(source, 1)
        stream = rig.backend.stream(rig.device, "save")
        stream.wait_event(rig.backend.record(rig.device))
        stream.copy([target], [source])
        assert_same(target.clone(), torch.ones(SIZE))

    def test_pageable_memory_was_read_when_a_copy_from_it_returns(self, rig: Rig) -> None:
        target, source = rig.tensor(torch.zeros(SIZE)), torch.ones(SIZE)
        rig.keep_busy()
        queued_alone(rig, target, source)
        source.fill_(5)
        assert_same(rig.values(target), torch.ones(SIZE))

    def test_memory_of_a_stream_has_the_strides_that_were_asked_for(self, rig: Rig) -> None:
        stream = rig.backend.stream(rig.device, "load")
        made = stream.empty((3, 5), torch.int16)
        assert (made.shape, made.stride(), made.dtype) == ((3, 5), (5, 1), torch.int16)
        assert stream.empty((3, 5), torch.bool, (1, 3)).stride() == (1, 3)
        assert stream.empty((0, 5), torch.float32).numel() == 0
        assert rig.backend.device_of(made) == (rig.device if rig.has_queues else None)

    def test_memory_of_a_stream_goes_round_in_its_order(self, rig: Rig) -> None:
        """Freed and given out again it is written by the same stream, behind who read it."""
        stream = rig.backend.stream(rig.device, "save")
        source = rig.tensor(torch.ones(SIZE))
        targets = [pinned(rig, SIZE) for _ in range(4)]
        sources = [pinned(rig, SIZE).fill_(10), source, pinned(rig, SIZE).fill_(12), source]
        stream.wait_event(rig.backend.record(rig.device))
        for source, target in zip(sources, targets, strict=True):
            scratch = stream.empty((SIZE,), torch.float32)
            stream.copy([scratch], [source])
            stream.copy([target], [scratch])
            del scratch
        stream.synchronize()
        assert [target[0].item() for target in targets] == [10, 1, 12, 1]

    def test_what_was_lent_to_the_caller_is_not_given_out_before_it_is_through(self, rig: Rig) -> None:
        stream = rig.backend.stream(rig.device, "load")
        kept, scratch = rig.tensor(torch.zeros(SIZE)), stream.empty((SIZE,), torch.float32)
        fours, fives = pinned(rig, SIZE).fill_(4), pinned(rig, SIZE).fill_(5)
        stream.copy([scratch], [fours])
        rig.backend.current_stream(rig.device).wait_event(stream.record())
        rig.backend.lend([scratch], rig.device)
        rig.keep_busy()
        rig.backend.current_stream(rig.device).copy([kept], [scratch])
        del scratch
        again = stream.empty((SIZE,), torch.float32)
        stream.copy([again], [fives])
        stream.synchronize()
        assert_same(rig.values(kept), torch.full((SIZE,), 4.0))

    def test_pinned_memory_may_be_unpinned_and_pinned_again(self, rig: Rig) -> None:
        if not rig.backend.can_pin(rig.device):
            assert not rig.backend.pin(rig.device, 4096, 4096)
            return
        memory = torch.zeros(1 << 20, dtype=torch.uint8)
        start = -memory.data_ptr() % 4096
        part = memory[start : start + (1 << 19)]
        source = rig.tensor(torch.arange(SIZE, dtype=torch.float32))
        for _ in range(2):
            assert rig.backend.pin(rig.device, part.data_ptr(), part.nbytes)
            stream = rig.backend.stream(rig.device, "save")
            stream.wait_event(rig.backend.record(rig.device))
            stream.copy([part.view(torch.float32)[:SIZE]], [source])
            stream.synchronize()
            rig.backend.unpin(rig.device, part.data_ptr())
            assert_same(part.view(torch.float32)[:SIZE], torch.arange(SIZE, dtype=torch.float32))

    def test_tells_which_tensors_lie_in_pinned_host_memory(self, rig: Rig) -> None:
        on_device = rig.tensor(torch.ones(3))
        memory = rig.backend.pinned_buffer(rig.device, 4096)
        tensors = [torch.ones(3), on_device, memory[64:128] if memory is not None else torch.ones(5)]
        assert rig.backend.pinned_among(tensors) == ([] if memory is None else [2])

    def test_the_current_device_is_known_once_there_is_one(self, rig: Rig) -> None:
        rig.tensor(torch.ones(3))
        current = rig.backend.current_device()
        assert (current is None) if not rig.has_queues else (current is not None)

    def test_a_pinned_buffer_has_the_bytes_that_were_asked_for(self, rig: Rig) -> None:
        memory = rig.backend.pinned_buffer(rig.device, 12345)
        assert memory is None or (memory.dtype, memory.shape) == (torch.uint8, (12345,))
