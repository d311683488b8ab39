"""A trainer of somebody's, who runs `mypy --strict` over it with the package installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import dcp_async.sync
from dcp_async import (
    JSON,
    AsyncSaveResponse,
    CheckpointEngine,
    CheckpointExistsError,
    CheckpointInfo,
    Dtypes,
    Event,
    LoadReport,
    SaveCommitted,
    StagingOptions,
)
from dcp_async.storage import LocalStorage, Storage


class Printer:
    def on_event(self, event: Event) -> None:
        if isinstance(event, SaveCommitted):
            seconds: float = event.seconds
            print(event.info.checkpoint_id, seconds)  # noqa: T201


async def train(model: torch.nn.Module, dtypes: Dtypes = "exact") -> CheckpointInfo | None:
    notes: Mapping[str, JSON] = {"loss": 0.5, "tags": ["a", {"b": None}]}
    state: dict[str, Any] = {"model": model}
    storage: Storage = LocalStorage("checkpoints/run1")
    async with CheckpointEngine(storage, staging=StagingOptions(overlap=True), observer=Printer()) as engine:
        response: AsyncSaveResponse = await engine.save(state, step=1, notes=notes)
        await response.staging_completion
        info: CheckpointInfo = await response.upload_completion
        report: LoadReport = await engine.load(state, info, dtypes=dtypes)
        names: tuple[str, ...] = report.missing
        assert not names
        return await engine.latest()


def train_blocking(model: torch.nn.Module) -> int:
    with dcp_async.sync.CheckpointEngine("checkpoints/run2") as engine:
        try:
            info = engine.save({"model": model}).upload_completion.result(timeout=60.0)
        except CheckpointExistsError as error:
            return error.step or 0
        return info.nbytes
