"""Copies through pinned buffers, against a fake device: what arrives, what a device sees, what stays after a
failure."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from dcp_async.staging.device import Purpose
from dcp_async.staging.memory.bounce import Bounce
from tests.support.accelerator import FakeAccelerator
from tests.support.device_memory import Memory
from tests.support.device_queue import DeviceError, FakeStream

BUFFER = 4096


def _stream(fake: FakeAccelerator, purpose: Purpose = "save") -> FakeStream:
    return fake.stream(fake.all_devices[0], purpose)


def _values() -> list[torch.Tensor]:
    """Smaller than a buffer, many to a buffer, and several buffers; of all item sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0, 3), (7,), (1024,), (3000,), (5, 700), (2, 3, 900)]
    made = [torch.randint(0, 100, shape, generator=generator) for shape in shapes]
    dtypes = [torch.float32, torch.int64, torch.uint8, torch.bfloat16, torch.complex64, torch.bool]
    return [value.to(dtype) for value in made for dtype in dtypes]


@pytest.mark.parametrize("has_pinned_buffers", [True, False])
def test_many_and_large_tensors_arrive_in_host_memory_that_is_not_pinned(has_pinned_buffers: bool) -> None:
    fake = FakeAccelerator()
    fake.has_pinned_buffers = has_pinned_buffers
    values = _values()
    sources = [fake.tensor(value) for value in values]
    targets = [torch.empty_like(value) for value in values]
    Bounce(fake, nbytes=BUFFER).copy_to_host(_stream(fake), targets, sources)
    assert all(map(torch.equal, targets, values))


def test_many_and_large_tensors_arrive_on_the_device() -> None:
    fake = FakeAccelerator()
    values = _values()
    targets = [fake.empty(*value.shape, dtype=value.dtype) for value in values]
    Bounce(fake, nbytes=BUFFER).copy_to_device(_stream(fake, "load"), targets, values)
    assert all(
        torch.equal(Memory.of(target).tensor(), value) for target, value in zip(targets, values, strict=True)
    )


def test_strided_tensors_are_cut_into_boxes_that_fit() -> None:
    fake = FakeAccelerator()
    value = torch.arange(9000.0).view(90, 100)
    source = fake.tensor(value).t()
    target = torch.empty(100, 90)
    stream = _stream(fake)
    Bounce(fake, nbytes=BUFFER).copy_to_host(stream, [target], [source])
    assert torch.equal(target, value.t())
    assert len(stream.copies) >= 36_000 // BUFFER


def test_device_fills_one_buffer_while_the_other_is_copied_out() -> None:
    fake = FakeAccelerator()
    source = fake.tensor(torch.arange(8192.0))  # eight buffers
    target = torch.full((8192,), -1.0)
    stream = _stream(fake)
    queued: list[int] = []
    real = stream.copy

    def noted(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        real(targets, sources)
        queued.append(int((target >= 0).sum()) * 4 // BUFFER)

    stream.copy = noted  # type: ignore[method-assign]  # looked at from outside
    Bounce(fake, nbytes=BUFFER).copy_to_host(stream, [target], [source])
    # when the third transfer is queued, the first one was copied out, and the second may still run
    assert queued == [0, 0, 1, 2, 3, 4, 5, 6]


def test_device_sees_none_of_the_memory_behind_the_buffers() -> None:
    fake = FakeAccelerator()
    target = torch.zeros(8192)
    # half of it is registered: CUDA refuses a copy that lies in a registration in part
    fake.pin(fake.all_devices[0], target.data_ptr(), target.nbytes // 2)
    stream = _stream(fake)
    seen: list[int] = []
    real = stream.copy

    def noted(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        seen.extend(tensor.data_ptr() for tensor in targets)
        real(targets, sources)

    stream.copy = noted  # type: ignore[method-assign]  # looked at from outside
    Bounce(fake, nbytes=BUFFER).copy_to_host(stream, [target], [fake.tensor(torch.ones(8192))])
    assert torch.equal(target, torch.ones(8192))
    assert not [at for at in seen if target.data_ptr() <= at < target.data_ptr() + target.nbytes]


def test_copies_at_once_have_buffers_of_their_own() -> None:
    """A load's beside a save's."""
    fake = FakeAccelerator()
    bounce = Bounce(fake, nbytes=BUFFER)
    saved, loaded = torch.zeros(5000), fake.tensor(torch.zeros(5000))
    stream = _stream(fake)
    real = stream.copy

    def beside(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        real(targets, sources)
        bounce.copy_to_device(_stream(fake, "load"), [loaded], [torch.full((5000,), 2.0)])

    stream.copy = beside  # type: ignore[method-assign]  # the other thread's turn
    bounce.copy_to_host(stream, [saved], [fake.tensor(torch.ones(5000))])
    assert torch.equal(saved, torch.ones(5000))
    assert torch.equal(Memory.of(loaded).tensor(), torch.full((5000,), 2.0))


def test_buffers_are_made_once_and_go_at_the_end() -> None:
    fake = FakeAccelerator()
    bounce = Bounce(fake, nbytes=BUFFER)
    for _ in range(3):
        target = torch.zeros(5000)
        bounce.copy_to_host(_stream(fake), [target], [fake.tensor(torch.ones(5000))])
        assert len(fake.pinned) == 2
    bounce.close()
    assert fake.pinned == {}


def test_copy_that_fails_ends_before_its_buffers_go() -> None:
    fake = FakeAccelerator()
    bounce = Bounce(fake, nbytes=BUFFER)
    sources = [fake.tensor(torch.ones(100)) for _ in range(30)]
    targets = [torch.zeros(100) for _ in sources]
    stream = _stream(fake)
    stream.fail_copy_after = 3
    with pytest.raises(DeviceError, match="out of memory"):
        bounce.copy_to_host(stream, targets, sources)
    assert not stream.queue  # nothing is under way that could write into memory that is given back
    assert fake.pinned == {}
    bounce.copy_to_host(stream, targets, sources)
    assert all(torch.equal(target, torch.ones(100)) for target in targets)


def test_buffers_of_a_device_that_is_lost_are_kept_and_not_used_again() -> None:
    fake = FakeAccelerator()
    bounce = Bounce(fake, nbytes=BUFFER)
    source, target = fake.tensor(torch.ones(5000)), torch.zeros(5000)
    stream = _stream(fake)
    stream.broken = True
    with pytest.raises(DeviceError, match="lost"):
        bounce.copy_to_host(stream, [target], [source])
    stream.broken = False
    held = set(fake.pinned)
    assert len(held) == 2
    bounce.copy_to_host(stream, [target], [source])
    assert held < set(fake.pinned)
    assert torch.equal(target, torch.ones(5000))
