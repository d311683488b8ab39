"""What does comparing replicas cost: DDP-like states on a few gloo ranks, each way of comparing in turn.

Run as `python3 noxfile.py bench replicas`, or `python -m bench.replicas --ranks 2,4`. Writes replicas.json
(every sample) and prints a table: medians of milliseconds of the slowest rank, of save() itself and until it
is durable, for the first save of a plan and for later ones.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from . import cli, reporting
from .measuring import machine_facts, progress, run_ranks

COLUMNS = ("first: save()", "first: durable", "later: save()", "later: durable")


def table(samples: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> str:
    """A line per number of ranks, state and mode."""
    rows = [["ranks", "state, replicas=", *COLUMNS]]
    for num_ranks, figures in samples.items():
        for name, columns in figures.items():
            medians = (statistics.median(columns[column]) for column in COLUMNS)
            rows.append([num_ranks, name, *(f"{median:.1f} ms" for median in medians)])
    return reporting.table(rows, align="llrrrr")


def main() -> int:
    parser = cli.parser(__doc__)
    cli.add_directory(parser)
    parser.add_argument("--ranks", default="2,4", help="comma-separated (%(default)s)")
    parser.add_argument("--runs", type=int, default=15, help="saves behind the first (%(default)s)")
    given = parser.parse_args()
    with cli.scratch(given.dir) as directory:
        machine = machine_facts(directory)
        data: dict[str, Any] = {"kind": "replicas", "version": 1, "machine": machine, "samples": {}}
        for num_ranks in map(int, given.ranks.split(",")):
            progress(f"{num_ranks} ranks")
            root = directory / str(num_ranks)
            data["samples"][str(num_ranks)] = run_ranks(
                "replicated_ranks", num_ranks, {"runs": given.runs}, root
            )
            reporting.write(data, given.out / "replicas.json")
    print(table(data["samples"]))
    print(f"{machine['cores']} cores, n = {given.runs}, load {machine['load_average_at_start']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
