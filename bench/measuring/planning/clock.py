"""Seconds of CPU by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

MAX_SAMPLES = 64
"""Ranks on which the steps of a single rank are timed; the others do the same."""

Times = dict[str, float]


class Clock:
    """Adds up the steps of the coordinator, and keeps the median over ranks of a step of each rank.

    CPU, not wall time: what else runs on the machine counts little there.
    """

    def __init__(self, world_size: int) -> None:
        self._spans: dict[str, list[float]] = {}
        self._timed_ranks = set(range(world_size)[:: max(1, world_size // MAX_SAMPLES)])

    @contextmanager
    def span(self, step: str) -> Iterator[None]:
        """A step of the coordinator."""
        start = time.thread_time()
        yield
        self._spans.setdefault(step, []).append(time.thread_time() - start)

    @contextmanager
    def rank(self, rank: int, step: str) -> Iterator[None]:
        """A step that every rank takes, beside the others."""
        start = time.thread_time()
        yield
        if rank in self._timed_ranks:
            self._spans.setdefault(f"rank: {step}", []).append(time.thread_time() - start)

    def times(self) -> Times:
        """Seconds by step; the steps of ranks are named "rank: ..."."""
        return {
            step: statistics.median(spans) if step.startswith("rank:") else sum(spans)
            for step, spans in self._spans.items()
        }
