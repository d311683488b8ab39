"""What comparing replicas costs: DDP-like states on a few gloo ranks, each way of comparing in turn.

    python -m bench.replicas --ranks 2,4 --runs 15

In: how many ranks and runs. Out: a table, and one JSON object as the last line: medians of the slowest rank's
milliseconds, of save() itself and until it is durable, for the first save of a plan and for later ones.
Keeps: the engines of one table run in turn in the same processes, a barrier before each save.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from dcp_async import Coordination
from dcp_async.sync import CheckpointEngine

STATES = {"large": (64, 4 << 20), "many": (20_000, 4 << 10)}
"""Name -> (tensors, bytes of each)."""
MODES: tuple[Literal["trust", "sample", "check"], ...] = ("trust", "sample", "check")


def state_of(name: str) -> dict[str, Any]:
    """The same on every rank."""
    count, nbytes = STATES[name]
    generator = torch.Generator().manual_seed(1)
    return {
        f"layer{index:05d}.weight": torch.randn(nbytes // 4, generator=generator) for index in range(count)
    }


def slowest(seconds: float) -> float:
    """The largest of all ranks' times."""
    box = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box.item())


def save(engine: CheckpointEngine, state: dict[str, Any], step: int) -> tuple[float, float]:
    """Seconds of save(), and until it was durable."""
    dist.barrier()
    start = time.perf_counter()
    response = engine.save(state, step=step)
    stall = time.perf_counter() - start
    response.upload_completion.result()
    return slowest(stall), slowest(time.perf_counter() - start)


def rank_main(rank: int, size: int, port: int, root: str, runs: int, results: Any) -> None:
    """One rank."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    found: dict[str, dict[str, list[float]]] = {}
    for name in STATES:
        state = state_of(name)
        engines = {
            mode: CheckpointEngine(f"{root}/{name}-{mode}", coordination=Coordination(replicas=mode)).open()
            for mode in MODES
        }
        for turn in range(runs + 1):
            for mode, engine in engines.items():
                times = save(engine, state, turn)
                when = "later" if turn else "first"
                for figure, seconds in zip(("save()", "durable"), times, strict=True):
                    column = found.setdefault(f"{name}, {mode}", {}).setdefault(f"{when}: {figure}", [])
                    column.append(seconds * 1e3)
                if rank == 0 and turn:
                    shutil.rmtree(Path(root, f"{name}-{mode}", f"step-{turn - 1:08d}"))
        for engine in engines.values():
            engine.close()
    dist.barrier()
    if rank == 0:
        results.put(
            {row: {at: statistics.median(each) for at, each in of.items()} for row, of in found.items()}
        )
    dist.destroy_process_group()


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    told: dict[str, Any] = {}
    for size in map(int, options.ranks.split(",")):
        with tempfile.TemporaryDirectory() as root:
            server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
            results = context.Queue()
            ranks = [
                context.Process(target=rank_main, args=(rank, size, server.port, root, options.runs, results))
                for rank in range(size)
            ]
            for process in ranks:
                process.start()
            told[str(size)] = results.get(timeout=600)
            for process in ranks:
                process.join()
    columns = ["first: save()", "first: durable", "later: save()", "later: durable"]
    lines = [f"| ranks | state, replicas= | {' | '.join(columns)} |", f"| --- | --- |{' ---: |' * 4}"]
    for ranks_told, rows in told.items():
        for row, of in rows.items():
            figures = " | ".join(f"{of[column]:.1f} ms" for column in columns)
            lines.append(f"| {ranks_told} | {row} | {figures} |")
    cores, load = os.cpu_count(), os.getloadavg()[0]
    lines.append(
        f"{platform.machine()}, {cores} cores, torch {torch.__version__}, n = {options.runs}, load {load:.1f}"
    )
    os.write(1, ("\n".join(lines) + "\n" + json.dumps(told) + "\n").encode())


if __name__ == "__main__":
    main()
