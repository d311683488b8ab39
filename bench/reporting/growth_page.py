"""The tables of a run of `bench.growth`.

In: growth.json, whole or of a run that was cut. Out: Markdown.
"""

from __future__ import annotations

from . import markdown
from .curves import FIGURES, fits, reaches_far, seconds, total
from .results import Data

SLOPES = {"bytes": (1e12, "ms/GB"), "tensors": (1e6, "us/tensor"), "ranks": (1e3, "ms/rank")}


def whole(data: Data) -> str:
    """Both tables on one page."""
    head = (
        f"Bytes: 64 equal tensors. Tensors: {total(data, 'tensors')} in all, equal ones. Ranks: "
        f"{total(data, 'ranks')} in all, each tensor cut over all ranks. Points are medians."
    )
    return "\n".join(["# How cost grows", "", head, "", table(data), "", points_table(data), ""])


def table(data: Data) -> str:
    """The lines, in units that people think in."""
    rows = [["grows with", "figure", "engine", "slope", "at size 0", "r2", "points"]]
    for fit in sorted(fits(data), key=lambda fit: (fit["sweep"], list(FIGURES).index(fit["figure"]))):
        factor, unit = SLOPES[fit["sweep"]]
        first, last = (_size(fit["sweep"], fit[end]) for end in ("from", "to"))
        rows.append(
            [
                fit["sweep"],
                FIGURES[fit["figure"]],
                fit["engine"],
                f"{fit['slope'] * factor:.3g} {unit}",
                f"{fit['intercept'] * 1e3:.0f} ms",
                f"{fit['r_squared']:.3f}",
                f"{fit['num_points']}, {first} to {last}",
            ]
        )
    warning = "" if reaches_far(data) else "**Short sweeps, a quick look: not to be quoted.**\n\n"
    return warning + markdown.table(rows, align="lllrrrl")


def points_table(data: Data) -> str:
    """Every point's medians."""
    rows = [["ranks", "tensors", "size", "engine", *FIGURES.values()]]
    failed = []
    for point in data["points"]:
        num_tensors, nbytes = f"{point['num_tensors']:,}", markdown.size(point["nbytes"])
        for engine, samples in point["samples"].items():
            medians = [seconds(samples, figure) for figure in FIGURES]
            cells = ["-" if value is None else f"{value * 1e3:.1f} ms" for value in medians]
            rows.append([str(point["num_ranks"]), num_tensors, nbytes, engine, *cells])
        failed += [
            f"\nFailed: {engine}, {num_tensors} tensors, {nbytes}: `{reason}`"
            for engine, reason in point["failures"].items()
        ]
    return "\n".join([markdown.table(rows, align="rrrl" + "r" * len(FIGURES)), *failed])


def _size(sweep: str, size: float) -> str:
    return markdown.size(size) if sweep == "bytes" else f"{size:,.0f}"
