"""The trainers before and after: each resumes what the other saved, and trains on to the same losses."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.processes import run_in_processes

STEPS, SAVED = 6, 4
RANKS = 2
Losses = dict[int, float]
RUNS = {
    "before alone": (("before", STEPS),),
    "after alone": (("after", STEPS),),
    "before, then after": (("before", SAVED), ("after", STEPS)),
    "after, then before": (("after", SAVED), ("before", STEPS)),
}


def run_trainers(kind: str, directory: Path, rank: int | None = None) -> dict[str, Losses]:
    """The losses that the last trainer of each run saw, in a process of its own or by one of RANKS."""
    if rank is not None:
        store = dist.FileStore(str(directory / "store"), RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    seen: dict[str, Losses] = {}
    for run, parts in RUNS.items():
        for when, steps in parts:
            losses = importlib.import_module(f"migrate.{kind}_{when}").train(directory / run, steps)
            seen[run] = asyncio.run(losses) if inspect.iscoroutine(losses) else losses
    if rank is not None:
        dist.barrier()
        dist.destroy_process_group()
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Losses]]:
    """What each trainer saw; all of them run at once."""
    jobs: dict[str, tuple[str, int | None]] = {"plain": ("plain", None), "manager": ("manager", None)}
    jobs |= {f"fsdp2, rank {rank}": ("fsdp2", rank) for rank in range(RANKS)}
    directories = {kind: tmp_path_factory.mktemp(kind) for kind in ("plain", "manager", "fsdp2")}
    outcomes = run_in_processes(
        [(run_trainers, (kind, directories[kind], rank)) for kind, rank in jobs.values()]
    )
    return dict(zip(jobs, outcomes, strict=True))


@pytest.mark.parametrize("trainer", ["plain", "manager", *(f"fsdp2, rank {rank}" for rank in range(RANKS))])
def test_a_trainer_goes_on_from_what_its_twin_saved(seen: dict[str, dict[str, Losses]], trainer: str) -> None:
    whole = seen[trainer]["before alone"]
    assert list(whole) == [*range(1, STEPS + 1)]
    assert len({*whole.values()}) == STEPS
    assert seen[trainer]["after alone"] == whole
    rest = {step: whole[step] for step in range(SAVED + 1, STEPS + 1)}
    assert seen[trainer]["before, then after"] == rest
    assert seen[trainer]["after, then before"] == rest
