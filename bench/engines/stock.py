"""The adapter of stock DCP: `save` and `async_save` of torch, as they come and at their best.

In: which executor, and whether tuned. Out: an `Engine`.
Belongs here: how stock is called. Not here: any other peer.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .adapter import WAIT_SECONDS, Pending, join_group, remove

if TYPE_CHECKING:
    from torch.distributed.checkpoint.staging import DefaultStager
    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

THREADS = 2
"""Threads of stock's writer at its best: on two cores one was slower for large tensors, four no faster."""


class Stock:
    """`torch.distributed.checkpoint` over a gloo group of one rank, or over the one that was `joined`.

    `best` reuses one `DefaultStager`, tunes the writer and caches plans; `overlap` lets that stager copy on
    its own thread; `how` is `save`, or `async_save` with its thread or its process.
    """

    def __init__(
        self,
        state: dict[str, Any],
        root: Path,
        *,
        how: Literal["sync", "thread", "process"],
        best: bool,
        overlap: bool,
        joined: bool = False,
    ) -> None:
        self._state = state
        self._root = root
        self._how = how
        self._best = best
        self._overlap = overlap
        self._joined = joined
        import torch.distributed.checkpoint  # noqa: F401 - loaded before the baseline of the memory figure is taken

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
                use_pinned_memory=False,
                use_shared_memory=self._how == "process",
                use_async_staging=self._overlap,
                use_non_blocking_copy=False,
            )
            self._stager = DefaultStager(options)

    def save(self, step: int) -> Pending:
        from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

        path = self._path(step)
        start = time.perf_counter()
        response = self._call(path)
        blocked = time.perf_counter() - start
        staging: Future[Any] | None = None
        if isinstance(response, AsyncSaveResponse):
            staging, upload = response.staging_completion, response.upload_completion
        else:
            upload = response

        def staged() -> None:
            if staging is not None:
                staging.result(WAIT_SECONDS)

        def result() -> None:
            upload.result(WAIT_SECONDS)

        return Pending(blocked=blocked, staged=staged, done=upload.done, result=result)

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

        load(self._state, checkpoint_id=self._path(step))

    def discard(self, step: int) -> None:
        remove(self._path(step))

    def close(self) -> None:
        import torch.distributed as dist

        if self._stager is not None:
            self._stager.close()
        if not self._joined:
            dist.destroy_process_group()

    def _path(self, step: int) -> Path:
        return self._root / f"stock-{step:08d}"
