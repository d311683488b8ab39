"""Writes on a device: every byte arrives where it belongs, and no slot that a copy may read is given back."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_async import Stager, StagingOptions
from dcp_async._concurrency import BlockingThreads, StuckThreadError
from dcp_async.formats import BLOCK_BYTES, block_digests
from dcp_async.load.device_writes import DeviceWrites, Slot
from dcp_async.load.fetch import Check, SlotBuffers
from dcp_async.load.spans import DeviceTarget, Piece, host_memory, make_batches, make_spans
from tests.support.accelerator import FakeAccelerator

FAKE = FakeAccelerator(2)
"""One for all examples: it has memory of its own."""
THREADS = BlockingThreads("test", 0)

PLACES = st.lists(
    st.tuples(
        st.integers(0, BLOCK_BYTES + 99),  # bytes between it and the one before
        st.one_of(st.integers(1, 99), st.integers(1, BLOCK_BYTES)),  # elements
        st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.complex128]),
        st.sampled_from(["same", "spread", "converted", "host"]),
        st.sampled_from(FAKE.all_devices),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=50)
@given(PLACES, st.sampled_from([1, 2, 64]), st.booleans())
def test_every_byte_arrives_where_it_belongs(
    places: list[tuple[int, int, torch.dtype, str, torch.device]], blocks: int, aligned: bool
) -> None:
    pieces: list[Piece] = []
    wanted: list[tuple[torch.Tensor | bytearray, int, int, torch.dtype]] = []
    end = 0
    for gap, numel, dtype, kind, device in places:
        # our format aligns what it writes; of others nothing is known
        start = -(-(end + gap) // 64) * 64 if aligned else end + gap
        nbytes = numel * dtype.itemsize
        end = start + nbytes
        if kind == "host":
            memory = bytearray(nbytes)
            pieces.append(Piece(start, nbytes, memoryview(memory), 0, "w"))
            wanted.append((memory, start, end, dtype))
            continue
        strides = None
        if kind == "same":
            tensor = FAKE.empty(numel, dtype=dtype, device=device)
        else:
            made = torch.complex64 if dtype.is_complex else torch.float64 if kind == "converted" else dtype
            tensor, strides = FAKE.empty(2 * numel, dtype=made, device=device)[::2], (1,)
        pieces.append(Piece(start, nbytes, DeviceTarget(tensor, device, dtype, nbytes, strides), 0, "w"))
        wanted.append((tensor, start, end, dtype))
    numbers = torch.arange(end, dtype=torch.int64).mul_(2654435761).bitwise_right_shift_(9).to(torch.uint8)
    content = bytearray(host_memory(numbers))
    stager = Stager(StagingOptions(part_bytes=blocks * BLOCK_BYTES), backend=FAKE)
    writes = DeviceWrites(stager, FAKE.all_devices, THREADS, 60)
    tables = {"f": block_digests(memoryview(content))}
    spans = make_spans({"f": pieces}, tables, {"f": end}, part_bytes=stager.pool.slot_bytes)
    for batch in make_batches(spans, part_bytes=stager.pool.slot_bytes):
        lease = stager.pool.lease_now(1)
        assert lease is not None
        slot = Slot(stager.pool, lease)
        starts = [0]
        for span in batch:
            starts.append(starts[-1] + span.stop - span.start)
        buffers = [SlotBuffers(span, slot.memory, start) for span, start in zip(batch, starts, strict=False)]
        for one in buffers:
            ((offset, host),) = one.segments
            host[:] = content[offset : offset + len(host)]
            one.scatter()
        Check(buffers).finish()
        writes.enqueue(slot, buffers)
        for copy in slot.copies:
            copy.synchronize()
        slot.release()
    for target, start, stop, dtype in wanted:
        if isinstance(target, bytearray):
            assert target == content[start:stop]
            continue
        expected = torch.frombuffer(bytearray(content[start:stop]), dtype=dtype).to(target.dtype)
        assert torch.equal(target.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


class Hanging:
    """An event that does not come, until whoever waits has given up."""

    def __init__(self, threads: BlockingThreads) -> None:
        self.threads = threads
        self.gate = threading.Event()

    def synchronize(self) -> None:
        self.threads.abandon()
        self.gate.wait()


async def test_slots_behind_a_device_that_hangs_are_lost() -> None:
    threads = BlockingThreads("hang", 1)
    event = Hanging(threads)
    slots: list[Slot] = []

    async def load(writes: DeviceWrites) -> None:
        async with writes.finishing(1, num_slots=2):
            slots.extend([await writes.lease(), await writes.lease()])
            slots[0].copies.append(event)
            await writes.wait(slots[0])

    try:
        async with Stager(StagingOptions(pinned=False), backend=FAKE) as stager:
            with pytest.raises(StuckThreadError):
                await load(DeviceWrites(stager, FAKE.all_devices, threads, 60))
            assert stager.pool.leased == 0
            assert list(slots[0].lease.arena.taken) == [2, 2]
    finally:
        event.gate.set()
        threads.shutdown()


async def test_slots_are_reserved_while_a_load_runs() -> None:
    async with Stager(StagingOptions(pinned=False), backend=FAKE) as stager:
        writes = DeviceWrites(stager, FAKE.all_devices, THREADS, 60)
        async with writes.finishing(100 * stager.pool.slot_bytes, num_slots=4):
            assert stager.pool.num_slots == 4
        assert stager.pool.num_slots == 1
        stager.pool.reserve(FAKE, 7)  # a save's serve a load as well: no more memory is mapped for it
        async with writes.finishing(100 * stager.pool.slot_bytes, num_slots=4):
            assert stager.pool.num_slots == 7


async def test_a_slot_comes_back_when_it_could_not_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def want(*args: object) -> None:
        raise MemoryError

    async with Stager(StagingOptions(pinned=False), backend=FAKE) as stager:
        monkeypatch.setattr(stager.pinner, "want", want)
        writes = DeviceWrites(stager, FAKE.all_devices, THREADS, 60)
        with pytest.raises(MemoryError):
            async with writes.finishing(1, num_slots=1):
                await writes.lease()
        assert stager.pool.leased == 0
