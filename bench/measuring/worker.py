"""The process of one engine: builds its state, then takes one sample for each line on its standard input.

In: a JSON object as only argument, then one JSON command a line. Out: one JSON answer a line; whatever else
is printed goes to standard error. An answer with "error" holds the traceback, and the process goes on.
Keeps: between two answers the process does nothing, so that processes asked in turn never share the cores.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .. import engines
from . import raw, sampling, workloads

if TYPE_CHECKING:
    from .training import TrainerWorker

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
        if self._kept:
            self._engine.discard(self._kept)
        self._kept = step
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


def main() -> None:
    # Libraries may print: only answers may reach the pipe that the parent reads.
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="ascii")
    os.dup2(2, 1)
    arguments = json.loads(sys.argv[1])
    root = Path(arguments["root"])
    engine = arguments["engine"]

    def answer(call: Callable[..., Answer], **keywords: Any) -> bool:
        try:
            reply = call(**keywords)
        except Exception:
            answers.write(json.dumps({"error": traceback.format_exc()}) + "\n")
            return False
        answers.write(json.dumps(reply) + "\n")
        return True

    worker: EngineWorker | RawWorker | TrainerWorker

    def start() -> Answer:
        nonlocal worker
        if arguments["workload"] == "trainer":
            from .training import TrainerWorker

            worker = TrainerWorker(engine, root)
            facts = {"nbytes": worker.nbytes, "num_tensors": worker.num_tensors}
        else:
            workload = workloads.build(arguments["workload"], arguments["scale"])
            worker = (
                RawWorker(workload, root) if engine == engines.RAW else EngineWorker(engine, workload, root)
            )
            facts = {"nbytes": workload.nbytes, "num_tensors": len(workload.tensors)}
        return {
            **worker.commands["describe"](),
            **facts,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    if not answer(start):
        return
    for line in sys.stdin:
        command = json.loads(line)
        answer(worker.commands[command.pop("do")], **command)
    worker.close()


if __name__ == "__main__":
    main()
