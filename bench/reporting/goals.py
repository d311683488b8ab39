"""What the engine set out to reach (design, section 9), and what a run says about it.

In: a run's JSON. Out: rows of goal, figure and verdict; a row whose figures were not taken is left out.
Belongs here: goals. Not here: how a figure is taken or shown otherwise.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ..engines.roster import OURS, RAW
from . import results
from .results import Data

OVERLAP = "dcp_async overlap"
SMALL = "dcp_async 128 MiB"
STOCK = "stock"
Engines = tuple[str, str]
"""An engine and a figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """`above / below`, or `above` alone, set against a limit."""

    words: str
    workloads: tuple[str, ...]
    above: Engines
    below: Engines | None = None
    relation: Literal["<=", ">="]
    limit: float
    unit: Literal["x", "ms", "MiB"] = "x"


FEW = ("large", "llm", "mixed")
MANY = ("many",)
LOST = ("large",)
GOALS = (
    Goal(
        words="stall / one copy into warm memory",
        workloads=FEW,
        above=(OURS, "staged"),
        below=(RAW, "staged"),
        relation="<=",
        limit=1.5,
    ),
    Goal(
        words="stall: stock / ours",
        workloads=MANY,
        above=(STOCK, "staged"),
        below=(OURS, "staged"),
        relation=">=",
        limit=15,
    ),
    Goal(
        words="blocked with overlap",
        workloads=FEW,
        above=(OVERLAP, "blocked"),
        relation="<=",
        limit=30,
        unit="ms",
    ),
    Goal(
        words="blocked with overlap",
        workloads=MANY,
        above=(OVERLAP, "blocked"),
        relation="<=",
        limit=60,
        unit="ms",
    ),
    Goal(
        words="durable: raw direct write / ours",
        workloads=FEW,
        above=(RAW, "durable"),
        below=(OURS, "durable"),
        relation=">=",
        limit=0.9,
    ),
    Goal(
        words="durable, 128 MiB budget: raw direct write / ours",
        workloads=FEW,
        above=(RAW, "durable"),
        below=(SMALL, "durable"),
        relation=">=",
        limit=0.85,
    ),
    Goal(
        words="durable: stock / ours",
        workloads=MANY,
        above=(STOCK, "durable"),
        below=(OURS, "durable"),
        relation=">=",
        limit=20,
    ),
    Goal(
        words="durable beside pure Python / idle",
        workloads=("large", "many"),
        above=(OURS, "durable_python"),
        below=(OURS, "durable"),
        relation="<=",
        limit=2,
    ),
    Goal(
        words="load, cold: raw read / ours",
        workloads=FEW,
        above=(RAW, "cold"),
        below=(OURS, "cold"),
        relation=">=",
        limit=0.9,
    ),
    Goal(
        words="load, cold: stock / ours",
        workloads=FEW,
        above=(STOCK, "cold"),
        below=(OURS, "cold"),
        relation=">=",
        limit=1.5,
    ),
    Goal(
        words="load, warm: stock / ours",
        workloads=FEW,
        above=(STOCK, "warm"),
        below=(OURS, "warm"),
        relation=">=",
        limit=2,
    ),
    Goal(
        words="load, cold: stock / ours",
        workloads=MANY,
        above=(STOCK, "cold"),
        below=(OURS, "cold"),
        relation=">=",
        limit=8,
    ),
    Goal(
        words="load, warm: stock / ours",
        workloads=MANY,
        above=(STOCK, "warm"),
        below=(OURS, "warm"),
        relation=">=",
        limit=8,
    ),
    Goal(
        words="lost per save, tiny-op loop: stock / ours",
        workloads=LOST,
        above=(STOCK, "lost_tiny"),
        below=(OURS, "lost_tiny"),
        relation=">=",
        limit=20,
    ),
    Goal(
        words="lost per save, tiny-op loop",
        workloads=MANY,
        above=(OURS, "lost_tiny"),
        relation="<=",
        limit=60,
        unit="ms",
    ),
    Goal(
        words="peak extra memory, 128 MiB budget",
        workloads=(*FEW, *MANY),
        above=(SMALL, "peak_extra_bytes"),
        relation="<=",
        limit=192,
        unit="MiB",
    ),
)
UNITS: Mapping[str, float] = {"x": 1.0, "ms": 1e3, "MiB": 1 / 2**20}
RELATIONS: Mapping[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}
LARGEST_LOSS = 0.05
LARGEST_P99 = 1.5


def table(data: Data) -> str:
    """Every goal that this run can speak to."""
    lines = ["| workload | figure | goal | measured | met |", "| --- | --- | ---: | ---: | --- |"]
    for workload, words, relation, limit, value, unit in (*_rows(data), *_trainer_rows(data)):
        met = "yes" if RELATIONS[relation](value, limit) else "**no**"
        if words.startswith(f"{STOCK}:"):
            met = "-"  # it stands beside ours; the goal is not its own
        lines.append(
            f"| {workload} | {words} | {relation} {limit:g}{_suffix(unit)} | "
            f"{_rounded(value)}{_suffix(unit)} | {met} |"
        )
    return "\n".join(lines)


def _rows(data: Data) -> Iterator[tuple[str, str, str, float, float, str]]:
    for goal in GOALS:
        for workload in goal.workloads:
            value: float | None
            if goal.below is None:
                cell = results.cell(data, workload, *goal.above)
                value = cell.value * UNITS[goal.unit] if cell else None
            else:
                found = results.compare(data, workload, goal.above, goal.below)
                value = found[2] if found else None
            if value is not None:
                yield workload, goal.words, goal.relation, goal.limit, value, goal.unit


def _trainer_rows(data: Data) -> Iterator[tuple[str, str, str, float, float, str]]:
    for engine in (OURS, OVERLAP, STOCK):
        loss = throughput_loss(data, engine)
        plain = results.pooled(data, engine, "plain_steps")
        steps = results.pooled(data, engine, "steps")
        if loss is not None and plain and steps:
            yield "trainer", f"{engine}: throughput lost", "<=", LARGEST_LOSS * 100, loss * 100, "%"
            ratio = results.percentile(steps, 99) / results.percentile(plain, 99)
            yield "trainer", f"{engine}: p99 step / without saves", "<=", LARGEST_P99, ratio, "x"


def throughput_loss(data: Data, engine: str) -> float | None:
    """The share of a trainer's steps that saving every so many costs it: the median over rounds."""
    for group in data["workloads"].get("trainer", {}).get("groups", ()):
        samples = group["samples"].get(engine, {})
        pairs = zip(
            samples.get("plain_seconds_a_step", ()), samples.get("saving_seconds_a_step", ()), strict=False
        )
        if losses := [float(1 - plain / saving) for plain, saving in pairs]:
            return statistics.median(losses)
    return None


def _suffix(unit: str) -> str:
    return "" if unit == "x" else f" {unit}"


def _rounded(value: float) -> str:
    if math.isinf(value):
        return "ours: none measurable"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
