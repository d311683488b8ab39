"""How long does a save keep the trainer, and how soon is it durable: dcp_async beside stock DCP and the raw
machine.

Run as `python bench/save.py`. Writes save.json (every sample) and save.md (medians and ratios).
Each engine has a process of its own; one round asks each in turn for one sample of each figure, and a
figure's number is the median over the rounds. The first save of a process is reported apart; one more warms
it up.
Belongs here: which engines, figures, rounds and goals. Not here: how a figure is taken (measure.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import options
import report
from driver import STATE_BYTES, Group, groups_that_fit, progress, running
from report import Row

CORE = ("raw", "dcp_async", "stock", "stock best")
OTHERS = ("dcp_async overlap", "dcp_async 128 MiB", "stock best overlap", "stock sync")
QUICK_OTHERS = ("dcp_async overlap", "dcp_async 128 MiB")
NOT_ASYNC = ("raw", "stock sync")
LOST_SECONDS = 5.0
BLOCKED_GOALS_MS = {"large": 30, "llm": 30, "many": 60}

NOTES = (
    (
        "Times are medians. stock is DCP as it comes; stock best reuses its stager, caches plans and writes "
        "with two threads; with overlap, its stager copies on its own thread."
    ),
    (
        "stall: from the call until the state may be mutated. raw: one _foreach_copy_ of the same bytes into "
        "warm memory."
    ),
    (
        "durable: from the call until the upload is complete, the caller idle. raw: a direct write and fsync "
        "of the same bytes. Stock syncs its files, not its directory."
    ),
    "busy: the same, the calling thread spinning in pure Python from the call's return on.",
    (
        "lost: wall time of a tiny-op loop beside back-to-back saves, less the time blocked in save() and "
        "the time that its operations take with none in flight; per save."
    ),
    (
        "peak extra memory: high-water mark of the process over its first two saves (VmHWM, reset before; "
        "shared memory is in it, page cache is not) less its memory before the engine is opened."
    ),
)


def rows_of(workload: str) -> list[Row]:
    """The table of one workload; goals are the design's."""
    many = workload == "many"
    ours, stock, best, small, overlap = (
        "dcp_async",
        "stock",
        "stock best",
        "dcp_async 128 MiB",
        "dcp_async overlap",
    )
    best_overlap = "stock best overlap"

    def same(
        label: str, figure: str, *, raw: tuple[str, ...] = (), unit: report.Unit = "s", goal: str = ""
    ) -> Row:
        peers = ((ours, figure), (stock, figure), (best, figure))
        return Row(label=label, ours=peers[0], stock=peers[1], best=peers[2], raw=raw, unit=unit, goal=goal)

    def other(label: str, engine: str, figure: str, *, unit: report.Unit = "s", goal: str = "") -> Row:
        peer = (best_overlap, figure) if engine == overlap else (best, figure)
        raw = {"durable": ("write",), "staged": ("copy",)}.get(figure, ())
        return Row(label=label, ours=(engine, figure), stock=None, best=peer, raw=raw, unit=unit, goal=goal)

    return [
        same("first save: stall", "first_staged", raw=("copy",)),
        same("first save: durable", "first_durable", raw=("write",)),
        same("stall", "staged", raw=("copy",), goal="stock / ours >= 15" if many else "ours / raw <= 1.5"),
        other("stall, 128 MiB budget", small, "staged"),
        other("blocked, overlap", overlap, "blocked", unit="ms", goal=f"<= {BLOCKED_GOALS_MS[workload]} ms"),
        other("stall, overlap", overlap, "staged"),
        same(
            "durable", "durable", raw=("write",), goal="stock / ours >= 20" if many else "ours / raw <= 1.11"
        ),
        other("durable, 128 MiB budget", small, "durable", goal="" if many else "ours / raw <= 1.18"),
        other("durable, overlap", overlap, "durable"),
        Row(label="dcp.save, blocking", ours=None, stock=("stock sync", "durable"), raw=("write",)),
        same("durable, busy", "durable_busy", goal="<= 2 x durable"),
        same("lost per save", "lost", unit="ms", goal="<= 60 ms" if many else "stock / ours >= 20"),
        other("lost per save, overlap", overlap, "lost", unit="ms"),
        same("CPU per save", "cpu"),
        same("peak extra memory", "peak_extra_bytes", unit="MiB"),
        other("peak extra memory, 128 MiB budget", small, "peak_extra_bytes", unit="MiB", goal="<= 192 MiB"),
    ]


def measure(group: Group, given: options.Options) -> None:
    """All samples of one group."""
    group.take("save", prefix="first_")
    group.take("save", prefix="warm_up_")
    group.take("memory", only=group.engines(but=["raw"]))
    for round_ in range(given.runs):
        group.take("save", rotate=round_)
        if not given.quick:
            group.take("busy", rotate=round_, only=group.engines(but=[*NOT_ASYNC, "stock best overlap"]))
    if given.quick:
        group.take("busy", only=group.engines(but=[*NOT_ASYNC, "stock best"]))
    for round_ in range(1 if given.quick else min(given.runs, 3)):
        engines = ["dcp_async", "stock"] if given.quick else group.engines(but=NOT_ASYNC)
        group.take("lost", rotate=round_, only=engines, seconds=1.0 if given.quick else LOST_SECONDS)


def main() -> int:
    given = options.parse(__doc__ or "")
    others: Sequence[str] = QUICK_OTHERS if given.quick else OTHERS
    results: dict[str, list[Group]] = {}
    with options.scratch(given) as directory:
        facts = report.machine(directory)
        for workload in given.workloads:
            results[workload] = []
            for number, engines in enumerate(
                groups_that_fit(CORE, others, int(STATE_BYTES[workload] * given.scale))
            ):
                progress(f"{workload}: {', '.join(engines)}")
                start = time.perf_counter()
                with running(engines, workload, given.scale, directory / f"{workload}-{number}") as group:
                    results[workload].append(group)
                    progress(f"  ready ({time.perf_counter() - start:.0f} s)")
                    measure(group, given)
    rows = {workload: rows_of(workload) for workload in given.workloads}
    return options.finish("save", "Saving: dcp_async, stock DCP, raw", given, facts, results, rows, NOTES)


if __name__ == "__main__":
    sys.exit(main())
