"""Thousands of saves of a state that changes, with retention on: nothing may grow that need not.

`python -m tests.faults.soak --saves 2000` prints what the process and the root hold after each tenth of them
and ends with status 1 if any of it is more for good than in the first tenth; `--csv FILE` keeps every sample,
for a chart. Before that it replaces a checkpoint under readers for some `--minutes` (replace_race.py).
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dcp_async import KeepLatest, StagingOptions
from dcp_async.sync import CheckpointEngine
from tests.faults import replace_race
from tests.faults.states import flat
from tests.support.doubles import open_descriptors

KEEP = 3
SAMPLES = 100
PRINTED = 10
STAGING = StagingOptions(part_bytes=1 << 18, budget_bytes=4 << 20)
SIZES = (3, 1_000, 70_000, 250_000)
RSS_SLACK = 24 << 20
"""What an allocator may keep more of at one moment than at another; 2,000 saves write 100 times that."""
DISK_LIMIT = KEEP * (4 * sum((*SIZES, 21_000, 5_000)) + (128 << 10))
"""Bytes of so many of the largest states, each with some room for the format."""
PATIENCE = 60.0


class Sample(NamedTuple):
    """What is held after a number of saves, when nothing is under way."""

    saves: int
    seconds: float
    descriptors: int
    threads: int
    rss: int
    checkpoints: int
    files: int
    disk: int


def state(number: int) -> dict[str, Any]:
    """Other values each time, and now and then other names, shapes and dtypes: plans can't be kept for good,
    and the sizes come back."""
    turn = number % 7
    tensors = {f"w{size}": torch.full((size,), float(number)) for size in SIZES}
    tensors[f"extra{turn}"] = torch.full((1_000 * (1 + turn), 3), number, dtype=torch.int32)
    tensors["half"] = torch.full((5_000,), float(turn), dtype=torch.bfloat16 if turn % 2 else torch.float16)
    return {"model": tensors, "step": number, "said": "x" * (100 * turn)}


def until_removed(root: Path) -> None:
    """Retention removes in the background, and nothing tells when it is done but what is there and open."""
    deadline = time.monotonic() + PATIENCE
    while len(os.listdir(root)) > KEEP or is_open(root):
        if time.monotonic() > deadline:
            return  # the sample shows it
        time.sleep(0.001)


def is_open(root: Path) -> bool:
    return any(path.startswith(str(root)) for path in open_descriptors().values())


def sample(root: Path, saves: int, began: float) -> Sample:
    entries = [path for path in root.rglob("*") if path.is_file()]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        saves=saves,
        seconds=round(time.monotonic() - began, 2),
        descriptors=len(open_descriptors()),
        threads=threading.active_count(),
        rss=pages * os.sysconf("SC_PAGE_SIZE"),
        checkpoints=sum(path.name == ".metadata" for path in entries),
        files=len(entries),
        disk=sum(path.stat().st_size for path in entries),
    )


def save_on_end(root: Path, saves: int) -> Iterator[Sample]:
    """Samples after each hundredth of the saves, with the engine idle and open."""
    began = time.monotonic()
    with CheckpointEngine(root, staging=STAGING, retention=KeepLatest(KEEP)) as engine:
        for number in range(1, saves + 1):
            response = engine.save(state(number), step=number)
            if number % max(1, saves // SAMPLES) == 0:
                response.upload_completion.result(PATIENCE)
                engine.wait()
                until_removed(root)
                yield sample(root, number, began)
        assert flat(engine.read()) == flat(state(saves)), "the newest is not what was saved last"


def growth(samples: Sequence[Sample]) -> list[str]:
    """What is held more of than in the first tenth of the samples, in words.

    Of each later tenth the least is judged: what grew stays, and a call that is under way does not.
    """
    tenth = max(1, len(samples) // 10)
    most = Sample(*map(max, zip(*samples[:tenth], strict=True)))
    limits = {
        "descriptors": most.descriptors,
        "threads": most.threads,
        "rss": most.rss + RSS_SLACK,
        "checkpoints": KEEP,
        "files": most.files,
        "disk": DISK_LIMIT,
    }
    found = []
    for start in range(tenth, len(samples), tenth):
        least = Sample(*map(min, zip(*samples[start : start + tenth], strict=True)))
        found += [
            f"from {least.saves} saves on: {name} {getattr(least, name):,}, over {limit:,}"
            for name, limit in limits.items()
            if getattr(least, name) > limit
        ]
    return found


def soak(root: Path, saves: int, table: Path | None) -> list[str]:
    """Saves, and prints the samples as they come. Gives what has grown."""
    samples = []
    sys.stdout.write(" ".join(f"{name:>12}" for name in Sample._fields) + "\n")
    for each in save_on_end(root, saves):
        samples.append(each)
        if len(samples) % (SAMPLES // PRINTED) == 0:
            sys.stdout.write(" ".join(f"{value:>12,}" for value in each) + "\n")
            sys.stdout.flush()
    if table is not None:
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([Sample._fields, *samples])
    return growth(samples)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--saves", type=int, default=2_000, help="0: none")
    parser.add_argument("--csv", type=Path, help="where the samples go as well")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the race before; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where; a new folder for temporary files by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # the race first: it forks, and must find no thread here
    status = replace_race.run(options.minutes, options.seed, options.dir) if options.minutes else 0
    if options.saves:
        root = Path(tempfile.mkdtemp(prefix="soak-", dir=options.dir))
        try:
            grown = soak(root, options.saves, options.csv)
        finally:
            shutil.rmtree(root, ignore_errors=True)
        sys.stdout.write("".join(f"{words}\n" for words in grown) or "nothing has grown\n")
        status = status or bool(grown)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
