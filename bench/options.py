"""The command line that both benches share, and the frame around a run: directory, files, exit status.

In: arguments. Out: an `Options`, a scratch directory that is gone afterwards, the two result files.
Keeps: nothing is left behind but the results; an engine that failed makes the exit status 1.
Belongs here: what `save.py` and `load.py` have in common. Not here: figures, rounds, goals.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from driver import STATE_BYTES, Group, progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The run that was asked for."""

    workloads: tuple[str, ...]
    runs: int
    """Rounds; each gives one sample of each figure and engine."""
    scale: float
    """Fraction of each workload's tensors; 1 for figures that are quoted."""
    quick: bool
    out: Path
    directory: Path | None
    cold_by: str


def parse(question: str) -> Options:
    """The options of this process."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument(
        "--workloads", help=f"comma-separated, of {', '.join(STATE_BYTES)} (all; with --quick large,many)"
    )
    parser.add_argument(
        "--runs", type=int, help="rounds, one sample of each figure in each (5; with --quick 2)"
    )
    parser.add_argument(
        "--scale", type=float, help="fraction of each workload's tensors (1; with --quick 0.25)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="where JSON and table go (%(default)s)"
    )
    parser.add_argument(
        "--dir", type=Path, help="where checkpoints are written (a temporary folder of the current one)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a short look: smaller states, fewer engines and figures"
    )
    parser.add_argument(
        "--cold-by",
        choices=("auto", "global", "fadvise"),
        default="auto",
        help="how a load's page cache is emptied: the whole machine's (root), per file, or what is permitted",
    )
    given = parser.parse_args()
    names = tuple((given.workloads or ("large,many" if given.quick else ",".join(STATE_BYTES))).split(","))
    if unknown := set(names) - set(STATE_BYTES):
        parser.error(f"no workload named {', '.join(sorted(unknown))}: choose from {', '.join(STATE_BYTES)}")
    runs = (2 if given.quick else 5) if given.runs is None else given.runs
    scale = (0.25 if given.quick else 1.0) if given.scale is None else given.scale
    if runs < 1 or not 0 < scale <= 1:
        parser.error("--runs is at least 1, --scale above 0 and at most 1")
    return Options(
        workloads=names,
        runs=runs,
        scale=scale,
        quick=given.quick,
        out=given.out,
        directory=given.dir,
        cold_by=given.cold_by,
    )


@contextmanager
def scratch(options: Options) -> Iterator[Path]:
    """A directory of our own for the checkpoints, removed at the end."""
    parent = options.directory or Path.cwd()
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="bench-tmp-", dir=parent))
    try:
        if report.file_system(directory) == "tmpfs":
            raise SystemExit(f"{parent} is in memory (tmpfs): nothing there is durable; give --dir on a disk")
        yield directory
    finally:
        shutil.rmtree(directory)


def finish(
    name: str,
    title: str,
    options: Options,
    facts: Mapping[str, Any],
    results: Mapping[str, Sequence[Group]],
    rows: Mapping[str, Sequence[report.Row]],
    notes: Sequence[str],
) -> int:
    """Write both files, print the table; the exit status."""
    some = next(
        (fact for groups in results.values() for group in groups for fact in group.facts.values()), {}
    )
    facts = {
        **facts,
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "torch": some.get("torch"),
        "torch_threads": some.get("threads"),
    }
    configuration = {"runs": options.runs, "scale": options.scale, "quick": options.quick}
    text = report.as_markdown(
        title=title,
        configuration=configuration,
        facts=facts,
        workloads=results,
        rows=rows,
        notes=[*notes, *report.engine_notes(results)],
    )
    options.out.mkdir(parents=True, exist_ok=True)
    data = report.as_json(configuration=configuration, facts=facts, workloads=results)
    (options.out / f"{name}.json").write_text(data, encoding="ascii")
    (options.out / f"{name}.md").write_text(text, encoding="ascii")
    print(text)
    progress(f"written: {options.out / name}.json and .md")
    failures = [
        failure for groups in results.values() for group in groups for failure in group.failures.values()
    ]
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0
