"""How does the cost of a checkpoint grow with its bytes, its number of tensors, and the number of ranks?

Run as `python3 noxfile.py bench growth`, or `python -m bench.growth`. Three sweeps: 64 equal tensors of
64 MiB to 8 GiB in all, 10 to 200,000 equal tensors of 256 MiB in all, and 1,000 tensors of 256 MiB cut over 1
to 4 ranks. For each point ours, and stock DCP beside it for as long as a save or load of stock can be
expected to take less than 15 seconds. Writes growth.json after each point, with the least-squares line of
every curve, then growth.md and growth.png; `bench.report` makes the same again from the JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import cli, reporting
from .engines import OURS, STOCK, memory_needed
from .measuring import (
    Child,
    Group,
    WorkerError,
    machine_facts,
    memory_available,
    progress,
    run_ranks,
    running,
    short_reason,
)

SWEEP_TENSORS = 64
SWEEP_BYTES = 256 << 20
BYTES = tuple(mib << 20 for mib in (64, 256, 1024, 2048, 4096, 8192))
TENSORS = (10, 100, 1_000, 10_000, 20_000, 50_000, 100_000, 200_000)
RANKS = (1, 2, 4)
RANKS_TENSORS = 1_000
ROUNDS = 3
SLOW_SECONDS = 10.0
"""From here on one round has to do."""
LONGEST_SECONDS = 15.0


def points(given: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Sweep, number of tensors, bytes of every point."""
    most_bytes, most_tensors = given.max_mib << 20, given.max_tensors
    every = [
        *(("bytes", SWEEP_TENSORS, nbytes) for nbytes in BYTES if nbytes <= most_bytes),
        *(("tensors", num, min(SWEEP_BYTES, most_bytes)) for num in TENSORS if num <= most_tensors),
    ]
    return [point for point in every if point[0] in given.sweeps]


def expected(earlier: Sequence[Mapping[str, Any]], sweep: str, engine: str, size: int) -> float:
    """Seconds of the slowest call at `size`, if it grows as the sweep does: from its last point."""
    for point in reversed(earlier):
        if point["sweep"] == sweep and engine in point["samples"]:
            samples = point["samples"][engine]
            slowest = max(max(samples.get(figure, [0.0])) for figure in ("durable", "cold", "warm"))
            return float(slowest * size / point[reporting.SIZES[sweep]])
    return 0.0


def measure(group: Group, rounds: Mapping[str, int]) -> None:
    """All samples of one point."""
    group.take("first", prefix="first_", only=group.engines())
    for round_ in range(ROUNDS):
        now = [engine for engine in group.engines() if round_ < rounds[engine]]
        group.take("save", rotate=round_, only=now)
    # not in turn with the saves: one that follows another structure makes its plan anew
    for _ in range(rounds[OURS]):
        group.take("replan", prefix="replan_", only=[OURS])
    group.take("prepare_load", only=group.engines())
    for round_ in range(ROUNDS):
        now = [engine for engine in group.engines() if round_ < rounds[engine]]
        group.take_loads(round_, only=now)
    group.fail_wrong()


def groups(engines: Sequence[str], nbytes: int, room: int) -> list[list[str]]:
    """Side by side if memory allows, one after the other if not; who does not fit at all is left out."""
    if memory_needed(engines, nbytes) <= room:
        return [list(engines)]
    return [[engine] for engine in engines if memory_needed([engine], nbytes) <= room]


def over_ranks(num_ranks: int, nbytes: int, directory: Path) -> dict[str, Any]:
    """The point of one number of ranks."""
    point = {"sweep": "ranks", "num_ranks": num_ranks, "num_tensors": RANKS_TENSORS, "nbytes": nbytes}
    given = {"num_tensors": RANKS_TENSORS, "nbytes": nbytes, "rounds": ROUNDS}
    try:
        return {**point, "samples": run_ranks("sharded_ranks", num_ranks, given, directory), "failures": {}}
    except WorkerError as error:
        progress(str(error))
        return {**point, "samples": {}, "failures": {OURS: short_reason(str(error))}}


