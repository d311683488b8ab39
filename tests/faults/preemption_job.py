"""A trainer on one rank or several that signals are sent to; in `JOBS` as "preempt".

In: which rank it is, how it goes about its steps. Out: a report of each step and event, the step that it was
told to stop at, and how that ended.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import dcp_async.sync
from dcp_async import Adaptive, CheckpointEngine, Every, PreemptionError, SavePolicy, StagingOptions

if TYPE_CHECKING:
    from tests.faults.jobs import Context

PART_BYTES = 64 << 10
ELEMENTS = 100_000
STOP = 100_000
"""More steps than any run takes until it is told to stop."""
POLICIES: dict[str, SavePolicy | None] = {
    "none": None,
    "steps": Every(steps=5),
    "seconds": Every(seconds=0.05),
    "both": Every(steps=50) | Adaptive(overhead=0.5),
}


class Run:
    """One rank's; the blocking engine and the other one go through the same steps."""

    def __init__(self, context: Context, rank: int, is_joint: bool, seed: int) -> None:
        self.line = context.line
        self.weights = torch.zeros(ELEMENTS)
        self.state: dict[str, Any] = {"weights": self.weights, "step": -1}
        self.told: list[int] = []
        self._is_joint = is_joint
        self._rng = random.Random(f"{seed} {rank}")

    def on_event(self, event: Any) -> None:
        self.line.report("event", event=type(event).__name__, step=event.step)

    def train_step(self, step: int) -> None:
        """By itself, or held up by the slowest of all ranks as training is."""
        self.weights.fill_(step)
        self.state["step"] = step
        # a rank that is slower at random: without this all would be at one step at all times
        time.sleep(self._rng.random() * 0.004)
        if self._is_joint:
            dist.all_reduce(torch.zeros(1))
        self.line.report("step", step=step)

    def ended(self, error: PreemptionError | None) -> None:
        self.line.report("ended", told=self.told, error=None if error is None else str(error))


def preempt(
    context: Context,
    *,
    root: str,
    rank: int,
    world: int,
    port: int,
    seed: int,
    grace: float,
    twin: str,
    policy: str,
    joint: bool,
) -> None:
    """Train until told to stop; with several ranks, rank 0 hosts the store and reports its port."""
    # a second signal may come behind the block, where it would end the process as it ends any other
    signal.signal(signal.SIGTERM, lambda signum, frame: None)
    if world > 1:
        store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0, wait_for_workers=False)
        context.line.report("serving", port=store.port)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    run = Run(context, rank, joint and world > 1, seed)
    options: dict[str, Any] = {
        "policy": POLICIES[policy],
        "observer": run,
        "staging": StagingOptions(part_bytes=PART_BYTES),
    }
    if twin == "sync":
        train_blocking(run, dcp_async.sync.CheckpointEngine(root, **options), grace)
    elif twin == "uvloop":
        import uvloop

        uvloop.run(train(run, CheckpointEngine(root, **options), grace))
    else:
        asyncio.run(train(run, CheckpointEngine(root, **options), grace))
    if world > 1:
        dist.destroy_process_group()


def train_blocking(run: Run, engine: dcp_async.sync.CheckpointEngine, grace: float) -> None:
    with engine:
        try:
            with engine.preemption(signal.SIGTERM, grace=grace):
                run.line.report("training")
                for step in range(STOP):
                    run.train_step(step)
                    if engine.should_save(step):
                        engine.save(run.state, step=step)
                    if engine.preempted:
                        run.told.append(step)
                        break
        except PreemptionError as error:
            run.ended(error)
        else:
            run.ended(None)


async def train(run: Run, engine: CheckpointEngine, grace: float) -> None:
    async with engine:
        try:
            async with engine.preemption(signal.SIGTERM, grace=grace):
                run.line.report("training")
                for step in range(STOP):
                    run.train_step(step)
                    if engine.should_save(step):
                        await engine.save(run.state, step=step)
                    if engine.preempted:
                        run.told.append(step)
                        break
        except PreemptionError as error:
            run.ended(error)
        else:
            run.ended(None)
