"""What the process of an engine under test answers: its commands, and the floors' in its place.

In: an engine over a workload, or the bare machine. Out: an `Answer` for each command that is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from .. import engines
from . import raw, sampling, workloads

Answer = dict[str, Any]


class EngineWorker:
    """Commands on an engine."""

    def __init__(self, engine: str, workload: workloads.Workload, root: Path) -> None:
        self._workload = workload
        self._root = root
        self._name = engine
        self._engine = engines.make(engine, workload.state, root)
        self._memory = sampling.MemoryPeak()
        self._engine.open()
        self._step = 0
        self._kept = 0
        self.commands: dict[str, Callable[..., Answer]] = {
            "describe": self.describe,
            "first": self.first,
            "save": self.save,
            "replan": self.replan,
            "lost": self.lost,
            "memory": self.memory,
            "prepare_load": self.prepare_load,
            "load": self.load,
            "check": self.check,
        }

    def describe(self) -> Answer:
        return {"call": self._engine.describe()}

    def first(self) -> Answer:
        with self._memory.helpers():
            return self.save()

    def save(self) -> Answer:
        """The newest checkpoint stays until the next is there: what is loaded later."""
        step = self._next_step()
        figures = sampling.save(self._engine, step)
        self._keep(step)
        return figures

    def replan(self) -> Answer:
        """A save of a structure that was never saved before, in memory that is warm."""
        step = self._next_step()
        name = f"structure{step}"
        self._workload.state[name] = torch.zeros(1)
        figures = sampling.save(self._engine, step)
        del self._workload.state[name]
        self._engine.discard(step)
        return figures

    def lost(self, loop: Literal["tiny", "python"], seconds: float) -> Answer:
        figures = sampling.lost_time(self._engine, self._next_step(), loop=loop, seconds=seconds)
        self._step += int(figures[f"lost_{loop}_num_saves"])
        return figures

    def memory(self) -> Answer:
        """The peak over all saves so far."""
        return {**self._memory.figures(), "memory_method": self._memory.method}

    def prepare_load(self) -> Answer:
        # Loads belong to a process that has not saved: no warm staging memory, no cached plan.
        self._engine.close()
        self._engine = engines.make(self._name, self._workload.state, self._root)
        self._engine.open()
        return {}

    def load(self, cold: bool) -> Answer:
        for tensor in self._workload.tensors:
            tensor.zero_()
        (engines.drop_cache if cold else engines.warm_cache)(self._root)
        memory = sampling.MemoryPeak()
        cpu = sampling.cpu_seconds()
        start = time.perf_counter()
        self._engine.load(self._kept)
        seconds = time.perf_counter() - start
        cpu = sampling.cpu_seconds() - cpu
        peak = memory.figures()["peak_extra_bytes"]
        different = workloads.num_different(self._workload.tensors)
        kind = "cold" if cold else "warm"
        figures = {kind: seconds, f"{kind}_cpu": cpu, f"{kind}_peak_extra_bytes": peak}
        return {**figures, "num_different": different}

    def check(self) -> Answer:
        """Load the newest checkpoint and compare: nothing is timed."""
        for tensor in self._workload.tensors:
            tensor.zero_()
        self._engine.load(self._kept)
        return {"num_different": workloads.num_different(self._workload.tensors)}

    def close(self) -> None:
        self._engine.close()

    def _keep(self, step: int) -> None:
        if self._kept:
            self._engine.discard(self._kept)
        self._kept = step

    def _next_step(self) -> int:
        self._step += 1
        return self._step


class RawWorker:
    """The same commands on the machine's floors."""

    def __init__(self, workload: workloads.Workload, root: Path) -> None:
        self._raw = raw.Raw(workload.tensors, root)
        self._root = root
        self.commands: dict[str, Callable[..., Answer]] = {
            "describe": self.describe,
            "first": self.save,
            "save": self.save,
            "prepare_load": self.prepare_load,
            "load": self.load,
        }

    def describe(self) -> Answer:
        how = "O_DIRECT" if self._raw.direct else "buffered (O_DIRECT refused here)"
        call = (
            f"torch._foreach_copy_ into warm private memory; {how} pwrite by {raw.NUM_THREADS} threads, "
            f"{raw.CHUNK_BYTES >> 20} MiB a call, fsync of file and directory"
        )
        return {"call": call}

    def save(self) -> Answer:
        return {"copy": self._raw.copy(), "write": self._raw.write()}

    def prepare_load(self) -> Answer:
        self._raw.copy()
        self._raw.write()
        return {}

    def load(self, cold: bool) -> Answer:
        answer: Answer = {}
        for name, direct in (("", False), ("_direct", True)) if cold else (("", False),):
            self._raw.copies[0].zero_()
            (engines.drop_cache if cold else engines.warm_cache)(self._root)
            answer[("cold" if cold else "warm") + name] = self._raw.read(direct=direct)
        return {**answer, "num_different": workloads.num_different(self._raw.copies)}

    def close(self) -> None:
        self._raw.close()
