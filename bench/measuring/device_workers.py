"""What the process of an engine answers where the state lies on an accelerator, and the floors of its link.

In: a workload on a device. Out: seconds, from and to moments when the device had nothing left to do.
Keeps: the steps beside saves are queued on the stream that a trainer uses, the current one, and wait for
that one alone. On the CPU each line runs as well, with nothing pinned.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .. import engines
from . import raw, sampling, workloads
from .engine_worker import Answer, EngineWorker

COPIES_A_SAMPLE = 3
OPERATIONS_A_STEP = 40


def make(engine: str, workload: workloads.Workload, root: Path) -> DeviceWorker | LinkWorker:
    """The worker of that engine; the workload's tensors say which device."""
    if engine == engines.RAW:
        return LinkWorker(workload, root)
    return DeviceWorker(engine, workload, root)


class DeviceWorker(EngineWorker):
    """Commands on an engine whose state is on a device."""

    def __init__(self, engine: str, workload: workloads.Workload, root: Path) -> None:
        self._device = workload.tensors[0].device
        self._steps = _Steps(self._device)
        self._device_bytes = _allocated(self._device)
        super().__init__(engine, workload, root)
        self.commands |= {"prepare": self.prepare, "beside": self.beside}

    def describe(self) -> Answer:
        return {**super().describe(), "device": device_name(self._device)}

    def prepare(self) -> Answer:
        synchronize(self._device)
        start = time.perf_counter()
        self._engine.prepare()
        return {"prepare": time.perf_counter() - start}

    def save(self) -> Answer:
        synchronize(self._device)
        step = self._next_step()
        cpu = sampling.cpu_seconds()
        start = time.perf_counter()
        pending = self._engine.save(step)
        pending.staged()
        staged = time.perf_counter() - start
        cpu = sampling.cpu_seconds() - cpu
        pending.result()
        durable = time.perf_counter() - start
        self._keep(step)
        return {"blocked": pending.blocked, "staged": staged, "durable": durable, "staging_cpu": cpu}

    def beside(self, seconds: float, saves: int) -> Answer:
        """The trainer's steps alone, then beside saves; last a save beside pure Python in this thread."""
        end = time.perf_counter() + seconds
        alone = list(self._steps.until(lambda: time.perf_counter() > end))
        staging: list[float] = []
        uploading: list[float] = []
        for _ in range(saves):
            self._save_beside_steps(staging, uploading)
        steps = {"step_staging": staging, "step_uploading": uploading}
        return {
            "step_alone": statistics.median(alone),
            # a save may be staged, or durable, before a step has begun
            **{name: statistics.median(seconds) for name, seconds in steps.items() if seconds},
            "step_worst": max([*staging, *uploading], default=0.0),
            "staged_beside_python": self._beside_python(),
        }

    def load(self, cold: bool) -> Answer:
        for tensor in self._workload.tensors:
            tensor.zero_()
        (engines.drop_cache if cold else engines.warm_cache)(self._root)
        synchronize(self._device)
        start = time.perf_counter()
        self._engine.load(self._kept)
        synchronize(self._device)
        seconds = time.perf_counter() - start
        different = workloads.num_different(self._workload.tensors)
        return {"cold" if cold else "warm": seconds, "num_different": different}

    def memory(self) -> Answer:
        peak = _allocated(self._device, peak=True) - self._device_bytes
        return {**super().memory(), "device_extra_bytes": float(peak)}

    def _save_beside_steps(self, staging: list[float], uploading: list[float]) -> None:
        step = self._next_step()
        pending = self._engine.save(step)
        staged = _Staged(pending)
        staging += self._steps.until(lambda: not staged.is_alive())
        uploading += self._steps.until(pending.done)
        pending.result()
        self._keep(step)

    def _beside_python(self) -> float:
        synchronize(self._device)
        step = self._next_step()
        start = time.perf_counter()
        pending = self._engine.save(step)
        staged = _Staged(pending)
        while staged.is_alive():
            sampling.python_operations()
        pending.result()
        self._keep(step)
        return staged.moment - start


