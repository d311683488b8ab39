"""One rank of what comparing replicas costs: saves a DDP-like state by each way of comparing, in turn.

In: number of saves behind the first. Out: milliseconds by state, mode and figure, the slowest rank's.
Keeps: the engines run in turn in the same processes, a barrier before each save.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from dcp_async import Coordination
from dcp_async.sync import CheckpointEngine

from .rank import Given, slowest, take

STATES = {"large": (64, 4 << 20), "many": (20_000, 4 << 10)}
"""Name -> (tensors, bytes of each)."""
MODES: tuple[Literal["trust", "sample", "check"], ...] = ("trust", "sample", "check")


def replicated_state(name: str) -> dict[str, Any]:
    """A state that is equal on every rank."""
    count, nbytes = STATES[name]
    generator = torch.Generator().manual_seed(1)
    return {
        f"layer{index:05d}.weight": torch.randn(nbytes // 4, generator=generator) for index in range(count)
    }


def save(engine: CheckpointEngine, state: dict[str, Any], step: int) -> dict[str, float]:
    """Milliseconds of save(), and until it was durable."""
    dist.barrier()
    start = time.perf_counter()
    response = engine.save(state, step=step)
    stall = time.perf_counter() - start
    response.upload_completion.result()
    durable = time.perf_counter() - start
    return {"save()": slowest(stall) * 1e3, "durable": slowest(durable) * 1e3}


def samples_of(given: Given) -> dict[str, dict[str, list[float]]]:
    """Samples by state and mode, and by figure: of the first save and of later ones."""
    samples: dict[str, dict[str, list[float]]] = {}
    for name in STATES:
        state = replicated_state(name)
        roots = {mode: Path(given["root"], f"{name}-{mode}") for mode in MODES}
        engines = {
            mode: CheckpointEngine(root, coordination=Coordination(replicas=mode)).open()
            for mode, root in roots.items()
        }
        for step in range(given["runs"] + 1):
            for mode, engine in engines.items():
                for figure, milliseconds in save(engine, state, step).items():
                    column = f"{'later' if step else 'first'}: {figure}"
                    row = samples.setdefault(f"{name}, {mode}", {})
                    row.setdefault(column, []).append(milliseconds)
                if dist.get_rank() == 0 and step:
                    shutil.rmtree(roots[mode] / f"step-{step - 1:08d}")
        for engine in engines.values():
            engine.close()
    return samples


if __name__ == "__main__":
    take(samples_of)
