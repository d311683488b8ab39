"""In which order checkpoints were saved, as far as steps, names and times tell.

Enters: what is known of each without opening it. Leaves: names, ascending. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBERED = re.compile(r"(.*?)([0-9]+)", re.DOTALL)
_DECIMAL = re.compile(r"[0-9]\.$")


def family_of(name: str) -> tuple[str, int]:
    """A name without the digits at its end, and their number; all of it, and -1, if it has none."""
    match = _NUMBERED.fullmatch(name)
    # of 0.93 and 0.5 the digits behind the point say nothing
    if match is None or _DECIMAL.search(match[1]):
        return name, -1
    return match[1], int(match[2])


def ascending(told: Iterable[tuple[str, int | None, float]]) -> dict[str, int | None]:
    """Name -> step, of (name, step, time): by step, then by time.

    Those without a step come first. Where names differ in the digits at their end alone (checkpoint-7,
    checkpoint-10) these are their order, since a copy has other times; such families, and all other names,
    are ordered by when one of them was last written.
    """
    entries = list(told)
    # looked at once: there may be ten thousand under a root
    families = {name: family_of(name) for name, step, _ in entries if step is None}
    newest: dict[str, float] = {}
    for name, step, modified in entries:
        if step is None:
            family, _ = families[name]
            newest[family] = max(newest.get(family, modified), modified)

    def unnumbered(entry: tuple[str, int | None, float]) -> tuple[float, str, int, float]:
        name, _, modified = entry
        family, number = families[name]
        return newest[family], family, number, modified

    without = sorted((entry for entry in entries if entry[1] is None), key=unnumbered)
    stepped = sorted((entry for entry in entries if entry[1] is not None), key=lambda entry: entry[1:])
    return {name: step for name, step, _ in (*without, *stepped)}
