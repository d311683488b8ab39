"""A part of a checkpoint costs what the part does: bytes by the system's counters, memory by its peak."""

from __future__ import annotations

import asyncio
import ctypes
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from dcp_async import CheckpointEngine, open_checkpoint
from tests.support.processes import run_in_process

MIB = 1 << 20
NUM_TENSORS = 24
M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""


@pytest_asyncio.fixture
async def path(tmp_path: Path) -> Path:
    """96 MiB in tensors of 4 MiB, and one that is small."""
    state = {f"w{n}": torch.full((1024, 1024), float(n)) for n in range(NUM_TENSORS)}
    async with CheckpointEngine(tmp_path) as engine:
        await engine.save({"model": state, "bias": torch.ones(8)}, step=1)
    return tmp_path / "step-00000001"


def bytes_read() -> int:
    """What this process has read from files, caches or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


async def test_one_tensor_moves_its_own_bytes_and_a_mebibyte_at_most(path: Path) -> None:
    async with open_checkpoint(path) as checkpoint:
        await checkpoint.tensor("bias")  # modules that are imported at first use are read too
    before = bytes_read()
    async with open_checkpoint(path) as checkpoint:
        tensor = await checkpoint.tensor("model.w7")
        assert tensor.nbytes <= bytes_read() - before <= tensor.nbytes + MIB
        before = bytes_read()
        part = await checkpoint.tensor("model.w7", (slice(500, 510),))
        # the blocks around it that have checksums
        assert part.nbytes <= bytes_read() - before <= part.nbytes + MIB // 4
    assert torch.equal(part, tensor[500:510])


def memory(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


async def peaks_of_streams(path: Path, budget_bytes: int) -> list[int]:
    """The most memory that each of two streams took at once."""
    peaks = []
    async with open_checkpoint(path) as checkpoint:
        async for _ in checkpoint.stream("model.w1", budget_bytes=budget_bytes):
            pass  # stacks of threads, and what else stays
        for keys in ("*", "model.w?"):
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
            async for _, tensor in checkpoint.stream(keys, budget_bytes=budget_bytes):
                assert tensor.nbytes
            del _, tensor
            peaks.append(memory("VmHWM") - before)
    return peaks


def stream_in_process(path: Path, budget_bytes: int) -> list[int]:
    # else what glibc keeps of freed memory for later would count, which depends on what it was asked before
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB) == 1
    return asyncio.run(peaks_of_streams(path, budget_bytes))


@pytest.mark.usefixtures("process_server")
def test_a_stream_takes_no_more_memory_than_it_may(path: Path) -> None:
    budget_bytes = 16 * MIB
    peaks = run_in_process(stream_in_process, path, budget_bytes)
    # the caller's own beside it: the one that it has while it asks for the next
    assert max(peaks) <= budget_bytes + 4 * MIB, peaks
