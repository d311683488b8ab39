"""One writer that replaces a checkpoint as fast as it can, and is killed now and then, against readers.

`python tests/faults/replace_race.py --minutes 30` prints what each process did and ends with status 1 if
anybody was told of an error or of an older checkpoint: all the time a whole one is there. `nox -s soak` runs
it for long, the test beside it for some seconds. Every process is a fork of this one, which has no threads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

from dcp_async import CheckpointEngine, StagingOptions

NUMEL = (3, 1_000, 250_000)
STAGING = StagingOptions(part_bytes=1 << 18, budget_bytes=1 << 21)
WRITER_LIVES = (0.0, 2.0)
"""Seconds: the least and the most that a writer is let live after its first save."""


def state(version: int) -> dict[str, Any]:
    tensors = {f"w{count}": torch.full((count,), float(version)) for count in NUMEL}
    return {"model": tensors, "version": version}


def check(found: dict[str, Any]) -> None:
    version = found["version"]
    for count in NUMEL:
        if not torch.equal(found["model"][f"w{count}"], torch.full((count,), float(version))):
            raise AssertionError(f"a mixture: not all of it is of version {version}")


async def write(root: Path, until: float, tally: Path) -> None:
    """Saves until it ends or is killed; ``tally`` grows by a byte with each save."""
    async with CheckpointEngine(root, staging=STAGING) as engine:
        version = time.monotonic_ns() % (1 << 20)
        with tally.open("ab", buffering=0) as count:
            while time.monotonic() < until:
                version += 1
                await engine.save(state(version), checkpoint_id="best", step=100, replace=True)
                count.write(b".")


async def load_latest(engine: CheckpointEngine) -> None:
    target = state(-1)
    report = await engine.load(target)
    check(target)
    assert (report.checkpoint_id, report.skipped) == ("best", ()), report


async def load_by_name(engine: CheckpointEngine) -> None:
    target = state(-1)
    await engine.load(target, "best")
    check(target)


async def load_by_step(engine: CheckpointEngine) -> None:
    target = state(-1)
    assert (await engine.load(target, 100)).checkpoint_id == "best"
    check(target)


async def read(engine: CheckpointEngine) -> None:
    check(await engine.read())


async def latest(engine: CheckpointEngine) -> None:
    info = await engine.latest()
    assert info is not None, "None"
    assert info.checkpoint_id == "best", info


async def metadata(engine: CheckpointEngine) -> None:
    info = await engine.latest()
    assert info is not None, "None"
    found = await info.metadata()
    assert len(found.state_dict_metadata) == len(NUMEL) + 1


async def listing(engine: CheckpointEngine) -> None:
    names = [info.checkpoint_id async for info in engine.checkpoints()]
    assert names == ["old", "best"], names


READING = (load_latest, load_by_name, load_by_step, read, metadata, listing)


async def ask(
    root: Path,
    until: float,
    rng: random.Random,
    counts: Counter[str],
    verbs: tuple[Callable[[CheckpointEngine], Awaitable[None]], ...],
    failures: list[str],
) -> None:
    async with CheckpointEngine(root) as engine:
        asked = 0
        while asked < len(verbs) or time.monotonic() < until:  # each once, whatever the machine is busy with
            verb = verbs[asked] if asked < len(verbs) else rng.choice(verbs)
            asked += 1
            counts[verb.__name__] += 1
            try:
                await verb(engine)
            except Exception as error:
                failures.append(f"{verb.__name__}: {type(error).__name__}: {error}")


def fork(work: Callable[[], Awaitable[dict[str, Any]]], result: Path) -> int:
    """Run ``work`` in a child, which leaves what it gives in ``result``."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        result.write_text(json.dumps(asyncio.run(work())))  # type: ignore[arg-type]  # a coroutine, all are
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def seat(
    root: Path, results: Path, role: str, until: float, seed: int
) -> Callable[[], Awaitable[dict[str, Any]]]:
    async def work() -> dict[str, Any]:
        counts: Counter[str] = Counter()
        failures: list[str] = []
        rng = random.Random(f"{role} {seed}")
        if role == "writer":
            await write(root, until, results / "saves")
        else:
            verbs = READING if role.startswith("reader") else (latest,)
            await ask(root, until, rng, counts, verbs, failures)
        return {"counts": counts, "failures": failures}

    return work


async def prepare(root: Path) -> dict[str, Any]:
    async with CheckpointEngine(root) as engine:
        await engine.save(state(1), checkpoint_id="old", step=1)
        await engine.wait()
        await engine.save(state(2), checkpoint_id="best", step=100)
    return {}


def race(root: Path, results: Path, seconds: float, seed: int) -> tuple[Counter[str], list[str]]:
    rng = random.Random(seed)
    os.waitpid(fork(lambda: prepare(root), results / "prepare"), 0)
    until = time.monotonic() + seconds
    roles = [f"reader-{number}" for number in range(4)] + [f"poller-{number}" for number in range(2)]
    children = {fork(seat(root, results, role, until, seed), results / role): role for role in roles}
    writer = 0
    totals: Counter[str] = Counter()
    tally = results / "saves"
    tally.touch()

    def saves() -> int:
        return tally.stat().st_size

    try:
        while time.monotonic() < until:
            before = saves()
            writer = fork(seat(root, results, "writer", until, seed), results / "writer")
            while saves() == before and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(max(0.0, min(rng.uniform(*WRITER_LIVES), until - time.monotonic())))
            if time.monotonic() < until:
                os.kill(writer, signal.SIGKILL)
                totals["writers killed"] += 1
            os.waitpid(writer, 0)
            writer = 0
        totals["saves"] = saves()
        failures = []
        for pid, role in list(children.items()):
            _, status = os.waitpid(pid, 0)
            del children[pid]
            if status:
                failures.append(f"{role} ended with status {status}")
                continue
            told = json.loads((results / role).read_text())
            totals.update(told["counts"])
            failures += [f"{role}: {failure}" for failure in told["failures"]]
    finally:
        for pid in (*children, *([writer] if writer else [])):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return totals, failures


def run(minutes: float, seed: int, where: Path | None) -> int:
    """Race in a new folder and print how it went. Gives the status to end with."""
    place = Path(tempfile.mkdtemp(prefix="replace-race-", dir=where))
    (place / "results").mkdir()
    try:
        totals, failures = race(place / "run", place / "results", minutes * 60, seed)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for name, count in sorted(totals.items()):
        sys.stdout.write(f"{name:>16}: {count}\n")
    sys.stdout.write(f"{'failures':>16}: {len(failures)}\n")
    for failure, count in Counter(failures).most_common(20):
        sys.stdout.write(f"{count} x {failure}\n")
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where; a new folder for temporary files by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    return run(options.minutes, options.seed, options.dir)


if __name__ == "__main__":
    sys.exit(main())
