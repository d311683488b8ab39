"""How a figure is taken, inside the process of the engine under test.

In: an open `Engine`. Out: plain dicts of figures, times in seconds, memory in bytes.
Keeps: a sample starts with nothing in flight and ends durable; deleting old checkpoints is never inside a
timed span; helper processes of an engine count in CPU and in memory.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ..engines import Engine

Figures = dict[str, Any]
POLL_SECONDS = 0.005
_TICK = 1 / os.sysconf("SC_CLK_TCK")


def save(engine: Engine, step: int) -> Figures:
    """One save, its caller idle: blocked, staged (the state may be mutated), durable, CPU of all its work."""
    cpu = cpu_seconds()
    start = time.perf_counter()
    pending = engine.save(step)
    pending.staged()
    staged = time.perf_counter() - start
    pending.result()
    durable = time.perf_counter() - start
    cpu = cpu_seconds() - cpu
    return {"blocked": pending.blocked, "staged": staged, "durable": durable, "cpu": cpu}


def lost_time(engine: Engine, step: int, *, loop: Literal["tiny", "python"], seconds: float) -> Figures:
    """Trainer time that a save costs outside its blocked part.

    A loop, of tiny torch operations or of pure Python, runs beside back-to-back saves for at least `seconds`
    and one save. Its operations, divided by its rate with no save in flight (the mean of before and after),
    are the time it really had; the rest of the wall time, less the time blocked in `save()`, was lost.
    """
    work = _tiny_operations if loop == "tiny" else python_operations
    before = _rate(work, min(1.5, seconds / 2))
    first = step
    blocked = 0.0
    operations = 0
    durable: list[float] = []
    start = time.perf_counter()
    while step == first or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        pending = engine.save(step)
        blocked += pending.blocked
        step += 1
        while not pending.done():
            operations += work()
        pending.result()
        durable.append(time.perf_counter() - began)
    wall = time.perf_counter() - start
    after = _rate(work, min(1.5, seconds / 2))
    for saved in range(first, step):
        engine.discard(saved)
    rate = (before + after) / 2
    return {
        f"lost_{loop}": (wall - blocked - operations / rate) / len(durable),
        f"lost_{loop}_share": 1 - operations / rate / (wall - blocked) if wall > blocked else 1.0,
        f"lost_{loop}_num_saves": len(durable),
        f"durable_{loop}": statistics.median(durable),
        f"{loop}_rate_before": before,
        f"{loop}_rate_after": after,
    }


class MemoryPeak:
    """The most memory that this process held above a baseline, and its helpers beside it.

    The kernel's own high-water mark (VmHWM, after a reset through clear_refs) counts anonymous memory and
    touched shared memory (memfd arenas) alike and misses no peak between two samples. Page cache of written
    files is not in it. The baseline is taken with the state built, the engine imported and free heap
    returned, before the engine is opened. Of a helper process its anonymous memory counts, as `helpers` saw
    it: memory that it shares with this process is counted here already.
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
        self._baseline = _status_bytes("self", "VmRSS")
        self._helpers = 0

    @contextmanager
    def helpers(self) -> Iterator[None]:
        """Look at the helper processes every few milliseconds for as long as the block runs."""
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(POLL_SECONDS):
                self._helpers = max(
                    self._helpers, sum(_status_bytes(pid, "RssAnon") for pid in helper_processes())
                )

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def figures(self) -> Figures:
        """Peak and present memory above the baseline."""
        return {
            "peak_extra_bytes": float(_status_bytes("self", "VmHWM") - self._baseline + self._helpers),
            "kept_extra_bytes": float(_status_bytes("self", "VmRSS") - self._baseline),
            "helpers_bytes": float(self._helpers),
        }


def helper_processes() -> list[str]:
    """The ids of all processes below this one."""
    below: list[str] = []
    waiting = ["self"]
    while waiting:
        for task in _listed(Path(f"/proc/{waiting.pop()}/task")):
            children = _read(task / "children").split()
            below += children
            waiting += children
    return below


def cpu_seconds() -> float:
    """User and system time of this process and of the helpers that it has."""
    total = time.process_time()
    for pid in helper_processes():
        if line := _read(Path(f"/proc/{pid}/stat")):
            user, system = line.rpartition(")")[2].split()[11:13]
            total += (int(user) + int(system)) * _TICK
    return total


_TINY = torch.zeros(8)


def _tiny_operations() -> int:
    for _ in range(100):
        _TINY.add_(1.0)
    return 100


def python_operations() -> int:
    """Keep the interpreter busy for a moment; how many operations that were."""
    count = 0
    for _ in range(1000):
        count += 1
    return count


def _rate(work: Callable[[], int], seconds: float) -> float:
    operations = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        operations += work()
    return operations / elapsed


def _status_bytes(process: str, field: str) -> int:
    for line in _read(Path(f"/proc/{process}/status")).splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    if process == "self":
        raise OSError(f"/proc/self/status has no {field}: these benches need Linux")
    return 0  # a helper that has ended


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return ""  # its process has ended


def _listed(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []
