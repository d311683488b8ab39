"""The process of one engine: builds its state, then takes one sample for each line on its standard input.

In: a JSON object as only argument, then one JSON command a line. Out: one JSON answer a line; whatever else
is printed goes to standard error. An answer with "error" holds the traceback, and the process goes on.
Keeps: between two answers the process does nothing, so that processes asked in turn never share the cores.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import engines
from . import workloads
from .engine_worker import Answer, EngineWorker, RawWorker


class Worker(Protocol):
    """What a line on standard input may ask for, by name."""

    commands: dict[str, Callable[..., Answer]]

    def close(self) -> None: ...


def made(arguments: dict[str, Any]) -> tuple[Worker, Answer]:
    """The worker that the arguments ask for, and what is known of its state."""
    # Not at the top: a process imports what it measures and nothing else.
    engine, root = arguments["engine"], Path(arguments["root"])
    if arguments["workload"] == "trainer":
        from .training import TrainerWorker

        trainer = TrainerWorker(engine, root)
        return trainer, {"nbytes": trainer.nbytes, "num_tensors": trainer.num_tensors}
    workload = workloads.build(arguments["workload"], arguments["scale"])
    facts = {"nbytes": workload.nbytes, "num_tensors": len(workload.tensors)}
    if (device := arguments["device"]) is not None:
        from . import device_workers

        workload = workloads.on_device(workload, torch.device(device))
        return device_workers.make(engine, workload, root), facts
    if engine == engines.RAW:
        return RawWorker(workload, root), facts
    return EngineWorker(engine, workload, root), facts


def main() -> None:
    # Libraries may print: only answers may reach the pipe that the parent reads.
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="ascii")
    os.dup2(2, 1)
    worker: Worker

    def answer(call: Callable[..., Answer], **keywords: Any) -> bool:
        try:
            reply = call(**keywords)
        except Exception:
            answers.write(json.dumps({"error": traceback.format_exc()}) + "\n")
            return False
        answers.write(json.dumps(reply) + "\n")
        return True

    def start() -> Answer:
        nonlocal worker
        worker, facts = made(json.loads(sys.argv[1]))
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
