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
from ..catalog import Catalog, PathOpener
from ..errors import CheckpointNotFoundError, CorruptCheckpointError
from ..info import VerifyReport
from ..options import Timeouts
from ..storage import LocalStorage, root_and_name
from ..trust import Trust
from .places import IO_CONCURRENCY, not_a_checkpoint, storage_of
from .terminal import count


@contextlib.asynccontextmanager
async def catalog_of(
    path: str, *, follow_links: bool = False, is_root: bool = False
) -> AsyncIterator[tuple[Catalog, str]]:
    """What opens the checkpoint ``path``, or the safetensors files there, and its name. Raises
    CheckpointNotFoundError, which says what to give instead.

    ``is_root``: ``path`` is what checkpoints lie under; then there is no name.
    """
    root, name = (path, "") if is_root else root_and_name(path)

    async def metadata_of(name: str) -> Metadata:
        return await catalog.metadata(name)

    timeout, opener = Timeouts().storage, None
    async with contextlib.AsyncExitStack() as stack:
        threads = BlockingThreads("dcp_async-cli", IO_CONCURRENCY + 1)
        stack.callback(threads.shutdown)
        storage = await stack.enter_async_context(storage_of(root, follow_links=follow_links))
        if isinstance(storage, LocalStorage) and not is_root:
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


async def newest_whole(root: str) -> str | None:
    """The name of the newest checkpoint under ``root`` whose files are all there and of their lengths."""
    async with catalog_of(root, is_root=True) as (catalog, _):
        info, _ = await catalog.latest()
        return None if info is None else info.checkpoint_id