def on_one_rank(
    sweep: str, num_tensors: int, nbytes: int, earlier: Sequence[Mapping[str, Any]], directory: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The point of one state, and the facts of each engine that was measured at it."""
    size = nbytes if sweep == "bytes" else num_tensors
    seconds = {engine: expected(earlier, sweep, engine, size) for engine in (OURS, STOCK)}
    rounds = {engine: ROUNDS if seconds[engine] < SLOW_SECONDS else 1 for engine in seconds}
    engines = [OURS, STOCK] if seconds[STOCK] < LONGEST_SECONDS else [OURS]
    point: dict[str, Any] = {"sweep": sweep, "num_ranks": 1, "num_tensors": num_tensors, "nbytes": nbytes}
    point |= {"samples": {}, "failures": {}}
    facts: dict[str, Any] = {}
    for names in groups(engines, nbytes, int(memory_available() * 0.85)):
        progress(f"{num_tensors} tensors, {nbytes >> 20} MiB: {', '.join(names)}")
        with running(Child(name, f"grid:{num_tensors}x{nbytes}", 1.0, directory) for name in names) as group:
            measure(group, rounds)
        facts |= group.facts
        point["samples"] |= group.samples
        point["failures"] |= group.failures
        shutil.rmtree(directory)
    return point, facts


def parse() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    cli.add_directory(parser)
    parser.add_argument("--max-mib", type=int, default=BYTES[-1] >> 20, help="largest state (8192)")
    parser.add_argument("--max-tensors", type=int, default=TENSORS[-1], help="most tensors (200000)")
    parser.add_argument("--max-ranks", type=int, default=RANKS[-1], help="most ranks (4); 0: no such sweep")
    parser.add_argument(
        "--sweeps", default=",".join(reporting.SIZES), help="others stay as the file has them (%(default)s)"
    )
    given = parser.parse_args()
    given.sweeps = given.sweeps.split(",")
    if unknown := set(given.sweeps) - set(reporting.SIZES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(reporting.SIZES)}")
    return given


def run(given: argparse.Namespace, directory: Path, path: Path) -> reporting.Data:
    """Measure every point; the file at `path` is whole after each."""
    data: reporting.Data = {"kind": "growth", "version": 1, "machine": machine_facts(directory), "points": []}
    if path.exists() and set(given.sweeps) != set(reporting.SIZES):
        kept = json.loads(path.read_text(encoding="ascii"))
        data["points"] = [point for point in kept["points"] if point["sweep"] not in given.sweeps]
        data["engines"] = kept["engines"]
    for number, (sweep, num_tensors, nbytes) in enumerate(points(given)):
        below = directory / str(number)
        point, facts = on_one_rank(sweep, num_tensors, nbytes, data["points"], below)
        for engine, fact in facts.items():
            data["machine"] |= {"torch": fact["torch"], "torch_threads": fact["threads"]}
            data.setdefault("engines", {})[engine] = fact["call"]
        keep(data, point, path)
    for num_ranks in (num for num in RANKS if num <= given.max_ranks and "ranks" in given.sweeps):
        progress(f"{num_ranks} ranks")
        below = directory / f"ranks-{num_ranks}"
        keep(data, over_ranks(num_ranks, min(SWEEP_BYTES, given.max_mib << 20), below), path)
        shutil.rmtree(below)
    return data


def keep(data: reporting.Data, point: dict[str, Any], path: Path) -> None:
    """Add a point, and replace the file by one that has it."""
    data["points"].append(point)
    data["fits"] = reporting.fits(data)
    reporting.write(data, path)


def main() -> int:
    given = parse()
    path = given.out / "growth.json"
    with cli.scratch(given.dir) as directory:
        data = run(given, directory, path)
    print(reporting.write_all(data, given.out))
    progress(f"written: {path}, growth.md and growth.png beside it")
    return cli.exit_status(
        f"{engine}: {reason}" for point in data["points"] for engine, reason in point["failures"].items()
    )


if __name__ == "__main__":
    sys.exit(main())
