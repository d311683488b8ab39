"""What runs in a fresh process: a trainer that has nothing but a checkpoint, and what it ends up with.

Enters: a root with checkpoints. Leaves: whatever the job gives back.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from dcp_async import CheckpointError, CheckpointInfo, RNGState
from dcp_async.sync import CheckpointEngine
from tests.support.processes import PATIENCE, run_in_process
from tests.support.training_apps import DISTRIBUTED, WRAPPERS, WrappedRun, world_of_one
from tests.support.training_optimizers import CASES, Trainer


def run_job(job: str, root: Path) -> dict[str, Any]:
    """Run ``job`` in a process of its own and give what it found: name -> result, or text of its failure."""
    found: dict[str, Any] = run_in_process(JOBS[job], root)
    return found


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
