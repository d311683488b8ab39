"""Memory is registered once, for states that need it, with their device, and a refusal costs speed alone."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, Limits, Stager, StagingOptions
from dcp_async.staging.device import cuda_runtime
from tests.support.devices import CountingBackend, assert_equal, elements, on_host
from tests.support.doubles import assert_same

CONTEXTS = Path(__file__).with_name("contexts.py")


async def test_a_host_only_state_registers_nothing(tmp_path: Path, device: torch.device) -> None:
    backend = CountingBackend()
    async with Stager(backend=backend) as stager, CheckpointEngine(tmp_path, staging=stager) as engine:
        await (await engine.save({"w": torch.ones(5)})).upload_completion
    assert backend.pins == []


async def test_growth_while_a_save_is_in_flight_registers_no_more_at_each_save(
    tmp_path: Path, device: torch.device
) -> None:
    backend, size = CountingBackend(), 16 * elements(device)
    before = {"w": torch.ones(size, device=device)}
    after = {"w": torch.ones(3 * size, device=device), "m": torch.ones(size, device=device)}
    async with (
        Stager(StagingOptions(part_bytes=1 << 20), backend=backend) as stager,
        CheckpointEngine(tmp_path, staging=stager, limits=Limits(pending_saves=2)) as engine,
    ):
        responses = [await engine.save(before, step=0)]
        responses += [await engine.save(after, step=step) for step in range(1, 6)]
        for response in responses:
            await response.upload_completion
    # the first arena, the one beside it, and the one that both become: each in chunks of a gigabyte at least
    assert len(backend.pins) <= 3


class RegisteredAlready(CountingBackend):
    """CUDA refuses the package's own call, as somebody has registered the memory before."""

    def pin(self, device: torch.device, address: int, nbytes: int) -> bool:
        if address not in {known for known, *_ in self.pins}:
            assert cuda_runtime.register(address, nbytes)
        return super().pin(device, address, nbytes)

    def release(self) -> None:
        for address in {known for known, *_ in self.pins}:
            cuda_runtime.unregister(address)


async def test_a_refused_pin_leaves_no_error_for_the_next_kernel_and_is_asked_for_once(
    tmp_path: Path, device: torch.device
) -> None:
    if device.type != "cuda":
        pytest.skip("nothing else registers memory")
    backend = RegisteredAlready()
    # strided, so that each copy launches a kernel, after which torch looks for an error
    weights = torch.randn(8192, 2048, device=device).t()
    async with Stager(StagingOptions(part_bytes=1 << 20), backend=backend) as stager:
        async with CheckpointEngine(tmp_path, staging=stager) as engine:
            for step in range(2):
                await (await engine.save({"w": weights}, step=step)).upload_completion
                assert_same((await engine.read(step))["w"], on_host(weights))
        backend.release()
    assert len(backend.pins) == 1


async def test_what_is_not_pinned_is_saved_all_the_same(tmp_path: Path, device: torch.device) -> None:
    weights = torch.randn(elements(device), device=device)
    async with CheckpointEngine(tmp_path, staging=StagingOptions(pinned=False)) as engine:
        await (await engine.save({"w": weights})).upload_completion
        target = torch.zeros_like(weights)
        await engine.load({"w": target})
    assert_equal([target], [weights])


def contexts_after(*arguments: Any) -> list[int]:
    """On which devices a process of its own has a context in the end."""
    command = [sys.executable, str(CONTEXTS), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=CONTEXTS.parents[2])
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [int(index) for index in ran.stdout.split()]


def test_a_host_only_state_makes_no_context(tmp_path: Path, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("asks CUDA's driver")
    assert contexts_after(tmp_path, "host") == []


def test_a_rank_makes_no_context_on_another_ones_device(tmp_path: Path, device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two devices of CUDA")
    assert contexts_after(tmp_path, 1) == [1]


def test_the_driver_tells_of_contexts(device: torch.device) -> None:
    """Else the two before would prove nothing."""
    if device.type != "cuda":
        pytest.skip("asks CUDA's driver")
    torch.ones(1, device=device)
    flags, is_active = ctypes.c_uint(), ctypes.c_int()
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuDevicePrimaryCtxGetState(device.index, ctypes.byref(flags), ctypes.byref(is_active))
    assert is_active.value == 1
