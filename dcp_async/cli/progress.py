"""A bar on standard error, with a rate and the time left, for what takes longer than a second.

Enters: how much is done, and of how much. Leaves: a line on the terminal that goes again at the end.
Invariant: where standard error is no terminal, nothing is written.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .terminal import size_text

if TYPE_CHECKING:
    import rich.progress

_PATIENCE = 1.0
"""Seconds after which somebody wants to know."""


class ProgressBar:
    """``with ProgressBar("verify") as progress: ...; progress(done_bytes, total_bytes)``. Owns its line."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._begun: float | None = None
        """At the first call: what went on before is not what the rate is of."""
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._begun is None:
            self._begun = time.monotonic()
        seconds = time.monotonic() - self._begun
        if self._bar is None:
            if seconds < _PATIENCE or not sys.stderr.isatty():
                return
            self._bar, self._task = self._start(total)
        assert self._task is not None
        rate = done / seconds
        text = f"{size_text(done)} of {size_text(total)}, {size_text(rate)}/s"
        self._bar.update(self._task, completed=done, total=total, text=text)

    def _start(self, total: int) -> tuple[rich.progress.Progress, rich.progress.TaskID]:
        # here: most commands are over before they need it, and it takes as long as they do
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn(self._what),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
            expand=True,
        )
        bar.start()
        return bar, bar.add_task(self._what, total=total, text="")
