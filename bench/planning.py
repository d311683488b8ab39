"""What does planning cost with many ranks: dcp_async beside stock DCP's planner, in one process.

Run as `python3 noxfile.py bench planning`, or `python -m bench.planning`. Writes planning.json (every sample)
and planning.md (medians and ratios), anew after each layout and number of ranks.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from pathlib import Path

import torch

from . import cli
from .measuring import machine_facts, progress
from .measuring.planning import LAYOUTS, NUM_LEAVES, Ranks, Times, run_ours, run_stock, store_seconds
from .reporting import Case, as_json, as_markdown


def measure(layout: str, world_size: int, given: argparse.Namespace) -> Case:
    """``given.runs`` samples of each engine, taken in turn."""
    ranks = Ranks.build(layout, given.items, world_size)
    samples: dict[str, list[Times]] = {"first": [], "later": [], "stock": []}
    nbytes: dict[str, int] = {}
    stock_nbytes: dict[str, int] = {}
    for _ in range(given.runs if world_size <= 512 else 1):
        first, later, nbytes = run_ours(ranks)
        samples["first"].append(first)
        samples["later"].append(later)
        if world_size <= given.stock_ranks:
            stock, stock_nbytes = run_stock(ranks)
            samples["stock"].append(stock)
    return Case(
        layout=layout, world_size=world_size, samples=samples, nbytes=nbytes, stock_nbytes=stock_nbytes
    )


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated (%(default)s)")
    parser.add_argument("--ranks", default="8,64,256,1024,4096", help="comma-separated (%(default)s)")
    parser.add_argument("--items", type=int, default=625, help="per rank (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="samples up to 512 ranks; 1 beyond (%(default)s)")
    parser.add_argument(
        "--stock-ranks",
        type=int,
        default=256,
        help="stock up to so many: it takes minutes beyond (%(default)s)",
    )
    given = parser.parse_args()
    machine = machine_facts(Path.cwd()) | {"torch": torch.__version__}
    configuration = {"items": given.items, "leaves": NUM_LEAVES, "runs": given.runs}
    store = store_seconds()
    cases: list[Case] = []
    given.out.mkdir(parents=True, exist_ok=True)
    for layout in given.layouts.split(","):
        for world_size in map(int, given.ranks.split(",")):
            progress(f"{layout}, {world_size} ranks")
            cases.append(measure(layout, world_size, given))
            machine["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            machine["load_average_at_end"] = round(os.getloadavg()[0], 2)
            for suffix, text in (
                ("json", as_json(configuration, machine, store, cases)),
                ("md", as_markdown(configuration, machine, store, cases, LAYOUTS)),
            ):
                (given.out / f"planning.{suffix}").write_text(text, encoding="ascii")
    print((given.out / "planning.md").read_text(encoding="ascii"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
