"""One adapter per engine under test, all with the same few verbs, so that one measuring loop serves them all.

In: a nested state dict and a directory. Out: `Pending`, a save in flight, and `load()`, in place.
Keeps: each adapter uses the engine as its documentation tells a user to; nothing is worked around, and every
save goes to a fresh checkpoint. Constructors import the engine, so that a process pays for its own engine
only, and before its memory is counted; `open()` makes everything that costs memory.
Belongs here: how to call an engine and with which options. Not here: clocks beyond the call itself,
statistics, output.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import raw

if TYPE_CHECKING:
    from torch.distributed.checkpoint.staging import DefaultStager

    from dcp_async import CheckpointEngine

BUDGET_BYTES = 128 << 20
STOCK_THREADS = 2
"""Threads of stock's writer at its best: on two cores one was slower for large tensors, four no faster."""
WAIT_SECONDS = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A save in flight."""

    blocked: float
    """Seconds for which the save call kept the caller."""
    staged: Callable[[], None]
    """Returns when the state may be mutated."""
    done: Callable[[], bool]
    result: Callable[[], None]
    """Returns when the checkpoint is durable, raises when it failed."""


class Engine(Protocol):
    """What the measuring loop needs; `describe` is the configuration that the results record."""

    def describe(self) -> str: ...
    def open(self) -> None: ...
    def save(self, step: int) -> Pending: ...
    def load(self, step: int) -> None: ...
    def discard(self, step: int) -> None: ...
    def close(self) -> None: ...


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
        _remove(self._root, f"step-{step:08d}")

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()


class Stock:
    """`torch.distributed.checkpoint` over a gloo group of one rank.

    `best` reuses one `DefaultStager`, tunes the writer and caches plans; `overlap` lets that stager copy on
    its own thread; `sync` calls `save` instead of `async_save`.
    """

    def __init__(
        self,
        state: dict[str, Any],
        root: Path,
        *,
        best: bool = False,
        overlap: bool = False,
        sync: bool = False,
    ) -> None:
        self._state = state
        self._root = root
        self._best = best
        self._overlap = overlap
        self._sync = sync
        import torch.distributed.checkpoint  # noqa: F401 - loaded before the baseline of the memory figure is taken

        self._stager: DefaultStager | None = None

    def describe(self) -> str:
        if self._sync:
            return "dcp.save(state, checkpoint_id=path)"
        if self._best:
            writer = f"FileSystemWriter(path, thread_count={STOCK_THREADS})"
            planner = "DefaultSavePlanner(enable_plan_caching=True)"
            options = f"use_async_staging={self._overlap}, nothing pinned or shared"
            stager = f"one DefaultStager for all saves ({options})"
            return f"dcp.async_save(state, storage_writer={writer}, planner={planner}, async_stager={stager})"
        return "dcp.async_save(state, checkpoint_id=path)"

    def open(self) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        # A file of its own for each opening: a rendezvous file that was used before would hang the next one.
        rendezvous = (self._root / f"rendezvous-{uuid.uuid4().hex}").resolve()
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
        if self._best:
            # Pinned memory and non-blocking copies need an accelerator; shared memory serves only the process
            # executor.
            options = StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=self._overlap,
                use_non_blocking_copy=False,
            )
            self._stager = DefaultStager(options)

    def save(self, step: int) -> Pending:
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save, save

        path = self._path(step)
        start = time.perf_counter()
        if self._sync:
            save(self._state, checkpoint_id=path)
            response: Future[Any] | AsyncSaveResponse = _finished()
        elif self._stager is not None:
            response = async_save(
                self._state,
                storage_writer=FileSystemWriter(path, thread_count=STOCK_THREADS),
                planner=DefaultSavePlanner(enable_plan_caching=True),
                async_stager=self._stager,
            )
        else:
            response = async_save(self._state, checkpoint_id=path)
        blocked = time.perf_counter() - start
        upload: Future[Any] = response if isinstance(response, Future) else response.upload_completion

        def staged() -> None:
            if not isinstance(response, Future):
                response.staging_completion.result(WAIT_SECONDS)

        def result() -> None:
            upload.result(WAIT_SECONDS)

        return Pending(blocked=blocked, staged=staged, done=upload.done, result=result)

    def load(self, step: int) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load

        load(self._state, checkpoint_id=self._path(step))

    def discard(self, step: int) -> None:
        _remove(self._root, self._path(step).name)

    def close(self) -> None:
        import torch.distributed as dist

        if self._stager is not None:
            self._stager.close()
        dist.destroy_process_group()

    def _path(self, step: int) -> Path:
        return self._root / f"stock-{step:08d}"


def make(name: str, state: dict[str, Any], root: Path) -> Engine:
    """The adapter of that name, not yet open."""
    match name:
        case "dcp_async":
            return DcpAsync(state, root)
        case "dcp_async overlap":
            return DcpAsync(state, root, overlap=True)
        case "dcp_async 128 MiB":
            return DcpAsync(state, root, budget=BUDGET_BYTES)
        case "stock":
            return Stock(state, root)
        case "stock best":
            return Stock(state, root, best=True)
        case "stock best overlap":
            return Stock(state, root, best=True, overlap=True)
        case "stock sync":
            return Stock(state, root, sync=True)
    raise ValueError(f"no engine named {name!r}")


def _finished() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(None)
    return future


def _remove(root: Path, name: str) -> None:
    # The unlinked blocks are freed by the journal's commit: wait for it here, not in the next sample.
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(root / name)
    raw.sync_directory(root)
