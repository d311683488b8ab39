"""Lines through the points of `growth.py`, as a table and as a picture.

In: growth.json. Out: slopes by least squares, Markdown, growth.png.
Keeps: points are medians; a line with fewer than three points is not drawn.
Belongs here: fits, the table, the chart. Not here: how a point is measured.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Data = dict[str, Any]
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
SLOPES = {"bytes": (1e12, "ms/GB"), "tensors": (1e6, "us/tensor"), "ranks": (1e3, "ms/rank")}


def curve(data: Data, sweep: str, engine: str, figure: str) -> list[tuple[float, float]]:
    """Points of size (bytes, tensors or ranks) and median seconds."""
    found = []
    for point in data["points"]:
        seconds = _seconds(point["samples"].get(engine, {}), figure)
        if point["sweep"] == sweep and seconds is not None:
            found.append((float(point[SIZES[sweep]]), seconds))
    return found


def _seconds(samples: Mapping[str, Sequence[float]], figure: str) -> float | None:
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
    sizes, seconds = [x for x, _ in points], [y for _, y in points]
    slope, intercept = statistics.linear_regression(sizes, seconds)
    if statistics.pvariance(seconds) == 0:
        return slope, intercept, 1.0
    return slope, intercept, statistics.correlation(sizes, seconds) ** 2


def fits(data: Data) -> list[dict[str, Any]]:
    """Every curve's line; a slope is seconds per byte, tensor or rank."""
    found = []
    for sweep in SIZES:
        for engine in data.get("engines", {}):
            for figure in FIGURES:
                points = curve(data, sweep, engine, figure)
                if (fit := line(points)) is not None:
                    found.append(
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
    return found


def table(data: Data) -> str:
    """The lines, in units that people think in."""
    lines = [] if reaches_far(data) else ["**Short sweeps, a quick look: not to be quoted.**", ""]
    lines += [
        "| grows with | figure | engine | slope | at size 0 | r2 | points |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for fit in sorted(fits(data), key=lambda fit: (fit["sweep"], list(FIGURES).index(fit["figure"]))):
        factor, unit = SLOPES[fit["sweep"]]
        slope = f"{fit['slope'] * factor:.3g} {unit}"
        ends = [_size(fit["sweep"], fit[end]) for end in ("from", "to")]
        lines.append(
            f"| {fit['sweep']} | {FIGURES[fit['figure']]} | {fit['engine']} | {slope} | "
            f"{fit['intercept'] * 1e3:.0f} ms | {fit['r_squared']:.3f} | "
            f"{fit['num_points']}, {ends[0]} to {ends[1]} |"
        )
    return "\n".join(lines)


def points_table(data: Data) -> str:
    """Every point's medians."""
    lines = [
        "| ranks | tensors | size | engine | " + " | ".join(FIGURES[figure] for figure in FIGURES) + " |",
        "| ---: | ---: | ---: | --- |" + " ---: |" * len(FIGURES),
    ]
    for point in data["points"]:
        for engine, samples in point["samples"].items():
            values = [_seconds(samples, figure) for figure in FIGURES]
            shown = ["-" if value is None else f"{value * 1e3:.1f} ms" for value in values]
            size = _size("bytes", point["nbytes"])
            where = f"{point['num_ranks']} | {point['num_tensors']:,}"
            lines.append(f"| {where} | {size} | {engine} | " + " | ".join(shown) + " |")
    failed = [
        f"\nFailed: {engine}, {point['num_tensors']:,} tensors, {_size('bytes', point['nbytes'])}: `{reason}`"
        for point in data["points"]
        for engine, reason in point["failures"].items()
    ]
    return "\n".join([*lines, *failed])


def whole(data: Data) -> str:
    """Both tables on one page."""
    head = (
        f"Bytes: 64 equal tensors. Tensors: {total(data, 'tensors')} in all, equal ones. Ranks: "
        f"{total(data, 'ranks')} in all, each tensor cut over all ranks. Points are medians."
    )
    return "\n".join(["# How cost grows", "", head, "", table(data), "", points_table(data), ""])


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
    return " or ".join(_size("bytes", size) for size in sorted(sizes)) or "nothing"


def write_all(data: Data, directory: Path) -> str:
    """The page and the picture in `directory`; returns the text."""
    text = whole(data)
    (directory / "growth.md").write_text(text, encoding="ascii")
    draw(data, directory)
    return text


def write_docs(data: Data, directory: Path) -> None:
    """What docs/performance.md includes of this."""
    directory.mkdir(parents=True, exist_ok=True)
    draw(data, directory)
    text = table(data)
    if (directory / "growth.png").exists():
        text += f"\n\n![Curves: seconds against bytes, tensors and ranks]({directory.name}/growth.png)"
    (directory / "growth.inc").write_text(text + "\n", encoding="ascii")
    (directory / "growth-points.inc").write_text(points_table(data) + "\n", encoding="ascii")


def draw(data: Data, directory: Path) -> None:
    """growth.png, if there is something to draw it with."""
    if importlib.util.find_spec("matplotlib") is not None:
        from . import charts

        charts.draw_growth(data, directory)


def _size(sweep: str, size: float) -> str:
    if sweep != "bytes":
        return f"{size:,.0f}"
    return f"{size / 2**30:g} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
