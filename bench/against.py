"""What did a change cost: this tree's package beside that of another revision, in one run.

Run as `python3 noxfile.py bench against REVISION`, or `python -m bench.against REVISION`. Both packages are
driven by this tree's bench, each in a process of its own, and are asked for samples in turn; the first save
of each is shown apart, since it makes the plan and touches the memory. Writes against.json and prints, for
each figure, both medians and the median of the ratios of each round, which drifts of the machine leave alone.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import cli, reporting
from .engines import OURS
from .measuring import ROOT, Child, Group, machine_facts, progress, running

BEFORE, AFTER = "before", "after"
FIGURES = ("first_staged", "first_durable", "staged", "durable", "cold", "warm")
SLOWER = 1.03
"""A median ratio above this is marked."""


def check_out(revision: str, directory: Path, *, repository: Path = ROOT) -> Path:
    """The package of a revision, in a folder of ``directory``; the repository is left as it was."""
    tree = directory / "tree"
    tree.mkdir()
    # The package and no more: a bench of then would be found before this one.
    archive = ["git", "-C", str(repository), "archive", revision, "dcp_async"]
    with subprocess.Popen(archive, stdout=subprocess.PIPE) as packed:
        unpacked = subprocess.run(["tar", "-x", "-C", str(tree)], stdin=packed.stdout)
    if packed.returncode or unpacked.returncode:
        raise SystemExit(f"{revision!r} could not be taken out of the repository")
    return tree


def measure(workload: str, trees: Mapping[str, Path], rounds: int, directory: Path) -> Group:
    """All samples of one workload."""
    both = list(trees)
    children = (
        Child(OURS, workload, 1.0, directory, label=label, tree=tree) for label, tree in trees.items()
    )
    with running(children) as group:
        group.take("first", prefix="first_", only=both)
        for round_ in range(rounds):
            group.take("save", rotate=round_, only=both)
        group.take("prepare_load", only=both)
        for round_ in range(rounds):
            group.take_loads(round_, only=both)
        group.fail_wrong()
    return group


def ratio(before: Sequence[float], after: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(new / old for old, new in zip(before, after, strict=True))


def table(samples: Mapping[str, Mapping[str, Mapping[str, list[Any]]]]) -> str:
    """A line per workload and figure."""
    lines = [f"{'workload':9} {'figure':14} {'before':>9} {'after':>9} {'ratio':>6}  n"]
    for workload, sides in samples.items():
        for figure in FIGURES:
            before, after = sides[BEFORE][figure], sides[AFTER][figure]
            change = ratio(before, after)
            mark = "  <-" if change > SLOWER else ""
            medians = " ".join(f"{statistics.median(values):8.3f}s" for values in (before, after))
            lines.append(f"{workload:9} {figure:14} {medians} {change:6.3f}  {len(after)}{mark}")
    return "\n".join(lines)


def main() -> int:
    parser = cli.parser(__doc__)
    cli.add_directory(parser)
    parser.add_argument("revision", help="what this tree is compared with, as git names it")
    parser.add_argument("--workloads", default="large,many", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    given = parser.parse_args()
    with cli.scratch(given.dir) as directory:
        tree = check_out(given.revision, directory)
        data: reporting.Data = {"kind": "against", "version": 1, "machine": machine_facts(directory)}
        data |= {"revision": given.revision, "rounds": given.rounds, "samples": {}, "failures": {}}
        for workload in given.workloads.split(","):
            progress(f"{workload}: {given.rounds} rounds")
            below = directory / workload
            below.mkdir()
            group = measure(workload, {BEFORE: tree, AFTER: ROOT}, given.rounds, below)
            data["samples" if not group.failures else "failures"][workload] = group.failures or group.samples
            reporting.write(data, given.out / "against.json")
    print(table(data["samples"]))
    return cli.exit_status(f"{workload}: {failures}" for workload, failures in data["failures"].items())


if __name__ == "__main__":
    sys.exit(main())
