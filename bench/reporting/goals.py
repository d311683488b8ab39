"""What the engine set out to reach (design, section 9), and what a run says about it.

In: a run's JSON. Out: rows of goal, figure and verdict; a row whose figures were not taken is left out.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ..engines import OURS, RAW, STOCK
from . import markdown, results
from .results import Data

OVERLAP = "dcp_async overlap"
SMALL = "dcp_async 128 MiB"
Relation = Literal["<=", ">="]
Unit = Literal["x", "ms", "MiB", "%"]
Figure = tuple[str, str]
"""An engine, and what was measured of it."""


@dataclass(frozen=True, slots=True)
class Goal:
    """`above`, divided by `below` where there is one, set against a limit."""

    words: str
    workloads: tuple[str, ...]
    above: Figure
    relation: Relation
    limit: float
    unit: Unit = "x"
    below: Figure | None = None


def _ratio(
    words: str,
    workloads: tuple[str, ...],
    engines: tuple[str, str],
    figure: str,
    relation: Relation,
    limit: float,
) -> Goal:
    """One figure of two engines, the first divided by the second."""
    above, below = engines
    return Goal(words, workloads, (above, figure), relation, limit, below=(below, figure))


FEW = ("large", "llm", "mixed")
MANY = ("many",)
GOALS = (
    _ratio("stall / one copy into warm memory", FEW, (OURS, RAW), "staged", "<=", 1.5),
    _ratio("stall: stock / ours", MANY, (STOCK, OURS), "staged", ">=", 15),
    Goal("blocked with overlap", FEW, (OVERLAP, "blocked"), "<=", 30, "ms"),
    Goal("blocked with overlap", MANY, (OVERLAP, "blocked"), "<=", 60, "ms"),
    _ratio("durable: raw direct write / ours", FEW, (RAW, OURS), "durable", ">=", 0.9),
    _ratio("durable, 128 MiB budget: raw direct write / ours", FEW, (RAW, SMALL), "durable", ">=", 0.85),
    _ratio("durable: stock / ours", MANY, (STOCK, OURS), "durable", ">=", 20),
    Goal(
        "durable beside pure Python / idle",
        ("large", "many"),
        (OURS, "durable_python"),
        "<=",
        2,
        below=(OURS, "durable"),
    ),
    _ratio("load, cold: raw read / ours", FEW, (RAW, OURS), "cold", ">=", 0.9),
    _ratio("load, cold: stock / ours", FEW, (STOCK, OURS), "cold", ">=", 1.5),
    _ratio("load, warm: stock / ours", FEW, (STOCK, OURS), "warm", ">=", 2),
    _ratio("load, cold: stock / ours", MANY, (STOCK, OURS), "cold", ">=", 8),
    _ratio("load, warm: stock / ours", MANY, (STOCK, OURS), "warm", ">=", 8),
    _ratio("lost per save, tiny-op loop: stock / ours", ("large",), (STOCK, OURS), "lost_tiny", ">=", 20),
    Goal("lost per save, tiny-op loop", MANY, (OURS, "lost_tiny"), "<=", 60, "ms"),
    Goal("peak extra memory, 128 MiB budget", (*FEW, *MANY), (SMALL, "peak_extra_bytes"), "<=", 192, "MiB"),
)
UNITS: Mapping[str, float] = {"x": 1.0, "ms": 1e3, "MiB": 1 / 2**20}
RELATIONS: Mapping[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}
LARGEST_LOSS = 0.05
LARGEST_P99 = 1.5


@dataclass(frozen=True, slots=True)
class Row:
    """One goal in one workload, and what was measured, in the goal's unit."""

    workload: str
    words: str
    relation: Relation
    limit: float
    value: float
    unit: Unit

    def cells(self) -> list[str]:
        met = "yes" if RELATIONS[self.relation](self.value, self.limit) else "**no**"
        if self.words.startswith(f"{STOCK}:"):
            met = "-"  # it stands beside ours; the goal is not its own
        unit = "" if self.unit == "x" else f" {self.unit}"
        limit = f"{self.relation} {self.limit:g}{unit}"
        return [self.workload, self.words, limit, f"{_rounded(self.value)}{unit}", met]


def table(data: Data) -> str:
    """Every goal that this run can speak to."""
    rows = [["workload", "figure", "goal", "measured", "met"]]
    rows += [row.cells() for row in (*_rows(data), *_trainer_rows(data))]
    return markdown.table(rows, align="llrrl")


def _rows(data: Data) -> Iterator[Row]:
    for goal in GOALS:
        for workload in goal.workloads:
            value = _measured(data, workload, goal)
            if value is not None:
                yield Row(workload, goal.words, goal.relation, goal.limit, value, goal.unit)


def _measured(data: Data, workload: str, goal: Goal) -> float | None:
    if goal.below is None:
        cell = results.cell(data, workload, *goal.above)
        return cell.value * UNITS[goal.unit] if cell else None
    compared = results.compare(data, workload, goal.above, goal.below)
    return compared[2] if compared else None


def _trainer_rows(data: Data) -> Iterator[Row]:
    for engine in (OURS, OVERLAP, STOCK):
        loss = throughput_loss(data, engine)
        plain = results.pooled(data, engine, "plain_steps")
        steps = results.pooled(data, engine, "steps")
        if loss is not None and plain and steps:
            yield Row("trainer", f"{engine}: throughput lost", "<=", LARGEST_LOSS * 100, loss * 100, "%")
            ratio = results.percentile(steps, 99) / results.percentile(plain, 99)
            yield Row("trainer", f"{engine}: p99 step / without saves", "<=", LARGEST_P99, ratio, "x")


def throughput_loss(data: Data, engine: str) -> float | None:
    """The share of a trainer's steps that saving every so many costs it: the median over rounds."""
    for group in results.groups(data, "trainer"):
        samples = group["samples"].get(engine, {})
        pairs = zip(
            samples.get("plain_seconds_a_step", ()), samples.get("saving_seconds_a_step", ()), strict=False
        )
        if losses := [float(1 - plain / saving) for plain, saving in pairs]:
            return statistics.median(losses)
    return None


def _rounded(value: float) -> str:
    if math.isinf(value):
        return "ours: none measurable"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
