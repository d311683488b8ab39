"""What did a change cost: this tree's package beside that of another revision, in one run.

Run as `python3 noxfile.py bench against REVISION`, or `python -m bench.against REVISION`. Both packages are
driven by this tree's bench, each in a process of its own, and are asked for samples in turn; the first save
of each is shown apart, since it makes the plan and touches the memory. Writes against.json and prints, for
each figure, both medians and the median of the ratios of each round, which drifts of the machine leave alone.
Belongs here: which samples, in which order. Not here: how a figure is taken (sampling.py).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .engines.roster import OURS
from .measuring import machine as facts
from .measuring.processes import ROOT, Child, Group, progress
from .reporting import results
from .run import scratch

BEFORE, AFTER = "before", "after"
FIGURES = ("first_staged", "first_durable", "staged", "durable", "cold", "warm")
SLOWER = 1.03
"""A median ratio above this is marked."""


@contextmanager
def checkout(revision: str, directory: Path) -> Iterator[Path]:
    """The package of a revision, in a folder of ``directory``; the repository is left as it was."""
    tree = directory / "tree"
    tree.mkdir()
    packed = subprocess.Popen(
        ["git", "-C", str(ROOT), "archive", revision, "dcp_async"], stdout=subprocess.PIPE
    )
    unpacked = subprocess.run(["tar", "-x", "-C", str(tree)], stdin=packed.stdout)
    if packed.wait() or unpacked.returncode:
        raise SystemExit(f"{revision!r} could not be taken out of the repository")
    yield tree


def measure(workload: str, trees: Mapping[str, Path], rounds: int, directory: Path) -> Group:
    """All samples of one workload."""
    group = Group([])
    try:
        for label, tree in trees.items():
            group.children.append(Child(OURS, workload, 1.0, directory, label=label, tree=tree))
        for child in group.children:
            group.facts[child.engine] = child.ready()
        both = list(trees)
        group.take("first", prefix="first_", only=both)
        for round_ in range(rounds):
            group.take("save", rotate=round_, only=both)
        group.take("prepare_load", only=both)
        for round_ in range(rounds):
            for cold in (True, False):
                group.take("load", rotate=round_, only=both, cold=cold)
        for label, figures in list(group.samples.items()):
            if sum(figures.get("num_different", ())):
                group.fail(label, "what was loaded differs from what was saved")
    finally:
        for child in group.children:
            child.close()
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="what this tree is compared with, as git names it")
    parser.add_argument("--workloads", default="large,many", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="default: %(default)s")
    parser.add_argument("--dir", type=Path, help="where checkpoints go (a temporary folder of this one)")
    given = parser.parse_args()
    with scratch(given.dir or Path.cwd()) as directory, checkout(given.revision, directory) as tree:
        data: results.Data = {"kind": "against", "version": 1, "machine": facts.machine(directory)}
        data |= {"revision": given.revision, "rounds": given.rounds, "samples": {}, "failures": {}}
        for workload in given.workloads.split(","):
            progress(f"{workload}: {given.rounds} rounds")
            below = directory / workload
            below.mkdir()
            group = measure(workload, {BEFORE: tree, AFTER: ROOT}, given.rounds, below)
            data["samples" if not group.failures else "failures"][workload] = group.failures or group.samples
            results.write(data, given.out / "against.json")
    print(table(data["samples"]))
    for workload, failures in data["failures"].items():
        print(f"{workload}: {failures}", file=sys.stderr)
    return 1 if data["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
