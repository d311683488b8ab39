"""Lines through the points of a sweep, by least squares.

In: growth.json. Out: curves of medians, their slopes.
Keeps: points are medians; a line with fewer than three points is not drawn.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import size
from .results import Data

FIGURES = {
    "staged": "save: stall",
    "durable": "save: durable",
    "plan": "plan: CPU that a changed structure adds",
    "cold": "load, cold",
    "warm": "load, warm",
}
FEWEST_POINTS = 3
SIZES = {"bytes": "nbytes", "tensors": "num_tensors", "ranks": "num_ranks"}
"""What grows in each sweep."""
FAR = {"bytes": 1 << 30, "tensors": 50_000}
"""How far a sweep has to reach for its slope to be quoted."""


def curve(data: Data, sweep: str, engine: str, figure: str) -> list[tuple[float, float]]:
    """Points of size (bytes, tensors or ranks) and median seconds."""
    points = []
    for point in data["points"]:
        value = seconds(point["samples"].get(engine, {}), figure)
        if point["sweep"] == sweep and value is not None:
            points.append((float(point[SIZES[sweep]]), value))
    return points


def seconds(samples: Mapping[str, Sequence[float]], figure: str) -> float | None:
    """The median of one engine's figure at one point."""
    if figure != "plan":
        return statistics.median(samples[figure]) if samples.get(figure) else None
    if samples.get("replan_cpu") and samples.get("cpu"):
        # CPU, not wall time: a small difference of two large figures, of which the copies' wall time wanders.
        return statistics.median(samples["replan_cpu"]) - statistics.median(samples["cpu"])
    return None


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float] | None:
    """Slope, intercept and coefficient of determination of the least-squares line."""
    if len(points) < FEWEST_POINTS:
        return None
    sizes, values = [x for x, _ in points], [y for _, y in points]
    slope, intercept = statistics.linear_regression(sizes, values)
    if statistics.pvariance(values) == 0:
        return slope, intercept, 1.0
    return slope, intercept, statistics.correlation(sizes, values) ** 2


def fits(data: Data) -> list[dict[str, Any]]:
    """Every curve's line; a slope is seconds per byte, tensor or rank."""
    lines = []
    for sweep in SIZES:
        for engine in data.get("engines", {}):
            for figure in FIGURES:
                points = curve(data, sweep, engine, figure)
                if (fit := line(points)) is not None:
                    lines.append(
                        {
                            "sweep": sweep,
                            "engine": engine,
                            "figure": figure,
                            "slope": fit[0],
                            "intercept": fit[1],
                            "r_squared": fit[2],
                            "num_points": len(points),
                            "from": points[0][0],
                            "to": points[-1][0],
                        }
                    )
    return lines


def reaches_far(data: Data) -> bool:
    """Whether the sweeps go far enough for their slopes to mean something."""
    points = data["points"]
    return all(
        max((point[SIZES[sweep]] for point in points if point["sweep"] == sweep), default=0) >= far
        for sweep, far in FAR.items()
    )


def total(data: Data, sweep: str) -> str:
    """The size of the states of a sweep in which bytes do not grow."""
    sizes = {point["nbytes"] for point in data["points"] if point["sweep"] == sweep}
    return " or ".join(map(size, sorted(sizes))) or "nothing"
