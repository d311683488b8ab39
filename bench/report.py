"""What a run leaves: one JSON file with everything, one Markdown file with medians and ratios.

In: the samples of each workload's groups and the rows wanted. Out: the two files' text.
Keeps: ratios compare engines of one group of one run only; a figure that was not taken shows as "-", never as
0.
Belongs here: medians, units, tables, the machine's description. Not here: what is measured or what a goal
means.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from driver import Group

Unit = Literal["s", "ms", "MiB"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: our figure beside its peers'; None where there is no such figure."""

    label: str
    ours: tuple[str, str] | None
    """Engine and figure."""
    stock: tuple[str, str] | None = None
    best: tuple[str, str] | None = None
    raw: tuple[str, ...] = ()
    """Figures of raw; the smallest median counts."""
    unit: Unit = "s"
    goal: str = ""


def machine(directory: Path) -> dict[str, Any]:
    """What a reader needs to place the numbers."""
    meminfo = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    )
    model = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model[0] if model else platform.machine(),
        "memory_bytes": int(meminfo["MemTotal"].split()[0]) * 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file_system": file_system(directory),
        "transparent_hugepages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def file_system(directory: Path) -> str:
    """The type of the file system that holds `directory`."""
    device = directory.resolve().stat().st_dev
    found = "unknown"
    # Later mounts hide earlier ones: the last line with this device is the one that is seen.
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields, kind = line.split(" - ", 1)
        major, minor = fields.split()[2].split(":")
        if os.makedev(int(major), int(minor)) == device:
            found = kind.split()[0]
    return found


def as_json(
    *, configuration: Mapping[str, Any], facts: Mapping[str, Any], workloads: Mapping[str, Sequence[Group]]
) -> str:
    """Everything, samples in order of taking."""
    results = {
        name: [
            {
                "facts": group.facts,
                "samples": group.samples,
                "medians": medians(group),
                "failures": group.failures,
            }
            for group in groups
        ]
        for name, groups in workloads.items()
    }
    return (
        json.dumps({"configuration": configuration, "machine": facts, "workloads": results}, indent=1) + "\n"
    )


def medians(group: Group) -> dict[str, dict[str, float]]:
    """The median of every numeric figure."""
    return {
        engine: {
            figure: statistics.median(values)
            for figure, values in figures.items()
            if all(isinstance(value, int | float) for value in values)
        }
        for engine, figures in group.samples.items()
    }


def as_markdown(
    *,
    title: str,
    configuration: Mapping[str, Any],
    facts: Mapping[str, Any],
    workloads: Mapping[str, Sequence[Group]],
    rows: Mapping[str, Sequence[Row]],
    notes: Sequence[str],
) -> str:
    """A table for each workload, after the machine and before the notes."""
    described = [f"{key} {value}" for key, value in {**facts, **configuration}.items()]
    lines = [f"# {title}", "", "; ".join(described) + ".", ""]
    for name, groups in workloads.items():
        some = next((fact for group in groups for fact in group.facts.values()), {})
        size = f"{some.get('num_tensors', 0)} tensors, {some.get('nbytes', 0) / 1e9:.2f} GB"
        lines += [f"## {name}: {size}", ""]
        lines += _table(rows[name], groups)
        for group in groups:
            lines += [f"Failed: {engine}: {_last(text)}" for engine, text in group.failures.items()]
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"


def engine_notes(workloads: Mapping[str, Sequence[Group]]) -> list[str]:
    """What each engine's column stands for."""
    calls = {
        engine: fact["call"]
        for groups in workloads.values()
        for group in groups
        for engine, fact in group.facts.items()
    }
    return [f"{engine}: `{call}`" for engine, call in calls.items()]


def _table(rows: Sequence[Row], groups: Sequence[Group]) -> list[str]:
    head = [
        "figure",
        "dcp_async",
        "stock",
        "stock best",
        "raw",
        "stock / ours",
        "best / ours",
        "ours / raw",
        "goal",
    ]
    lines = [_line(head), _line(["---", *["---:"] * 7, "---"])]
    for row in rows:
        # A row is taken whole from the one group that has most of it.
        found = max(
            (_values(row, medians(group)) for group in groups), key=lambda v: sum(x is not None for x in v)
        )
        ours, stock, best, raw = found
        ratios = [_ratio(stock, ours), _ratio(best, ours), _ratio(ours, raw)]
        if row.unit == "MiB" and ours is not None and ours < 2**20:
            ratios = ["-"] * 3  # a ratio to next to nothing says nothing
        lines.append(_line([row.label, *(_shown(value, row.unit) for value in found), *ratios, row.goal]))
    return [*lines, ""]


def _values(row: Row, of: Mapping[str, Mapping[str, float]]) -> list[float | None]:
    cells = [of.get(cell[0], {}).get(cell[1]) if cell else None for cell in (row.ours, row.stock, row.best)]
    floors = [value for figure in row.raw if (value := of.get("raw", {}).get(figure)) is not None]
    return [*cells, min(floors) if floors else None]


def _ratio(above: float | None, below: float | None) -> str:
    return "-" if above is None or below is None or below <= 0 else f"{above / below:.2f}"


def _shown(value: float | None, unit: Unit) -> str:
    if value is None:
        return "-"
    if unit == "MiB":
        return f"{value / 2**20:.0f} MiB"
    return f"{value * 1000:.1f} ms" if unit == "ms" else f"{value:.3f} s"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _last(text: str) -> str:
    return text.strip().splitlines()[-1]


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"
