"""How does the cost of a checkpoint grow with its bytes, its number of tensors, and the number of ranks?

Run as `python3 noxfile.py bench growth`, or `python -m bench.growth`. Three sweeps: 64 equal tensors of
64 MiB to 8 GiB in all, 10 to 200,000 equal tensors of 256 MiB in all, and 1,000 tensors of 256 MiB cut over 1
to 4 ranks. For each point ours, and stock DCP beside it for as long as a save or load of stock can be
expected to take less than 15 seconds. Writes growth.json after each point, with the least-squares line of
every curve, then growth.md and growth.png; `report.py` makes the same again from the JSON.
Belongs here: points and rounds. Not here: lines and pictures (curves.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .engines.roster import OURS, memory_needed
from .measuring import machine as facts
from .measuring.processes import ROOT, Group, progress, running, short_reason
from .reporting import curves, results
from .run import scratch

STOCK = "stock"
SWEEP_TENSORS = 64
SWEEP_BYTES = 256 << 20
BYTES = tuple(mib << 20 for mib in (64, 256, 1024, 2048, 4096, 8192))
TENSORS = (10, 100, 1_000, 10_000, 20_000, 50_000, 100_000, 200_000)
RANKS = (1, 2, 4)
RANKS_TENSORS = 1_000
RANKS_SECONDS = 600.0
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


def expected(found: Sequence[Mapping[str, Any]], sweep: str, engine: str, size: int) -> float:
    """Seconds of the slowest call at `size`, if it grows as the sweep does: from its last point."""
    for point in reversed(found):
        if point["sweep"] == sweep and engine in point["samples"]:
            samples = point["samples"][engine]
            slowest = max(max(samples.get(figure, [0.0])) for figure in ("durable", "cold", "warm"))
            return float(slowest * size / point[curves.SIZES[sweep]])
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


def over_ranks(num_ranks: int, nbytes: int, directory: Path) -> dict[str, Any]:
    """The point of one number of ranks: as many processes of ranks.py, which meet on the loopback."""
    directory.mkdir(parents=True)
    answer = directory / "samples.json"
    given = {
        "num_tensors": RANKS_TENSORS,
        "nbytes": nbytes,
        "rounds": ROUNDS,
        "root": str(directory),
        "answer": str(answer),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
    }
    command = [sys.executable, "-P", "-m", "bench.measuring.ranks", json.dumps(given)]
    log = directory / "ranks.log"
    with log.open("wb") as output:
        processes = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=output, stderr=output)
            for rank in range(num_ranks)
        ]
    point = {"sweep": "ranks", "num_ranks": num_ranks, "num_tensors": RANKS_TENSORS, "nbytes": nbytes}
    try:
        statuses = [process.wait(RANKS_SECONDS) for process in processes]
    except subprocess.TimeoutExpired:
        statuses = [-1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(statuses):
        text = log.read_text(encoding="utf-8", errors="replace")
        progress(text)
        return {**point, "samples": {}, "failures": {OURS: short_reason(text)}}
    return {**point, "samples": json.loads(answer.read_text(encoding="ascii")), "failures": {}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-mib", type=int, default=BYTES[-1] >> 20, help="largest state (8192)")
    parser.add_argument("--max-tensors", type=int, default=TENSORS[-1], help="most tensors (200000)")
    parser.add_argument("--max-ranks", type=int, default=RANKS[-1], help="most ranks (4); 0: no such sweep")
    parser.add_argument(
        "--sweeps", default=",".join(curves.SIZES), help="others stay as the file has them (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="default: %(default)s")
    parser.add_argument("--dir", type=Path, help="where checkpoints go (a temporary folder of this one)")
    given = parser.parse_args()
    given.sweeps = given.sweeps.split(",")
    if unknown := set(given.sweeps) - set(curves.SIZES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(curves.SIZES)}")
    return given


def run(given: argparse.Namespace, directory: Path, path: Path) -> curves.Data:
    """Measure every point; the file at `path` is whole after each."""
    data: curves.Data = {"kind": "growth", "version": 1, "machine": facts.machine(directory), "points": []}
    if path.exists() and set(given.sweeps) != set(curves.SIZES):
        kept = json.loads(path.read_text(encoding="ascii"))
        data["points"] = [point for point in kept["points"] if point["sweep"] not in given.sweeps]
        data["engines"] = kept["engines"]
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
        point: dict[str, Any] = {"sweep": sweep, "num_ranks": 1, "num_tensors": num_tensors, "nbytes": nbytes}
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
        keep(data, point, path)
    for num_ranks in (num for num in RANKS if num <= given.max_ranks and "ranks" in given.sweeps):
        progress(f"{num_ranks} ranks")
        below = directory / f"ranks-{num_ranks}"
        keep(data, over_ranks(num_ranks, min(SWEEP_BYTES, given.max_mib << 20), below), path)
        shutil.rmtree(below)
    return data


def keep(data: curves.Data, point: dict[str, Any], path: Path) -> None:
    """Add a point, and replace the file by one that has it."""
    data["points"].append(point)
    data["fits"] = curves.fits(data)
    results.write(data, path)


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
