"""One checkpoint by its path, through the catalog: for commands that read of it, and need torch.

Enters: a path or a URL. Leaves: a Catalog and the checkpoint's name in it. Invariant: whatever happens, the
threads that reading took have ended.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import BlockingThreads
from ..catalog import Catalog, PathOpener, Pruner, Retention, RetentionPlan
from ..errors import CheckpointNotFoundError, CorruptCheckpointError
from ..info import VerifyReport
from ..options import Timeouts
from ..storage import LocalStorage, root_and_name
from ..trust import Trust
from .places import IO_CONCURRENCY, no_metadata, not_a_checkpoint, storage_of
from .terminal import count


@contextlib.asynccontextmanager
async def catalog_of(path: str, *, follow_links: bool = False) -> AsyncIterator[tuple[Catalog, str]]:
    """What opens the checkpoint ``path``, or the safetensors files there, and its name. Raises
    CheckpointNotFoundError, which says what to give instead.
    """
    root, name = root_and_name(path)

    async def metadata_of(name: str) -> Metadata:
        return await catalog.metadata(name)

    timeout, opener = Timeouts().storage, None
    async with contextlib.AsyncExitStack() as stack:
        threads = BlockingThreads("dcp_async-cli", IO_CONCURRENCY + 1)
        stack.callback(threads.shutdown)
        storage = await stack.enter_async_context(storage_of(root, follow_links=follow_links))
        if isinstance(storage, LocalStorage):
            opener = PathOpener(
                os.fspath(storage.root),
                storage,
                threads,
                metadata_of,
                timeout=timeout,
                trust=Trust(follow_links=follow_links),
            )
            # before it is opened: it tells the usual mistakes apart
            await opener.check(os.path.join(storage.root, name))
        catalog = Catalog(storage, threads, metadata_of, timeout=timeout, opener=opener)
        try:
            yield catalog, name
        except CheckpointNotFoundError as error:
            # of another one, say in the middle of reading: its own words fit better
            if error.checkpoint_id != name:
                raise
            raise not_a_checkpoint(path, name) from error


def refuse_damaged(source: str, report: VerifyReport, undone: str) -> None:
    """Raises CorruptCheckpointError, which says what was not done, unless ``source`` is whole."""
    if report.damage:
        first = report.damage[0]
        raise CorruptCheckpointError(
            f"{source} is damaged in {count(len(report.damage), 'place')}, first in {first.file}: "
            f"{first.reason}; {undone}. dcp-async verify tells all",
            checkpoint_id=os.path.basename(source),
        )


async def plan_of(root: str, policy: Retention) -> RetentionPlan:
    """What a save under ``policy`` would keep of ``root`` and what not: links are heeded, and those of the
    newest that are not whole count for nothing, and are in neither."""
    threads = BlockingThreads("dcp_async-cli", IO_CONCURRENCY + 1)
    try:
        async with storage_of(root) as storage:
            catalog = Catalog(storage, threads, no_metadata, timeout=Timeouts().storage)
            return await Pruner(catalog, storage, policy, threads).plan()
    finally:
        threads.shutdown()
