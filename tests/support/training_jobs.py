"""What runs in a fresh process: a trainer that has nothing but a checkpoint, and what it ends up with.

Started as ``python -m tests.support.training_jobs JOB ROOT``. Enters: a root with checkpoints. Leaves:
whatever the job gives back, through a file beside the root.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from dcp_async import CheckpointError, CheckpointInfo, RNGState
from dcp_async.sync import CheckpointEngine
from tests.support.training_apps import DISTRIBUTED, WRAPPERS, WrappedRun, world_of_one
from tests.support.training_optimizers import CASES, Trainer

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 110.0
"""Seconds that a job may take; far above what a healthy one needs."""


def run_job(job: str, root: Path) -> dict[str, Any]:
    """Run ``job`` in a process of its own and give what it found: name -> result, or text of its failure."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.training_jobs", job, str(root)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = torch.load(_outcome(job, root), weights_only=False)
    return found


def _outcome(job: str, root: Path) -> Path:
    return root.parent / f"{root.name}.{job}.pt"


def resume_optimizers(root: Path) -> dict[str, Any]:
    """Each case loads its own part of the checkpoint into freshly built objects and goes on."""
    found: dict[str, Any] = {}
    trainers = {case: Trainer(case, seed=2) for case in CASES}
    with CheckpointEngine(root) as engine:
        try:
            engine.load({case: trainer.state for case, trainer in trainers.items()})
        except CheckpointError:  # of one case, which must not take the others with it
            for case in CASES:
                trainers[case] = Trainer(case, seed=2)
                try:
                    engine.load({case: trainers[case].state})
                except CheckpointError:
                    found[case] = traceback.format_exc()
    for case in CASES:
        if case not in found:
            trainers[case].step(3)
            found[case] = trainers[case].picture()
    return found


async def _metadata(info: CheckpointInfo) -> Metadata:
    return await info.metadata()


def swap_wrappers(root: Path) -> dict[str, Any]:
    """Save a run of each kind and load it into a run of each other one; at least one of the two is DDP's.

    Gives "<saved> into <loaded>" -> (names in the checkpoint, the uninterrupted run, the resumed one).
    """
    found: dict[str, Any] = {}
    kinds = {**WRAPPERS, **DISTRIBUTED}
    with world_of_one(), CheckpointEngine(root) as engine:
        for saved in kinds:
            whole = WrappedRun(1, saved)
            whole.step(2)
            state = {**whole.app, "rng": RNGState()}
            info = engine.save(state, checkpoint_id=saved).upload_completion.result(PATIENCE)
            names = set(asyncio.run(_metadata(info)).state_dict_metadata)
            whole.step(2)
            for loaded in kinds:
                if saved in DISTRIBUTED or loaded in DISTRIBUTED:
                    resumed = WrappedRun(2, loaded)
                    try:
                        engine.load({**resumed.app, "rng": RNGState()}, saved)
                        resumed.step(2)
                    except Exception:  # what went wrong with one pair is shown by its own test
                        found[f"{saved} into {loaded}"] = traceback.format_exc()
                    else:
                        found[f"{saved} into {loaded}"] = (names, whole.picture(), resumed.picture())
    return found


JOBS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "resume_optimizers": resume_optimizers,
    "swap_wrappers": swap_wrappers,
}


def main() -> None:
    job, root = sys.argv[1], Path(sys.argv[2])
    torch.save(JOBS[job](root), _outcome(job, root))


if __name__ == "__main__":
    main()
