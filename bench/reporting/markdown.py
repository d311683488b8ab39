"""Tables and figures as Markdown shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Unit = Literal["s", "MiB"]


def table(rows: Sequence[Sequence[str]], *, align: str = "") -> str:
    """A Markdown table; the first row is its head.

    `align` has an `l` or an `r` for each column, by default one column of words before columns of figures.
    """
    align = align or "l" + "r" * (len(rows[0]) - 1)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join({"l": "---", "r": "---:"}[side] for side in align) + " |")
    return "\n".join(lines)


def figure(value: float, unit: Unit) -> str:
    """A figure with its unit: seconds from 1 s on, milliseconds below."""
    if unit == "MiB":
        return f"{value / 2**20:.0f} MiB"
    if abs(value) >= 1:
        return f"{value:.2f} s"
    return f"{value * 1000:.0f} ms" if abs(value) >= 0.01 else f"{value * 1000:.1f} ms"


def times(ratio: float | None) -> str:
    """How many times ours."""
    return "-" if ratio is None else f"{ratio:.2g}x" if ratio < 10 else f"{ratio:.0f}x"


def size(nbytes: float) -> str:
    """A number of bytes, in GiB from one on, in MiB below."""
    return f"{nbytes / 2**30:g} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"
