"""What an engine under test looks like to the measuring loop, and what all adapters have in common.

In: a nested state dict and a directory. Out: `Pending`, a save in flight, and `load()`, in place.
Keeps: each adapter uses the engine as its documentation tells a user to, every save goes to a fresh
checkpoint, and a save is durable when `result()` returns: files and directories of an engine that syncs
neither are synced here, inside the timed span.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .files import remove, sync_tree

WAIT_SECONDS = 240.0


class Completion(Protocol):
    """A future, or a handle that is waited for like one."""

    def done(self) -> bool: ...
    def result(self, timeout: float, /) -> object: ...


def nothing() -> None:
    """Stands for work that has been done when the call returned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A save in flight."""

    blocked: float
    """Seconds for which the save call kept the caller."""
    staged: Callable[[], object]
    """Returns when the state may be mutated."""
    done: Callable[[], bool]
    result: Callable[[], object]
    """Returns when the checkpoint is durable, raises when it failed."""

    @classmethod
    def until(cls, upload: Completion, *, blocked: float, staged: Callable[[], object] = nothing) -> Pending:
        """A save that is durable when `upload` is done."""
        return cls(
            blocked=blocked, staged=staged, done=upload.done, result=lambda: upload.result(WAIT_SECONDS)
        )


class Engine(Protocol):
    """What the measuring loop needs; `describe` is the configuration that the results record.

    Constructors import the engine, so that a process pays for its own engine only, and before its memory is
    counted; `open()` makes everything that costs memory.
    """

    def describe(self) -> str: ...
    def open(self) -> None: ...
    def prepare(self) -> None: ...
    def save(self, step: int) -> Pending: ...
    def load(self, step: int) -> None: ...
    def discard(self, step: int) -> None: ...
    def close(self) -> None: ...


class Adapter:
    """A state, and a directory with one checkpoint of it per step."""

    suffix = ""
    """Ends the names of engines that write one file."""

    def __init__(self, state: dict[str, Any], root: Path) -> None:
        self._state = state
        self._root = root

    def path(self, step: int) -> Path:
        """Where the step's checkpoint lies; dcp_async names its own like this."""
        return self._root / f"step-{step:08d}{self.suffix}"

    def prepare(self) -> None:
        """Make ready for the first save; nothing, where an engine has no call for that."""

    def discard(self, step: int) -> None:
        remove(self.path(step))


def synced_afterwards(wait: Callable[[], object], path: Path) -> Future[None]:
    """A future of the checkpoint at `path` being durable: a thread waits for its writer, then syncs."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            wait()
            sync_tree(path)
        except BaseException as error:  # handed to whoever asks for the result
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    return future


def join_group(root: Path) -> None:
    """Join a gloo group of one rank."""
    import torch.distributed as dist

    # A file that an earlier rendezvous used would hang this one.
    rendezvous = (root / f"rendezvous-{uuid.uuid4().hex}").resolve()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
