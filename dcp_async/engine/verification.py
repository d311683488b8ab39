"""Verifies one checkpoint by its path alone, without an engine, a model or a process group.

Enters: a path. Leaves: a VerifyReport. Invariant: whatever happens, the threads that it took have ended.
dcp_async.sync has the blocking twin.
"""

from __future__ import annotations

import os

from .._concurrency import Verb, drive
from ..errors import CheckpointNotFoundError
from ..info import VerifyReport
from ..options import Limits, Timeouts
from ..trust import Trust
from .checkpoint import reader_at
from .lifetime import Lifetime
from .load_context import LoadContext
from .reads import Reads


def verifying(life: Lifetime, name: str) -> Verb[VerifyReport]:
    """What ``verify`` does between the start and the end of ``life``."""
    try:
        with life.storage_errors("open"):
            yield from life.opening()
        report = yield from Reads(LoadContext(life)).verifying(name, is_name=True)
    except CheckpointNotFoundError as error:
        yield from life.leaving(type(error))
        raise CheckpointNotFoundError(
            f"there is no checkpoint {name!r} in {life.setup.storage!r}; give the directory of one "
            "checkpoint, which has a .metadata, not that of a run",
            checkpoint_id=name,
        ) from error
    except BaseException as error:
        yield from life.leaving(type(error))
        raise
    yield from life.leaving(None)
    return report


async def verify(
    path: str | os.PathLike[str],
    *,
    trust: Trust = Trust(),
    limits: Limits = Limits(),
    timeouts: Timeouts = Timeouts(),
) -> VerifyReport:
    """Read all of the checkpoint in the directory ``path``, ours or stock's, and tell what of it is damaged.

    Args:
        path: the checkpoint's own directory, or its URL, as for ``open_checkpoint``.
        trust: whether links out of its directory are followed; no leaf is unpickled.
        limits: how many reads go on at once; each takes 8 MiB of memory.
        timeouts: how long one of them may take.
    Raises: CheckpointNotFoundError; CorruptCheckpointError if `.metadata` can't be read at all; StorageError
        if the medium can't be asked. What is damaged is no error: see ``VerifyReport.ok``.
    """
    life, name = reader_at(path, trust=trust, limits=limits, timeouts=timeouts)
    return await drive("verify", verifying(life, name), life.inside)
