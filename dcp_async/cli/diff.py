"""``dcp-async diff``: how two checkpoints differ, and how far their values moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .places import Place, follow_links, run
from .progress import ProgressBar
from .terminal import Column, Exit, common, count, wants_json, write, write_json, write_table

if TYPE_CHECKING:
    from .comparison import Comparison

_CHANGED = (Column("TENSOR", least=16), Column("A", least=10), Column("B", least=10))
_MOVED = (
    Column("TENSOR", least=16),
    Column("SHAPE", drop=2, least=8),
    Column("CHANGED", ">", drop=1),
    Column("MAX ABS", ">"),
    Column("RELATIVE", ">"),
)
_LEAVES = (Column("LEAF", least=16), Column("A", least=8), Column("B", least=8))
_WHY = (Column("NOT COMPARED", least=16), Column("WHY", least=12, is_prose=True))


@click.command(short_help="Compare two checkpoints, values too.")
@click.argument("a", type=Place())
@click.argument("b", type=Place())
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--no-values", is_flag=True, help="Compare names, shapes and dtypes alone; reads no tensor.")
@click.option(
    "--top",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    metavar="N",
    help="In the table, the N tensors that moved furthest; 0 for all.",
)
@follow_links
@common
def diff(a: str, b: str, patterns: Sequence[str], no_values: bool, top: int, follow_links: bool) -> Exit:
    """Compare the checkpoints A and B, or what the PATTERNs mean of them: names, shapes, dtypes, and how far
    values moved from A to B.

    MAX ABS is the largest change of an element, RELATIVE the length of the change over the length of A's
    tensor. Tensors are read one after another, and memory is bounded. Exit status 0 if nothing differs,
    1 if anything does.
    """
    comparison = run(_compared(a, b, patterns, not no_values, follow_links))
    if wants_json():
        write_json({"a": a, "b": b, **comparison.document()})
    else:
        _print(comparison, top)
    return Exit.OK if comparison.identical else Exit.DIFFERENT


async def _compared(a: str, b: str, patterns: Sequence[str], values: bool, follow_links: bool) -> Comparison:
    from .comparison import compare  # torch, which --help can do without

    with ProgressBar("diff") as progress:
        return await compare(a, b, patterns, values=values, follow_links=follow_links, progress=progress)


def _print(comparison: Comparison, top: int) -> None:
    for where, names in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        if names:
            write_table([Column(f"ONLY IN {where}", least=16)], [[name] for name in names])
            write("")
    if comparison.changed:
        write_table(
            _CHANGED, [[entry["name"], _kind(entry["a"]), _kind(entry["b"])] for entry in comparison.changed]
        )
        write("")
    if comparison.moved:
        order = sorted(comparison.moved, key=lambda moved: -_rank(moved.relative))
        rows = [
            [
                moved.name,
                "x".join(map(str, moved.shape)) or "scalar",
                f"{moved.num_changed / moved.numel:.0%}",
                f"{moved.max_abs:.3g}",
                f"{moved.relative:.3g}",
            ]
            for moved in order
        ]
        write_table(_MOVED, rows[:top] if top else rows)
        if top and len(rows) > top:
            write(f"... and {len(rows) - top} more that moved less: --top 0 lists them")
        write("")
    if comparison.leaves:
        write_table(_LEAVES, [[entry["name"], entry["a"], entry["b"]] for entry in comparison.leaves])
        write("")
    if comparison.not_compared:
        write_table(_WHY, [[entry["name"], entry["why"]] for entry in comparison.not_compared])
        write("")
    write(_verdict(comparison))


def _verdict(comparison: Comparison) -> str:
    parts = [
        (len(comparison.only_in_a), "only in A"),
        (len(comparison.only_in_b), "only in B"),
        (len(comparison.changed), "of another shape or dtype"),
        (len(comparison.moved), "moved"),
        (len(comparison.leaves), "other than tensors differ"),
        (len(comparison.not_compared), "not compared"),
    ]
    equal = f"{count(comparison.num_equal, 'tensor')} equal"
    return ", ".join([equal, *(f"{number} {what}" for number, what in parts if number)])


def _kind(kind: dict[str, Any]) -> str:
    return (
        f"{kind['dtype']} {'x'.join(map(str, kind['shape'])) or 'scalar'}"
        if kind["shape"] is not None
        else "leaf"
    )


def _rank(relative: float) -> float:
    # as if it had moved furthest: a tensor that is no number any more is what one looks for
    return math.inf if math.isnan(relative) else relative
