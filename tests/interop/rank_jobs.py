"""One rank of a world that saves with stock DCP: started as a script, once per rank, by ``run_world``.

Enters: a directory, the world's size, a rank, job names. Leaves: a checkpoint per job. Needs torch alone.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.interop.stock_states import SHARDED, sharded_whole

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120.0


def sharded_state() -> dict[str, Any]:
    """This rank's part of ``sharded_whole``."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = sharded_whole()
    sharded: dict[str, DTensor] = {
        name: distribute_tensor(whole["sharded"][name], mesh, [Shard(dim)])
        for name, (_, _, dim) in SHARDED.items()
    }
    replicated = distribute_tensor(whole["replicated"], mesh, [Replicate()])
    return {**whole, "sharded": sharded, "replicated": replicated}


def checkpointable_state() -> dict[str, Any]:
    """The same by plain tensors that carry torch's CheckpointableTensor protocol: rows, two blocks of them on
    each rank."""
    rank, whole = dist.get_rank(), sharded_whole()
    blocks = 2 * dist.get_world_size()
    for name, tensor in whole["sharded"].items():
        rest, first, at = [0] * (tensor.dim() - 1), 0, 0
        parts, theirs, ours = [], [], []
        for turn, block in enumerate(tensor.chunk(blocks)):
            if turn % dist.get_world_size() == rank:
                parts.append(block)
                theirs.append((first, *rest))
                ours.append((at, *rest))
                at += len(block)
            first += len(block)
        made: Any = torch.cat(parts) if parts else tensor[:0].clone()
        made.global_shape, made.global_offsets, made.local_offsets = tuple(tensor.shape), theirs, ours
        made.local_sizes = [tuple(part.shape) for part in parts]
        whole["sharded"][name] = made
    return whole


def _save_checkpointable(path: Path) -> None:
    dcp.save(checkpointable_state(), storage_writer=FileSystemWriter(path, sync_files=False))


def _save(path: Path, **options: Any) -> None:
    dcp.save(sharded_state(), storage_writer=FileSystemWriter(path, sync_files=False), **options)


def _save_with(path: Path, **options: Any) -> None:
    dcp.save(sharded_state(), storage_writer=FileSystemWriter(path, sync_files=False, **options))


def _save_async(path: Path) -> None:
    future: Any = dcp.async_save(sharded_state(), storage_writer=FileSystemWriter(path, sync_files=False))
    future.result()


JOBS: dict[str, Callable[[Path], None]] = {
    "collectives": _save,
    "no_collectives": lambda path: _save(path, use_collectives=False),
    "dedup_lowest": lambda path: _save(path, planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)),
    "cached_plan": lambda path: _save(path, planner=dcp.DefaultSavePlanner(enable_plan_caching=True)),
    "threads": lambda path: _save_with(path, thread_count=2),
    "file_per_item": lambda path: _save_with(path, single_file_per_rank=False),
    "async": _save_async,
}
if importlib.util.find_spec("torch.distributed.checkpoint.protocol") is not None:  # from torch 2.14.1 on
    JOBS["checkpointable"] = _save_checkpointable


def run_world(directory: Path, world_size: int, jobs: Sequence[str], python: str = sys.executable) -> None:
    """Run ``jobs`` in ``world_size`` processes; ``directory`` gets a checkpoint of each job's name."""
    directory.mkdir(parents=True, exist_ok=True)
    ranks = [
        subprocess.Popen(
            [python, "-W", "ignore", __file__, directory, str(world_size), str(rank), *jobs],
            env={**os.environ, "PYTHONPATH": os.fspath(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        said = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    # by what they wrote, not by how they ended: gloo's threads, taken down, now and then abort a process that
    # has done all of its work
    ended = [directory / f"done-{rank}" for rank in range(world_size)]
    assert all(map(Path.is_file, ended)), "\n".join(said)
    for path in (directory / "rendezvous", *ended):
        path.unlink(missing_ok=True)


def run_rank(
    directory: Path,
    world_size: int,
    rank: int,
    jobs: Sequence[str],
    known: Mapping[str, Callable[[Path], None]] = JOBS,
) -> None:
    """The part of one rank, in a process of its own."""
    meeting = f"file://{os.path.abspath(directory)}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, world_size=world_size, rank=rank)
    for job in jobs:
        known[job](directory / job)
    dist.barrier()
    dist.destroy_process_group()


def _main(directory: str, world_size: str, rank: str, *jobs: str) -> None:
    torch.set_num_threads(1)
    run_rank(Path(directory), int(world_size), int(rank), jobs)
    (Path(directory) / f"done-{rank}").touch()


if __name__ == "__main__":
    _main(*sys.argv[1:])
