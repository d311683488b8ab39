"""Our own engine's adapter, and which adapter has which name.

In: a name of `roster.ENGINES`. Out: an `Engine`, not yet open.
Belongs here: how to call `dcp_async` and with which options. Not here: peers (stock.py, peers.py), clocks
beyond the call itself, output.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import WAIT_SECONDS, Engine, Pending, remove

if TYPE_CHECKING:
    from dcp_async import CheckpointEngine

BUDGET_BYTES = 128 << 20


class DcpAsync:
    """`dcp_async.CheckpointEngine`, awaited from a loop of the main thread that stands still otherwise."""

    def __init__(
        self, state: dict[str, Any], root: Path, *, overlap: bool = False, budget: int | None = None
    ) -> None:
        self._state = state
        self._root = root
        self._overlap = overlap
        self._budget = budget
        self._runner = asyncio.Runner()
        self._engine = self._make()

    def describe(self) -> str:
        return (
            f"await engine.save(state); StagingOptions(overlap={self._overlap}, budget_bytes={self._budget})"
        )

    def _make(self) -> CheckpointEngine:
        from dcp_async import CheckpointEngine, StagingOptions

        options = StagingOptions(overlap=self._overlap, budget_bytes=self._budget)
        return CheckpointEngine(self._root, staging=options)

    def open(self) -> None:
        self._runner.run(self._engine.open())

    def save(self, step: int) -> Pending:
        async def save() -> Pending:
            start = time.perf_counter()
            response = await self._engine.save(self._state, step=step)
            blocked = time.perf_counter() - start
            staging, upload = response.staging_completion, response.upload_completion

            def staged() -> None:
                staging.result(WAIT_SECONDS)

            def result() -> None:
                upload.result(WAIT_SECONDS)

            return Pending(blocked=blocked, staged=staged, done=upload.done, result=result)

        return self._runner.run(save())

    def load(self, step: int) -> None:
        async def load() -> None:
            await self._engine.load(self._state, step)

        self._runner.run(load())

    def discard(self, step: int) -> None:
        remove(self._root / f"step-{step:08d}")

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()


def make(name: str, state: dict[str, Any], root: Path) -> Engine:
    """The adapter of that name, not yet open; imports its engine."""
    # Not at the top: a process imports the engine that it measures and no other.
    match name.split(" "):
        case ["dcp_async", *rest]:
            budget = BUDGET_BYTES if "128" in rest else None
            return DcpAsync(state, root, overlap="overlap" in rest, budget=budget)
        case ["stock", *rest]:
            from . import stock

            return stock.Stock(
                state,
                root,
                how="sync" if "sync" in rest else "process" if "process" in rest else "thread",
                best="best" in rest,
                overlap="overlap" in rest,
            )
        case [peer]:
            from . import peers

            return peers.PEERS[peer](state, root)
    raise ValueError(f"no engine named {name!r}")
