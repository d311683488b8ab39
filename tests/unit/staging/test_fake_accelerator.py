"""The fake is wrong where a real device is, and says what no device may meet."""

from __future__ import annotations

import gc

import pytest
import torch

from dcp_async.staging.device import CaptureInProgressError
from tests.support.accelerator import FakeAccelerator
from tests.support.device_queue import DeviceError

SIZE = 1000


def test_nothing_runs_at_the_time_of_its_call() -> None:
    fake = FakeAccelerator()
    weights = fake.tensor(torch.zeros(SIZE))
    fake.fill(weights, 1)
    assert weights.eq(0).all(), "what lies there, as no CPU could see it of a real device"
    fake.finish()
    assert weights.eq(1).all()


def test_streams_do_not_wait_for_each_other() -> None:
    fake = FakeAccelerator()
    device = fake.all_devices[0]
    weights = fake.tensor(torch.zeros(SIZE))
    with fake.on_stream(fake.new_stream(device)):
        fake.fill(weights, 1)
    assert fake.values(weights).eq(0).all()


@pytest.mark.parametrize(("order", "value"), [("late", 0), ("trainer first", 1), ("package first", 0)])
def test_one_side_runs_ahead_of_the_other(order: str, value: int) -> None:
    fake = FakeAccelerator(order=order)  # type: ignore[arg-type]  # one of them, by the table
    weights = fake.tensor(torch.zeros(SIZE))
    fake.fill(weights, 1)
    assert weights.eq(value).all()


def test_freed_memory_is_given_out_again_at_once_on_its_stream_alone() -> None:
    fake = FakeAccelerator()
    first = fake.empty(SIZE)
    address = first.data_ptr()
    del first
    with fake.on_stream(fake.new_stream(fake.all_devices[0])):
        assert fake.empty(SIZE).data_ptr() != address
    assert fake.empty(SIZE).data_ptr() == address


def test_memory_unpinned_under_a_copy_is_a_violation() -> None:
    fake = FakeAccelerator()
    device, memory = fake.all_devices[0], torch.zeros(SIZE)
    assert fake.pin(device, memory.data_ptr(), memory.nbytes)
    fake.stream(device, "save").copy([memory], [fake.tensor(torch.ones(SIZE))])
    with pytest.raises(AssertionError, match="unpinned"):
        fake.unpin(device, memory.data_ptr())
    assert fake.violations


def test_a_copy_over_the_end_of_registered_memory_is_a_violation() -> None:
    fake = FakeAccelerator()
    device, memory = fake.all_devices[0], torch.zeros(SIZE)
    assert fake.pin(device, memory.data_ptr(), memory.nbytes // 2)
    assert fake.pin(device, memory.data_ptr() + memory.nbytes // 2, memory.nbytes // 2)
    with pytest.raises(AssertionError, match="reaches over"):
        fake.stream(device, "save").copy([memory], [fake.tensor(torch.ones(SIZE))])


def test_memory_freed_under_a_copy_is_a_violation() -> None:
    fake = FakeAccelerator()
    device = fake.all_devices[0]
    memory = fake.pinned_buffer(device, 4 * SIZE)
    assert memory is not None
    fake.stream(device, "save").copy([memory.view(torch.float32)], [fake.tensor(torch.ones(SIZE))])
    del memory
    gc.collect()
    with pytest.raises(AssertionError, match="unpinned"):
        fake.finish()
    assert fake.violations


def test_a_batch_that_fails_half_way_has_queued_half() -> None:
    fake = FakeAccelerator()
    device, stream = fake.all_devices[0], fake.stream(fake.all_devices[0], "save")
    memory = fake.pinned_buffer(device, 8)
    assert memory is not None
    targets = list(memory.view(torch.float32))
    stream.fail_copy_after = 1
    with pytest.raises(DeviceError):
        stream.copy(targets, list(fake.tensor(torch.ones(2))))
    with pytest.raises(AssertionError, match="given out"):
        fake.assert_idle(memory.data_ptr(), memory.nbytes)
    stream.synchronize()
    fake.assert_idle(memory.data_ptr(), memory.nbytes)
    assert [target.item() for target in targets] == [1, 0]


def test_copies_of_a_lost_device_stay_in_flight_and_each_call_fails() -> None:
    fake = FakeAccelerator()
    device, stream = fake.all_devices[0], fake.stream(fake.all_devices[0], "save")
    memory = fake.pinned_buffer(device, 4 * SIZE)
    assert memory is not None
    stream.copy([memory.view(torch.float32)], [fake.tensor(torch.ones(SIZE))])
    event = stream.record()
    fake.lose(device)
    for call in (event.synchronize, stream.record, stream.synchronize, lambda: fake.record(device)):
        with pytest.raises(DeviceError):
            call()
    fake.finish()
    assert fake.in_flight


def test_a_capture_takes_kernels_and_refuses_the_rest() -> None:
    fake = FakeAccelerator()
    device = fake.all_devices[0]
    weights, stream = fake.tensor(torch.zeros(SIZE)), fake.current_stream(fake.all_devices[0])
    with fake.capturing(stream):
        fake.fill(weights, 1)
        with pytest.raises(CaptureInProgressError):
            fake.record(device)
        with pytest.raises(DeviceError):
            stream.record()
    assert fake.values(weights).eq(0).all()
