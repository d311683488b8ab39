"""How does the cost of a checkpoint grow with its bytes, and with its number of tensors?

Run as `python3 noxfile.py bench growth`, or `python bench/growth.py`. Two sweeps: 64 equal tensors of
64 MiB to 8 GiB in all, and 10 to 200,000 equal tensors of 256 MiB in all. For each point ours, and stock DCP
beside it for as long as a save or load of stock can be expected to take less than a minute. Writes
growth.json after each point, with the least-squares line of every curve, then growth.md and growth.png;
`report.py` makes the same again from the JSON.
Belongs here: points and rounds. Not here: lines and pictures (curves.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import curves
import facts
from driver import Group, progress, running
from roster import OURS, memory_needed
from run import scratch

STOCK = "stock"
SWEEP_TENSORS = 64
SWEEP_BYTES = 256 << 20
BYTES = tuple(mib << 20 for mib in (64, 256, 1024, 2048, 4096, 8192))
TENSORS = (10, 100, 1_000, 10_000, 20_000, 50_000, 100_000, 200_000)
ROUNDS = 3
SLOW_SECONDS = 10.0
"""From here on one round has to do."""
LONGEST_SECONDS = 60.0


def points(given: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Sweep, number of tensors, bytes of every point."""
    most_bytes, most_tensors = given.max_mib << 20, given.max_tensors
    return [
        *(("bytes", SWEEP_TENSORS, nbytes) for nbytes in BYTES if nbytes <= most_bytes),
        *(("tensors", num, min(SWEEP_BYTES, most_bytes)) for num in TENSORS if num <= most_tensors),
    ]


def expected(found: Sequence[Mapping[str, Any]], sweep: str, engine: str, size: int) -> float:
    """Seconds of the slowest call at `size`, if it grows as the sweep does: from its last point."""
    for point in reversed(found):
        if point["sweep"] == sweep and engine in point["samples"]:
            samples = point["samples"][engine]
            slowest = max(max(samples.get(figure, [0.0])) for figure in ("durable", "cold", "warm"))
            return float(slowest * size / point["nbytes" if sweep == "bytes" else "num_tensors"])
    return 0.0


def measure(group: Group, rounds: Mapping[str, int]) -> None:
    """All samples of one point."""
    group.take("first", prefix="first_", only=group.engines())
    for round_ in range(ROUNDS):
        now = [engine for engine in group.engines() if round_ < rounds[engine]]
        group.take("save", rotate=round_, only=now)
        group.take("replan", prefix="replan_", only=[engine for engine in now if engine == OURS])
    group.take("prepare_load", only=group.engines())
    for round_ in range(ROUNDS):
        now = [engine for engine in group.engines() if round_ < rounds[engine]]
        for cold in (True, False):
            group.take("load", rotate=round_, only=now, cold=cold)
    for engine, figures in list(group.samples.items()):
        if sum(figures.get("num_different", ())):
            group.fail(engine, "what was loaded differs from what was saved")


def groups(engines: Sequence[str], nbytes: int, room: int) -> list[list[str]]:
    """Side by side if memory allows, one after the other if not; who does not fit at all is left out."""
    if memory_needed(engines, nbytes) <= room:
        return [list(engines)]
    return [[engine] for engine in engines if memory_needed([engine], nbytes) <= room]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-mib", type=int, default=BYTES[-1] >> 20, help="largest state (8192)")
    parser.add_argument("--max-tensors", type=int, default=TENSORS[-1], help="most tensors (200000)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="default: %(default)s")
    parser.add_argument("--dir", type=Path, help="where checkpoints go (a temporary folder of this one)")
    return parser.parse_args()


def run(given: argparse.Namespace, directory: Path, path: Path) -> curves.Data:
    """Measure every point; the file at `path` is whole after each."""
    data: curves.Data = {"kind": "growth", "version": 1, "machine": facts.machine(directory), "points": []}
    started = time.monotonic()
    for number, (sweep, num_tensors, nbytes) in enumerate(points(given)):
        size = nbytes if sweep == "bytes" else num_tensors
        found = data["points"]
        rounds = {
            engine: ROUNDS if expected(found, sweep, engine, size) < SLOW_SECONDS else 1
            for engine in (OURS, STOCK)
        }
        engines = [OURS]
        if expected(found, sweep, STOCK, size) < LONGEST_SECONDS:
            engines.append(STOCK)
        point: dict[str, Any] = {"sweep": sweep, "num_tensors": num_tensors, "nbytes": nbytes}
        point |= {"samples": {}, "failures": {}}
        for place, names in enumerate(groups(engines, nbytes, int(facts.memory_available() * 0.85))):
            progress(f"{num_tensors} tensors, {nbytes >> 20} MiB: {', '.join(names)}")
            below = directory / f"{number}-{place}"
            with running(names, f"grid:{num_tensors}x{nbytes}", 1.0, below) as group:
                measure(group, rounds)
            for engine, fact in group.facts.items():
                data["machine"] |= {"torch": fact["torch"], "torch_threads": fact["threads"]}
                data.setdefault("engines", {})[engine] = fact["call"]
            point["samples"] |= group.samples
            point["failures"] |= group.failures
            shutil.rmtree(below)
        found.append(point)
        data["fits"] = curves.fits(data)
        data["seconds_taken"] = round(time.monotonic() - started)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".tmp")
        fresh.write_text(json.dumps(data, indent=1) + "\n", encoding="ascii")
        os.replace(fresh, path)
    return data


def main() -> int:
    given = parse()
    path = given.out / "growth.json"
    with scratch(given.dir or Path.cwd()) as directory:
        data = run(given, directory, path)
    print(curves.write_all(data, given.out))
    progress(f"written: {path}, growth.md and growth.png beside it")
    failed = [
        f"{engine}: {reason}" for point in data["points"] for engine, reason in point["failures"].items()
    ]
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
