"""The adapter of `dcp_async.CheckpointEngine`: its public names, called as a user's program calls them.

In: whether saves overlap, and the budget of staging memory. Out: an `Engine`.
Keeps: nothing of the package but its public names is used, so that `against` can drive any revision of it.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import WAIT_SECONDS, Adapter, Pending

if TYPE_CHECKING:
    from dcp_async import CheckpointEngine


class DcpAsync(Adapter):
    """`dcp_async.CheckpointEngine`, awaited from a loop of the main thread that stands still otherwise."""

    def __init__(
        self, state: dict[str, Any], root: Path, *, overlap: bool = False, budget: int | None = None
    ) -> None:
        super().__init__(state, root)
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

    def prepare(self) -> None:
        async def prepare() -> None:
            await self._engine.prepare(self._state)

        self._runner.run(prepare())

    def save(self, step: int) -> Pending:
        async def save() -> Pending:
            start = time.perf_counter()
            response = await self._engine.save(self._state, step=step)
            blocked = time.perf_counter() - start
            staging = response.staging_completion
            return Pending.until(
                response.upload_completion, blocked=blocked, staged=lambda: staging.result(WAIT_SECONDS)
            )

        return self._runner.run(save())

    def load(self, step: int) -> None:
        async def load() -> None:
            await self._engine.load(self._state, step)

        self._runner.run(load())

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()
