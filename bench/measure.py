"""How a figure is taken, inside the process of the engine under test.

In: an open `Engine`. Out: plain dicts of figures, times in seconds, memory in bytes.
Keeps: a sample starts with nothing in flight and ends durable; deleting old checkpoints is never inside a
timed span.
Belongs here: the clock, the busy thread, the tiny-op loop, the memory accounting. Not here: which engine, how
often.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import torch

from engines import Engine

Figures = dict[str, float]


def save(engine: Engine, step: int) -> Figures:
    """One save, its caller idle: blocked, staged (the state may be mutated), durable, CPU of the process."""
    cpu = time.process_time()
    start = time.perf_counter()
    pending = engine.save(step)
    pending.staged()
    staged = time.perf_counter() - start
    pending.result()
    durable = time.perf_counter() - start
    cpu = time.process_time() - cpu
    engine.discard(step)
    return {"blocked": pending.blocked, "staged": staged, "durable": durable, "cpu": cpu}


def save_busy(engine: Engine, step: int) -> Figures:
    """One save; after the call the calling thread spins in pure Python until the upload is done."""
    start = time.perf_counter()
    pending = engine.save(step)
    count = 0
    while not pending.done():
        for _ in range(1000):
            count += 1
    durable = time.perf_counter() - start
    pending.result()
    engine.discard(step)
    return {"durable_busy": durable}


def lost_time(engine: Engine, step: int, *, seconds: float) -> Figures:
    """Trainer time that a save costs outside its blocked part.

    A loop of tiny torch operations runs beside back-to-back saves for at least `seconds`. Its operations,
    divided by its rate with no save in flight (the mean of before and after), are the time it really had; the
    rest of the wall time, less the time blocked in `save()`, was lost.
    """
    before = _tiny_rate(min(2.0, seconds / 2))
    first = step
    blocked = 0.0
    operations = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        pending = engine.save(step)
        blocked += pending.blocked
        step += 1
        while not pending.done():
            operations += _tiny_operations()
        pending.result()
    wall = time.perf_counter() - start
    after = _tiny_rate(min(2.0, seconds / 2))
    for saved in range(first, step):
        engine.discard(saved)
    num_saves = step - first
    rate = (before + after) / 2
    return {
        "lost": (wall - blocked - operations / rate) / num_saves,
        "lost_num_saves": num_saves,
        "lost_wall": wall,
        "lost_blocked": blocked,
        "tiny_rate_before": before,
        "tiny_rate_after": after,
        "tiny_rate_during": operations / (wall - blocked),
    }


class MemoryPeak:
    """The most memory that this process held above a baseline.

    The kernel's own high-water mark (VmHWM, after a reset through clear_refs) counts anonymous memory and
    touched shared memory (memfd arenas) alike and misses no peak between two samples. Page cache of written
    files is not in it. The baseline is taken with the state built, the engine imported and free heap
    returned, before the engine is opened.
    """

    def __init__(self) -> None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.method = "VmHWM since reset - VmRSS at the baseline"
        except OSError:
            self.method = (
                "VmHWM - VmRSS at the baseline, not reset: too high when building the state peaked higher"
            )
        self._baseline = _status_bytes("VmRSS")

    def figures(self) -> Figures:
        """Peak and present memory above the baseline."""
        return {
            "peak_extra_bytes": float(_status_bytes("VmHWM") - self._baseline),
            "kept_extra_bytes": float(_status_bytes("VmRSS") - self._baseline),
        }


_TINY = torch.zeros(8)


def _tiny_operations() -> int:
    for _ in range(100):
        _TINY.add_(1.0)
    return 100


def _tiny_rate(seconds: float) -> float:
    operations = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        operations += _tiny_operations()
    return operations / elapsed


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: these benches need Linux")
