"""Where commands look: the storage of a root or of a checkpoint, opened for one command and closed after it.

Enters: paths and URLs as people type them. Leaves: a storage, or one line that says what is not there.
Invariant: looking makes nothing: a root that is not there is an error, and stays so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import click

from ..errors import CheckpointNotFoundError
from ..info import CheckpointInfo
from ..options import Limits, Timeouts
from ..storage import LocalStorage, Storage, storage_at

T = TypeVar("T")

IO_CONCURRENCY = Limits().io_concurrency


class Place(click.ParamType[str]):
    """A path or a URL; the shell completes it as a path."""

    name = "path"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        return [click.shell_completion.CompletionItem(incomplete, type="file")]


follow_links = click.option(
    "--follow-links", is_flag=True, help="Read also what lies behind links out of the checkpoint's root."
)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """What ``coroutine`` returns; an interrupt cancels it, and is raised once it has ended."""
    return asyncio.run(coroutine)


@contextlib.asynccontextmanager
async def storage_of(root: str, *, follow_links: bool = False) -> AsyncIterator[Storage]:
    """The storage at ``root``. Raises FileNotFoundError if there is no such directory; ValueError for a URL
    that no storage serves."""
    timeouts = Timeouts()
    storage = storage_at(
        root,
        io_concurrency=IO_CONCURRENCY,
        timeout=timeouts.storage,
        lease_max_age=2 * timeouts.coordination,
        follow_links=follow_links,
    )
    try:
        # a storage takes it for a run that has not saved yet; who typed it has misspelled it
        if isinstance(storage, LocalStorage) and not storage.root.exists():
            raise FileNotFoundError(f"there is no directory {os.fspath(storage.root)}")
        await storage.connect()
        yield storage
    finally:
        await storage.close()


def not_a_checkpoint(path: str, name: str) -> CheckpointNotFoundError:
    """What to tell whoever gave ``path`` for a checkpoint."""
    return CheckpointNotFoundError(
        f"there is no checkpoint {path}; give the directory of one checkpoint, which has a .metadata, not "
        "that of a run",
        checkpoint_id=name,
    )


async def no_metadata(name: str) -> Any:
    """In place of the way to a checkpoint's metadata, for which a list has no use."""
    raise CheckpointNotFoundError(f"{name!r} was listed, not opened", checkpoint_id=name)


def info_document(info: CheckpointInfo) -> dict[str, Any]:
    """The fields of ``info`` as a JSON document has them."""
    return {
        "name": info.checkpoint_id,
        "step": info.step,
        "time": info.time,
        "nbytes": info.nbytes,
        "num_files": info.num_files,
        "world_size": info.world_size,
        "torch_version": info.torch_version,
        "producer": info.producer,
        "notes": dict(info.notes),
        "attached": dict(info.files),
    }
