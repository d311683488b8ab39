"""How fast is a checkpoint back in the tensors of a live model: dcp_async beside stock DCP and the raw
machine.

Run as `python bench/load.py`. Writes load.json (every sample) and load.md (medians and ratios).
Each engine has a process of its own and loads in place what it saved itself; one round asks each in turn for
one load with a cold and one with a warm page cache. Targets are zeroed before and compared bit for bit after
every load.
Belongs here: which engines, figures, rounds and goals. Not here: how a cache is emptied (raw.py).
"""

from __future__ import annotations

import sys

import options
import report
from driver import STATE_BYTES, Group, groups_that_fit, progress, running
from report import Row

ENGINES = ("raw", "dcp_async", "stock")

NOTES = (
    "Times are medians, into touched memory. dcp_async verifies its checksums, stock verifies nothing.",
    "raw: the same bytes from one file by two threads; cold, the faster of buffered and direct reads.",
    "A cold cache is the guest's: a host below may still hold the blocks.",
)


def rows_of(workload: str) -> list[Row]:
    """The table of one workload; goals are the design's."""
    many = workload == "many"

    def row(
        label: str, figure: str, *, raw: tuple[str, ...] = (), unit: report.Unit = "s", goal: str = ""
    ) -> Row:
        return Row(
            label=label, ours=("dcp_async", figure), stock=("stock", figure), raw=raw, unit=unit, goal=goal
        )

    cold = "stock / ours >= 8" if many else "stock / ours >= 1.5, ours / raw <= 1.11"
    return [
        row("cold cache", "cold", raw=("cold", "cold_direct"), goal=cold),
        row("warm cache", "warm", raw=("warm",), goal="stock / ours >= 8" if many else "stock / ours >= 2"),
        row("CPU, cold cache", "cold_cpu"),
        row("CPU, warm cache", "warm_cpu"),
        row("peak extra memory", "cold_peak_extra_bytes", unit="MiB"),
    ]


def measure(group: Group, given: options.Options) -> None:
    """All samples of one group; one load of each engine comes first and does not count."""
    group.take("prepare_load")
    group.take("load", prefix="warm_up_", cold=False, how=given.cold_by)
    for round_ in range(given.runs):
        for cold in (True, False):
            group.take("load", rotate=round_, cold=cold, how=given.cold_by)
    for engine, figures in group.samples.items():
        if wrong := sum(figures["num_different"] + figures["warm_up_num_different"]):
            group.failures[engine] = f"{engine}: {wrong} tensors of all loads differ from what was saved"


def main() -> int:
    given = options.parse(__doc__ or "")
    results: dict[str, list[Group]] = {}
    with options.scratch(given) as directory:
        facts = report.machine(directory)
        for workload in given.workloads:
            progress(f"{workload}: {', '.join(ENGINES)}")
            (engines,) = groups_that_fit(ENGINES, (), int(STATE_BYTES[workload] * given.scale))
            with running(engines, workload, given.scale, directory / workload) as group:
                results[workload] = [group]
                measure(group, given)
    ways = {way for (group,) in results.values() for f in group.samples.values() for way in f["cache"]}
    notes = [*NOTES, f"The page cache: {', '.join(sorted(ways))}."]
    rows = {workload: rows_of(workload) for workload in given.workloads}
    return options.finish("load", "Loading: dcp_async, stock DCP, raw", given, facts, results, rows, notes)


if __name__ == "__main__":
    sys.exit(main())
