"""The JSON of a run: written after each comparison, and read back for every table and chart.

In: groups of samples. Out: one file, always whole; from it medians, and ratios to ours.
Keeps: figures, samples and facts of the machine, never a path; a ratio compares engines of one group of one
run only; a figure that was not taken is None, never 0.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines import ENGINES, OURS, RAW
from ..measuring import Group

VERSION = 1
Data = dict[str, Any]
FLOORS = {
    "staged": ("copy",),
    "durable": ("write",),
    "cold": ("cold", "cold_direct"),
    "warm": ("warm",),
}
"""What raw has to set against an engine's figure; the smallest median counts."""


def new(configuration: Mapping[str, Any], machine: Mapping[str, Any]) -> Data:
    """A run that has measured nothing yet."""
    return {
        "version": VERSION,
        "configuration": dict(configuration),
        "machine": dict(machine),
        "engines": {},
        "workloads": {},
    }


def add(data: Data, workload: str, group: Group, **more: Any) -> None:
    """Take in what one group of engines gave."""
    entry = data["workloads"].setdefault(workload, {"groups": []})
    for engine, fact in group.facts.items():
        mark = ENGINES[engine].mark if engine in ENGINES else ""
        data["engines"][engine] = {"call": fact["call"], "mark": mark}
        data["machine"] |= {"torch": fact["torch"], "torch_threads": fact["threads"]}
        data["machine"] |= {"device": fact["device"]} if "device" in fact else {}
        entry |= {"num_tensors": fact["num_tensors"], "nbytes": fact["nbytes"]}
    entry["groups"].append({"samples": group.samples, "failures": group.failures, **more})


def write(data: Data, path: Path) -> None:
    """Replace the file by one that holds all of this: at every moment a reader finds a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(json.dumps(data, indent=1) + "\n", encoding="ascii")
    os.replace(fresh, path)


def read(path: Path) -> Data:
    """What `write` left."""
    data: Data = json.loads(path.read_text(encoding="ascii"))
    if data.get("version") != VERSION:
        raise SystemExit(f"{path} is not a version {VERSION} result of bench.run")
    return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One engine's figure."""

    value: float
    """The median."""
    num_samples: int
    ratio: float | None
    """To ours in the same group; None where ours has no such figure there."""


def groups(data: Data, workload: str) -> Sequence[Mapping[str, Any]]:
    """What was measured side by side, in the order of taking."""
    measured: Sequence[Mapping[str, Any]] = data["workloads"].get(workload, {}).get("groups", ())
    return measured


def cell(data: Data, workload: str, engine: str, figure: str) -> Cell | None:
    """The figure from the first group that has it."""
    for group in groups(data, workload):
        value = median(group, engine, figure)
        if value is not None:
            ours = median(group, OURS, figure)
            count = len(_samples(group, engine, _names(group, engine, figure)))
            return Cell(value=value, num_samples=count, ratio=value / ours if ours else None)
    return None


def compare(
    data: Data, workload: str, above: tuple[str, str], below: tuple[str, str]
) -> tuple[float, float, float] | None:
    """Two medians, of (engine, figure) each, and their ratio, from the first group that has both.

    A loss can come out as nothing or less, where the loops' own rate wandered: then the ratio is infinite.
    """
    for group in groups(data, workload):
        first, second = median(group, *above), median(group, *below)
        if first is not None and second is not None:
            return first, second, first / second if second > 0 else math.inf
    return None


def median(group: Mapping[str, Any], engine: str, figure: str) -> float | None:
    """The median of all samples; for raw, the figure's floor."""
    values = _samples(group, engine, _names(group, engine, figure))
    return statistics.median(values) if values else None


def _names(group: Mapping[str, Any], engine: str, figure: str) -> str:
    if engine != RAW:
        return figure
    floors = {
        name: statistics.median(values)
        for name in FLOORS.get(figure, (figure,))
        if (values := _samples(group, RAW, name))
    }
    return min(floors, key=lambda name: floors[name], default=figure)


def _samples(group: Mapping[str, Any], engine: str, figure: str) -> Sequence[float]:
    values: Sequence[float] = group["samples"].get(engine, {}).get(figure, ())
    return values


def failures(data: Data, workload: str) -> dict[str, str]:
    """Why engines dropped out, in one workload."""
    return {
        engine: reason for group in groups(data, workload) for engine, reason in group["failures"].items()
    }


def measured(data: Data, workload: str) -> list[str]:
    """The engines that took part in a workload, failed ones included, in the roster's order."""
    names = {name for group in groups(data, workload) for name in (*group["samples"], *group["failures"])}
    return [engine for engine in ENGINES if engine in names]


def pooled(data: Data, engine: str, figure: str) -> list[float]:
    """All numbers of the trainer's lists of that name, of the first group that has the engine."""
    for group in groups(data, "trainer"):
        if lists := group["samples"].get(engine, {}).get(figure):
            return [value for values in lists for value in values]
    return []


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least that share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
