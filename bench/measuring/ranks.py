"""One rank of the sweep over ranks: saves and loads its shards with the others, by ours and by stock in turn.

Started by growth.py, one process a rank, with the environment that torchrun would set. In: a JSON object as
only argument. Out: on rank 0, one JSON object: samples by engine and figure, the slowest rank's.
Keeps: every rank starts a sample after a barrier; a shard that comes back different ends the program.
Belongs here: what a rank does. Not here: how many there are, what is done with the samples.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ..engines.adapter import Engine
from ..engines.ours import DcpAsync
from ..engines.roster import OURS
from ..engines.stock import Stock
from . import raw, sampling

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


def slowest(seconds: float) -> float:
    """The largest of all ranks' times."""
    box = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box.item())


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
        raw.drop_cache(root)
    seconds = timed(lambda: engine.load(step))
    for name, tensor in state["model"].items():
        if not torch.equal(tensor.to_local(), wanted[name]):
            raise SystemExit(f"rank {dist.get_rank()}: {name} differs from what was saved")
    return {"cold": slowest(seconds)}


def main() -> None:
    given = json.loads(sys.argv[1])
    root = Path(given["root"])
    for name in ("ours", "stock"):
        (root / name).mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)  # more ranks than cores, each with threads, measure only their barriers
    state: dict[str, Any] = {"model": shards(given["num_tensors"], given["nbytes"])}
    engines: dict[str, Engine] = {
        OURS: DcpAsync(state, root / "ours"),
        "stock": Stock(state, root / "stock", how="thread", best=False, overlap=False, joined=True),
    }
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
    if dist.get_rank() == 0:
        Path(given["answer"]).write_text(json.dumps(samples), encoding="ascii")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
