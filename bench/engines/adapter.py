"""What an engine under test looks like to the measuring loop, and what the adapters share.

In: a nested state dict and a directory. Out: `Pending`, a save in flight, and `load()`, in place.
Keeps: each adapter uses the engine as its documentation tells a user to, every save goes to a fresh
checkpoint, and a save is durable when `result()` returns: files and directories of an engine that syncs
neither are synced here, inside the timed span.
Belongs here: the protocol, syncing from outside, deleting. Not here: any engine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

WAIT_SECONDS = 240.0


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
    """What the measuring loop needs; `describe` is the configuration that the results record.

    Constructors import the engine, so that a process pays for its own engine only, and before its memory is
    counted; `open()` makes everything that costs memory.
    """

    def describe(self) -> str: ...
    def open(self) -> None: ...
    def save(self, step: int) -> Pending: ...
    def load(self, step: int) -> None: ...
    def discard(self, step: int) -> None: ...
    def close(self) -> None: ...


def nothing() -> None:
    """What is left to do where everything has been done."""


def synced_afterwards(wait: Callable[[], Any], path: Path) -> Future[None]:
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


def sync_tree(path: Path) -> None:
    """Make a file, or a directory with all below it, durable, and its name as well."""
    below = list(path.rglob("*")) if path.is_dir() else []
    for entry in (*below, path, path.parent):
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a checkpoint and wait until the file system has let go of it.

    The unlinked blocks are freed by the journal's commit: wait for it here, not in the next sample.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def join_group(root: Path) -> None:
    """A gloo group of one rank.

    Its rendezvous is a file of its own: one that was used before would hang the next.
    """
    import torch.distributed as dist

    rendezvous = (root / f"rendezvous-{uuid.uuid4().hex}").resolve()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """The state with modules and optimizers taken apart, for engines that would pickle them whole."""
    return {
        key: value.state_dict() if hasattr(value, "state_dict") else value for key, value in state.items()
    }


def named_tensors(node: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors below `node` under dotted names."""
    if isinstance(node, torch.Tensor):
        yield prefix, node
    elif isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            yield from named_tensors(child, f"{prefix}.{key}" if prefix else str(key))


def copy_into(state: Any, loaded: Any) -> None:
    """Hand what was loaded to the tensors that a model would have, as `load_state_dict` does."""
    found = dict(named_tensors(loaded))
    for name, tensor in named_tensors(state):
        tensor.copy_(found[name])
