"""The clock of a loop, moved by the test instead of by the time that a busy machine needs."""

from __future__ import annotations

import asyncio


def skip_time(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """Let ``seconds`` pass at once on a loop of asyncio's; to be called on its thread.

    What is due by then is called in the next turn. So a deadline passes at the moment that the test chooses,
    and none has to be met by a machine that others use.
    """
    before = loop.time
    setattr(loop, "time", lambda: before() + seconds)  # noqa: B010 - for mypy
