"""Saves of a changing state with retention on, thousands of them: nothing of the process or the root grows.

`python tests/faults/retention_soak.py --saves 2000` prints a chart and ends with status 1 if anything does;
the test beside it takes some dozens.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dcp_async import KeepBest, KeepLatest, StagingOptions
from dcp_async.sync import CheckpointEngine

STAGING = StagingOptions(part_bytes=1 << 18, budget_bytes=1 << 21)
POLICY = KeepLatest(3) | KeepBest("loss", 2)
LOOKS = 40
"""How often it is measured."""


@dataclass(frozen=True)
class Look:
    saves: int
    descriptors: int
    threads: int
    resident_kib: int
    checkpoints: int
    root_kib: int


def look(root: Path, saves: int) -> Look:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    sizes = [path.stat().st_size for path in root.rglob("*") if path.is_file()]
    return Look(
        saves=saves,
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        resident_kib=pages * os.sysconf("SC_PAGE_SIZE") >> 10,
        checkpoints=len(list(root.glob("*/.metadata"))),
        root_kib=sum(sizes) >> 10,
    )


def soak(root: Path, saves: int) -> Iterator[Look]:
    """A look after every so many saves, when what they made to go has gone: each life closes its engine."""
    state: dict[str, Any] = {"w": torch.zeros(250_000), "many": [torch.zeros(100) for _ in range(50)], "n": 0}
    every = max(saves // LOOKS, 1)
    for first in range(0, saves, every):
        with CheckpointEngine(root, staging=STAGING, retention=POLICY) as engine:
            for step in range(first, min(first + every, saves)):
                torch.add(state["w"], 1, out=state["w"])
                state["n"] = step
                engine.save(state, step=step, notes={"loss": (step * 37) % 101})
        yield look(root, min(first + every, saves))


def grown(looks: list[Look]) -> list[str]:
    """What was more in the second half than it had been in the first: threads of a closed engine may end a
    moment late."""
    half = len(looks) // 2
    slacks = {
        "descriptors": 10,
        "threads": 2,
        "resident_kib": 32 << 10,
        "checkpoints": 2,
        "root_kib": 4 << 10,
    }
    most = {
        name: [max(getattr(entry, name) for entry in part) for part in (looks[:half], looks[half:])]
        for name in slacks
    }
    return [
        f"{name}: {early} -> {late}" for name, (early, late) in most.items() if late > early + slacks[name]
    ]


def chart(looks: list[Look]) -> str:
    rows = [f"{'saves':>6} {'fds':>5} {'threads':>7} {'RSS MiB':>8} {'ckpts':>5} {'root MiB':>8}"]
    top = max(entry.resident_kib for entry in looks)
    for entry in looks:
        bar = "#" * (entry.resident_kib * 40 // top)
        rows.append(
            f"{entry.saves:6} {entry.descriptors:5} {entry.threads:7} {entry.resident_kib / 1024:8.1f} "
            f"{entry.checkpoints:5} {entry.root_kib / 1024:8.1f}  {bar}"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=2000)
    with tempfile.TemporaryDirectory() as scratch:
        looks = list(soak(Path(scratch, "run"), parser.parse_args().saves))
    sys.stdout.write("\n".join([chart(looks), *(f"grew: {what}" for what in grown(looks)), ""]))
    return 1 if grown(looks) else 0


if __name__ == "__main__":
    sys.exit(main())
