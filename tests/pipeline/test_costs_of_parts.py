"""A part of a checkpoint costs what the part does: bytes by the system's counters, memory by its peak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest_asyncio
import torch

from dcp_async import CheckpointEngine, open_checkpoint

MIB = 1 << 20
NUM_TENSORS = 24


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


STREAM = """
import asyncio, sys
from pathlib import Path
from dcp_async import open_checkpoint

def memory(field):
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(f"{field}:"))

async def main(path, budget_bytes):
    async with open_checkpoint(path) as checkpoint:
        async for _ in checkpoint.stream("model.w1", budget_bytes=budget_bytes):
            pass
        for keys in ("*", "model.w?"):
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            async for _, tensor in checkpoint.stream(keys, budget_bytes=budget_bytes):
                pass
            del _, tensor
            print(memory("VmHWM") - before)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def test_a_stream_takes_no_more_memory_than_it_may(path: Path) -> None:
    budget_bytes = 16 * MIB
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(path), str(budget_bytes)],
        # else what glibc keeps of freed memory for its own use would count
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == 2
    # the caller's own beside it: the one that it has while it asks for the next
    assert max(peaks) <= budget_bytes + 4 * MIB, peaks
