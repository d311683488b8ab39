"""What of a checkpoint is damaged: ranges of its files, each with the names of what lies there.

Enters: where items lie, and bytes that were found damaged. Leaves: DamagedRanges, merged and in order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..info import DamagedRange


@dataclass(frozen=True, slots=True)
class Item:
    """Bytes [start, stop) of a file belong to ``name``."""

    start: int
    stop: int
    name: str
    is_packed: bool
    """Whether it is no zip of torch's as it lies there: its extensions wrote it, or it is bare bytes."""


class Damage:
    """Collects what is damaged."""

    def __init__(self) -> None:
        self.items: dict[str, list[Item]] = {}
        """By file, ascending."""
        self._ranges: list[DamagedRange] = []

    def of(self, file: str) -> list[DamagedRange]:
        """What of ``file`` is damaged, so far."""
        return [damaged for damaged in self._ranges if damaged.file == file]

    def add(self, file: str, start: int, stop: int, reason: str) -> None:
        """Bytes [start, stop) of ``file`` are damaged."""
        items = self.items.get(file, [])
        # those that begin before are ascending, and of plain files end before the next begins
        until = bisect_left(items, stop, key=lambda item: item.start)
        names = dict.fromkeys(item.name for item in items[:until] if item.stop > start)
        self._ranges.append(
            DamagedRange(file=file, start=start, stop=stop, names=tuple(names), reason=reason)
        )

    def merged(self) -> Iterator[DamagedRange]:
        """What is damaged, ascending; neighbours for the same reason as one."""
        last: DamagedRange | None = None
        for damage in sorted(self._ranges, key=lambda damage: (damage.file, damage.start, damage.stop)):
            if last is None:
                last = damage
            elif (last.file, last.stop, last.reason) == (damage.file, damage.start, damage.reason):
                names = tuple(dict.fromkeys((*last.names, *damage.names)))
                last = replace(last, stop=damage.stop, names=names)
            else:
                yield last
                last = damage
        if last is not None:
            yield last
