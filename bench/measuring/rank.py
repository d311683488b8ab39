"""What each rank of a measurement does: join the others, take samples beside them; rank 0 answers.

Started by `run_ranks`, one process a rank, with the environment that torchrun would set. In: a JSON object as
only argument. Out: on rank 0, one JSON file of samples.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Given = dict[str, Any]


def take(samples_of: Callable[[Given], Given]) -> None:
    """Run one rank's part of a measurement; what rank 0's call returns is the answer."""
    given: Given = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    torch.set_num_threads(1)  # more ranks than cores, each with threads, measure only their barriers
    samples = samples_of(given)
    if dist.get_rank() == 0:
        Path(given["answer"]).write_text(json.dumps(samples), encoding="ascii")
    dist.barrier()
    dist.destroy_process_group()


def slowest(seconds: float) -> float:
    """The largest of all ranks' times."""
    box = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box.item())
