"""One rank of the sweep over ranks: saves and loads its shards with the others, by ours and by stock in turn.

In: number of tensors, bytes, rounds. Out: samples by engine and figure, the slowest rank's.
Keeps: every rank starts a sample after a barrier; a shard that comes back different ends the program.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ..engines import OURS, STOCK, Engine, drop_cache, make
from . import sampling
from .rank import Given, slowest, take

COLUMNS = 256


def shards(num_tensors: int, nbytes: int) -> dict[str, DTensor]:
    """Tensors of about `nbytes` in all, each cut along its rows over all ranks; each rank's bits differ."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = max(1, nbytes // num_tensors // 4 // COLUMNS // dist.get_world_size())
    generator = torch.Generator().manual_seed(dist.get_rank())
    return {
        f"layer{index:05d}.weight": DTensor.from_local(
            torch.randn(rows, COLUMNS, generator=generator), mesh, [Shard(0)], run_check=False
        )
        for index in range(num_tensors)
    }


def timed(call: Callable[[], None]) -> float:
    """Seconds of a call that every rank starts at the same time."""
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def save(engine: Engine, step: int) -> dict[str, float]:
    """One save of all ranks: the slowest rank's stall, and its time to durable."""
    dist.barrier()
    figures = sampling.save(engine, step)
    return {figure: slowest(figures[figure]) for figure in ("staged", "durable")}


def load(engine: Engine, step: int, state: dict[str, Any], root: Path) -> dict[str, float]:
    """One load of all ranks with a cold cache, compared bit for bit."""
    wanted = {name: tensor.to_local().clone() for name, tensor in state["model"].items()}
    for tensor in state["model"].values():
        tensor.to_local().zero_()
    dist.barrier()
    if dist.get_rank() == 0:
        drop_cache(root)
    seconds = timed(lambda: engine.load(step))
    for name, tensor in state["model"].items():
        if not torch.equal(tensor.to_local(), wanted[name]):
            raise SystemExit(f"rank {dist.get_rank()}: {name} differs from what was saved")
    return {"cold": slowest(seconds)}


def samples_of(given: Given) -> dict[str, dict[str, list[float]]]:
    """Samples by engine and figure, the slowest rank's."""
    root = Path(given["root"])
    state: dict[str, Any] = {"model": shards(given["num_tensors"], given["nbytes"])}
    engines: dict[str, Engine] = {}
    for name in (OURS, STOCK):
        (root / name).mkdir(exist_ok=True)
        engines[name] = make(name, state, root / name, joined=True)
    samples: dict[str, dict[str, list[float]]] = {}

    def keep(engine: str, prefix: str, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            samples.setdefault(engine, {}).setdefault(prefix + name, []).append(value)

    for name, engine in engines.items():
        engine.open()
        keep(name, "first_", save(engine, 1))
    for round_ in range(given["rounds"]):
        for name, engine in engines.items():
            keep(name, "", save(engine, 2 + round_))
            if dist.get_rank() == 0:
                engine.discard(1 + round_)
            dist.barrier()
    for _ in range(given["rounds"]):
        for name, engine in engines.items():
            keep(name, "", load(engine, 1 + given["rounds"], state, root))
    for engine in engines.values():
        engine.close()
    return samples


if __name__ == "__main__":
    take(samples_of)
