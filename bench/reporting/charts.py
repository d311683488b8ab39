"""Pictures of a run: bars for each workload, curves of steps for the trainer, curves of growth.

In: a run's JSON and a directory. Out: `<workload>.png` for each workload that has figures, or `growth.png`.
Keeps: the one module that imports matplotlib, which only the environment of the bench has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from ..engines import OURS, RAW, STOCK
from . import curves, results
from .results import Data

PANELS = (
    ("staged", "stall: until the state may change [s]"),
    ("durable", "until durable [s]"),
    ("cold", "load, cold cache [s]"),
    ("peak_extra_bytes", "extra memory at the peak [MiB]"),
)
COLOURS = {"ours": "#0b6e4f", "ours, other options": "#7fb69e", "stock": "#7b8794", "peer": "#c08552"}
FLOOR = "#b3261e"
STYLES = ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)), (0, (6, 2)))
GROWTH_LINES = {"durable": "durable", "staged": "stall", "cold": "load, cold", "plan": "plan"}
WIDEST_RANGE = 15.0
"""From this ratio of the longest to the shortest bar on, the axis is logarithmic."""


def draw_run(data: Data, directory: Path) -> None:
    """All charts that the run has figures for."""
    for workload in data["workloads"]:
        figure = _trainer(data) if workload == "trainer" else _bars(data, workload)
        if figure is not None:
            _save(figure, directory / f"{workload}.png")


def _save(figure: Any, path: Path) -> None:
    # Without the version of matplotlib the same figures give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _kind(engine: str) -> str:
    if engine == OURS:
        return "ours"
    if engine.startswith(OURS):
        return "ours, other options"
    return "stock" if engine.startswith(STOCK) else "peer"


def _bars(data: Data, workload: str) -> Any:
    engines = [engine for engine in results.measured(data, workload) if engine != RAW]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
    entry = data["workloads"][workload]
    figure.suptitle(
        f"{workload}: {entry.get('num_tensors', 0):,} tensors, {entry.get('nbytes', 0) / 1e9:.2f} GB "
        "(less is better)"
    )
    for axis, (name, words) in zip(axes.flat, PANELS, strict=True):
        unit = 2**20 if name.endswith("bytes") else 1
        values = {
            engine: cell.value / unit
            for engine in engines
            if (cell := results.cell(data, workload, engine, name)) and cell.value > 0
        }
        if not values:
            axis.set_axis_off()
            continue
        floor = None if name == "peak_extra_bytes" else results.cell(data, workload, RAW, name)
        _panel(axis, values, words, floor.value if floor else None)
    return figure


def _panel(axis: Any, seconds: dict[str, float], words: str, floor: float | None) -> None:
    names = list(seconds)[::-1]  # the first bar is the lowest
    values = [seconds[name] for name in names]
    bars = axis.barh(names, values, color=[COLOURS[_kind(name)] for name in names])
    smallest = min([*values, floor] if floor else values)
    if max(values) / smallest > WIDEST_RANGE:
        axis.set_xscale("log")
        axis.set_xlim(smallest * 0.6, max(values) * 3)
    else:
        axis.set_xlim(0, max(values) * 1.18)
    axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    if floor is not None:
        axis.axvline(floor, color=FLOOR, linewidth=1.2, linestyle="--")
        axis.annotate(
            "raw limit",
            (floor, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color=FLOOR,
        )
    axis.set_title(words, fontsize=10, pad=14)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _trainer(data: Data) -> Any:
    engines = [
        engine for engine in results.measured(data, "trainer") if results.pooled(data, engine, "steps")
    ]
    if not engines:
        return None
    figure, (steps, calls) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    figure.suptitle("A real training step on the CPU, a save every 20 steps")
    plain = sorted(v for engine in engines for v in results.pooled(data, engine, "plain_steps"))
    _cumulated(steps, plain, "no saves", "#000000", "--")
    for number, engine in enumerate(engines):
        colour = COLOURS[_kind(engine)]
        _cumulated(steps, sorted(results.pooled(data, engine, "steps")), engine, colour, STYLES[number % 7])
    steps.set_xlabel("ms a step, save() not in it")
    steps.set_ylabel("share of steps that took no longer")
    steps.legend(fontsize=8, loc="lower right")
    medians = {
        engine: results.percentile(results.pooled(data, engine, "save_calls"), 50) * 1e3 for engine in engines
    }
    _panel(calls, medians, "save() keeps the trainer, median [ms]", None)
    steps.spines[["top", "right"]].set_visible(False)
    return figure


def _cumulated(axis: Any, values: list[float], name: str, colour: str, style: Any) -> None:
    shares = [(number + 1) / len(values) for number in range(len(values))]
    axis.plot([value * 1e3 for value in values], shares, label=name, color=colour, linestyle=style)


def draw_growth(data: Data, directory: Path) -> None:
    """The sweeps of `bench.growth`, ours and stock."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 5), layout="constrained")
    figure.suptitle("How cost grows (medians)")
    labels = {
        "bytes": "GiB in 64 tensors",
        **{sweep: f"{sweep}, {curves.total(data, sweep)} in all" for sweep in ("tensors", "ranks")},
    }
    for axis, sweep in zip(axes, labels, strict=True):
        for engine in data.get("engines", {}):
            for number, (name, words) in enumerate(GROWTH_LINES.items()):
                points = curves.curve(data, sweep, engine, name)
                points = [(x / 2**30 if sweep == "bytes" else x, y) for x, y in points if y > 0]
                if len(points) > 1 and not (name == "plan" and sweep == "bytes"):
                    axis.plot(
                        *zip(*points, strict=True),
                        color=COLOURS[_kind(engine)],
                        linestyle=STYLES[number],
                        marker="o",
                        markersize=3,
                        label=f"{engine}: {words}",
                    )
        axis.set_yscale("log")
        if sweep == "ranks":
            axis.set_xticks(sorted({point["num_ranks"] for point in data["points"]}))
        else:
            axis.set_xscale("log")
        axis.set_xlabel(labels[sweep])
        axis.set_ylabel("s")
        axis.spines[["top", "right"]].set_visible(False)
    lines = {line.get_label(): line for axis in axes for line in axis.lines}
    if lines:
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, directory / "growth.png")