class _Staged(threading.Thread):
    """Alive until a save has let go of the state; knows when that was."""

    def __init__(self, pending: engines.Pending) -> None:
        super().__init__()
        self._pending = pending
        self.moment = float("inf")
        self.start()

    def run(self) -> None:
        self._pending.staged()
        self.moment = time.perf_counter()


class LinkWorker:
    """The same bytes over the link to the device with no checkpoint around them, and onto the disk."""

    def __init__(self, workload: workloads.Workload, root: Path) -> None:
        self._tensors = list(workload.tensors)
        self._device = self._tensors[0].device
        nbytes = raw.packed_bytes(self._tensors)
        self._packed = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type != "cpu")
        self._pageable = torch.zeros(nbytes, dtype=torch.uint8)
        self._pinned.zero_()
        self._disk = raw.Raw(workload.tensors, root)
        self._root = root
        self.commands: dict[str, Callable[..., Answer]] = {
            "describe": self.describe,
            "link": self.link,
            "disk": self.disk,
        }

    def describe(self) -> Answer:
        how = "O_DIRECT" if self._disk.direct else "buffered (O_DIRECT refused here)"
        call = f"copies between one pinned buffer and the device; {how} pwrite of the same bytes, fsync"
        return {"call": call, "device": device_name(self._device)}

    def link(self) -> Answer:
        """Each way of copying, the best of a few: no neighbour may raise a floor."""
        host = list(raw.packed_views(self._pinned, self._tensors))
        beside = list(raw.packed_views(self._packed, self._tensors))

        def one_by_one() -> None:
            torch._foreach_copy_(host, self._tensors, non_blocking=True)

        def packed() -> None:
            torch._foreach_copy_(beside, self._tensors)
            self._pinned.copy_(self._packed, non_blocking=True)

        return {
            "one_pinned_copy": self._best(lambda: self._pinned.copy_(self._packed, non_blocking=True)),
            "one_pageable_copy": self._best(lambda: self._pageable.copy_(self._packed)),
            "each_tensor": self._best(one_by_one),
            "packed_on_the_device": self._best(packed),
            "one_pinned_copy_to_device": self._best(
                lambda: self._packed.copy_(self._pinned, non_blocking=True)
            ),
        }

    def disk(self) -> Answer:
        write = self._disk.write()
        engines.warm_cache(self._root)
        return {"write": write, "warm": self._disk.read(direct=False)}

    def close(self) -> None:
        self._disk.close()

    def _best(self, copy: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(COPIES_A_SAMPLE):
            synchronize(self._device)
            start = time.perf_counter()
            copy()
            synchronize(self._device)
            best = min(best, time.perf_counter() - start)
        return best


class _Steps:
    """A small training loop's steps: matrix products, and a look at a result, as at a loss."""

    def __init__(self, device: torch.device) -> None:
        width, dtype = (128, torch.float32) if device.type == "cpu" else (2048, torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        state, weights = torch.randn(2, width, width, generator=generator).to(device, dtype)
        self._state, self._weights = state, weights

    def until(self, over: Callable[[], bool]) -> Iterator[float]:
        """The seconds of each step, as long as it is not over when one would begin."""
        while not over():
            start = time.perf_counter()
            for _ in range(OPERATIONS_A_STEP):
                self._state = torch.tanh(self._state @ self._weights)
            self._state[0, 0].item()  # waits for the current stream, and no other
            yield time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str:
    """The name of the hardware; the device's type where it tells none."""
    module = torch.get_device_module(device)
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    return str(name)


def _allocated(device: torch.device, *, peak: bool = False) -> int:
    module = torch.get_device_module(device)
    name = "max_memory_allocated" if peak else "memory_allocated"
    return int(getattr(module, name)(device)) if hasattr(module, name) else 0
