"""The adapter of stock DCP: `save` and `async_save` of torch, as they come and at their best.

In: which executor, and whether tuned. Out: an `Engine`.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .adapter import WAIT_SECONDS, Adapter, Pending, join_group

if TYPE_CHECKING:
    from torch.distributed.checkpoint.staging import DefaultStager
    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

THREADS = min(4, len(os.sched_getaffinity(0)))
"""Threads of stock's writer at its best: on two cores one was slower for large tensors, four no faster."""


class Stock(Adapter):
    """`torch.distributed.checkpoint` over a gloo group of one rank, or over the one that was `joined`.

    `best` reuses one `DefaultStager`, tunes the writer and caches plans; `pinned` has that stager copy into
    pinned memory, where there is an accelerator; `overlap` lets it copy on its own thread; `how` is `save`,
    or `async_save` with its thread or its process.
    """

    def __init__(
        self,
        state: dict[str, Any],
        root: Path,
        *,
        how: Literal["sync", "thread", "process"],
        best: bool,
        pinned: bool = False,
        overlap: bool,
        joined: bool = False,
    ) -> None:
        super().__init__(state, root)
        import torch.distributed.checkpoint  # before the baseline of the memory figure is taken

        self._pinned = pinned and torch.accelerator.is_available()
        self._how = how
        self._best = best
        self._overlap = overlap
        self._joined = joined
        self._stager: DefaultStager | None = None

    def describe(self) -> str:
        verb = "save" if self._how == "sync" else "async_save"
        process = ", async_checkpointer_type=PROCESS" if self._how == "process" else ""
        if not self._best:
            return f"dcp.{verb}(state, checkpoint_id=path{process})"
        writer = f"FileSystemWriter(path, thread_count={THREADS})"
        planner = "DefaultSavePlanner(enable_plan_caching=True)"
        stager = ""
        if self._how != "sync":
            shared = "shared memory" if self._how == "process" else "nothing pinned or shared"
            if self._pinned:
                shared = "pinned memory, copies that do not block"
            options = f"use_async_staging={self._overlap}, {shared}"
            stager = f", async_stager=one DefaultStager for all saves ({options})"
        return f"dcp.{verb}(state, storage_writer={writer}, planner={planner}{stager}{process})"

    def open(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if not self._joined:
            join_group(self._root)
        if self._best and self._how != "sync":
            # Pinned memory and non-blocking copies need an accelerator; shared memory serves only the process
            # executor.
            options = StagingOptions(
                use_pinned_memory=self._pinned,
                use_shared_memory=self._how == "process",
                use_async_staging=self._overlap,
                use_non_blocking_copy=self._pinned,
            )
            self._stager = DefaultStager(options)
            # torch 2.11 calls it behind each save, after which the stager can't be used again
            setattr(self._stager._state_dict_stager, "close", lambda: None)  # noqa: B010 - a method, to mypy

    def save(self, step: int) -> Pending:
        from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

        start = time.perf_counter()
        response = self._call(self.path(step))
        blocked = time.perf_counter() - start
        if not isinstance(response, AsyncSaveResponse):
            return Pending.until(response, blocked=blocked)
        staging = response.staging_completion
        return Pending.until(
            response.upload_completion, blocked=blocked, staged=lambda: staging.result(WAIT_SECONDS)
        )

    def _call(self, path: Path) -> Future[Any] | AsyncSaveResponse:
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

        kind = AsyncCheckpointerType.PROCESS if self._how == "process" else AsyncCheckpointerType.THREAD
        target: dict[str, Any] = {"checkpoint_id": path}
        if self._best:
            target = {
                "storage_writer": FileSystemWriter(path, thread_count=THREADS),
                "planner": DefaultSavePlanner(enable_plan_caching=True),
            }
        if self._how == "sync":
            save(self._state, **target)
            finished: Future[Any] = Future()
            finished.set_result(None)
            return finished
        if self._stager is not None:
            target["async_stager"] = self._stager
        return async_save(self._state, async_checkpointer_type=kind, **target)

    def load(self, step: int) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load

        load(self._state, checkpoint_id=self.path(step))

    def close(self) -> None:
        import torch.distributed as dist

        if self._stager is not None:
            self._stager.close()
        if not self._joined:
            dist.destroy_process_group()
