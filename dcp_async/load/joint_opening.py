"""Opens one state of a checkpoint on all ranks, although file systems lag and saves replace it meanwhile.

Enters: a name that the coordinator chose. Leaves: Contents whose `.metadata` is the same on every rank, or on
every rank an error. Invariant: no rank reads what another rank does not have open.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Sequence

import anyio

from ..catalog import Catalog, Contents, Opened
from ..coordination import Coordinator
from ..errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, LoadError, StorageError

_RETRY_SECONDS = 0.2


async def open_same(
    catalog: Catalog | Opened,
    coordinator: Coordinator,
    uid: str,
    name: str,
    *,
    timeout: float,  # noqa: ASYNC109  # told to all by the coordinator; a cancel scope would end one rank alone
) -> Contents:
    """``name``, the same state of it on every rank.

    Each rank opens what it sees; where they differ, whoever has what is not current any more opens it again.
    A file system may show a rank an older state for a while: only the coordinator's word that a checkpoint is
    damaged or missing counts, what another rank can't open is tried again for ``timeout`` seconds.
    Ranks: all must call it. Raises: what ``Catalog.open`` raises on the coordinator; LoadError for ranks that
    do not see what it sees.
    """
    deadline = anyio.current_time() + timeout
    decide = functools.partial(_all_alike, name, deadline)
    mine: Contents | None = None
    attempt = 0
    try:
        while True:
            problem = ""
            try:
                # what is current stays open: no replace can take it from a rank while others catch up
                if mine is not None and not await catalog.is_current(mine):
                    stale, mine = mine, None
                    await stale.close()
                if mine is None:
                    mine = await catalog.open(name)
            except (CheckpointNotFoundError, CorruptCheckpointError, StorageError) as error:
                # the coordinator's file system decides what exists: others may wait for theirs
                if coordinator.is_coordinator or not _lags(error):
                    raise
                problem = str(error)
            report = (mine.digest if mine is not None else "", problem)
            phase = f"open {attempt}" if attempt else "open"
            # all get one answer, so either all are through or all look again
            if await coordinator.exchange(uid, phase, report, decide):
                assert mine is not None
                return mine
            attempt += 1
            await anyio.sleep(_RETRY_SECONDS)
    except BaseException:
        if mine is not None:
            await mine.close()
        raise


async def _all_alike(name: str, deadline: float, reports: Sequence[tuple[str, str]]) -> list[bool]:
    """The coordinator's answer to each rank's (digest, why it has none): whether all have one state open."""
    different = [rank for rank, (digest, _) in enumerate(reports) if digest != reports[0][0]]
    # raised in the decision, so that every rank gives up, and in the same words
    if different and anyio.current_time() > deadline:
        raise _differs(name, different, reports[different[0]][1])
    return [not different] * len(reports)


def _lags(error: CheckpointError) -> bool:
    """Whether a file system that still shows an older state looks like this."""
    # NFS says so of a file that was replaced on another host; no other fault looks like an older state
    return not isinstance(error, StorageError) or error.errno == errno.ESTALE


def _differs(name: str, ranks: Sequence[int], problem: str) -> LoadError:
    what = problem or "it is not the one that the coordinator sees"
    return LoadError(
        f"checkpoint {name!r} can't be opened on rank(s) {', '.join(map(str, ranks))}: {what}; "
        "are all ranks given the same root?",
        checkpoint_id=name,
    )
