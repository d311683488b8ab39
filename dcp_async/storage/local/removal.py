"""Removes a checkpoint, and finishes what a killed removal has left.

Enters: a checkpoint's directory. Leaves: nothing of the checkpoint, and everything that is not of it.
Invariant: what makes it a checkpoint goes first, and the directory is synced, so that no half of one looks
whole; until the rest has gone, a marker says whose files those are.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

from ..._names import FIRST_RANK_METADATA, METADATA, REMOVED, is_stock_data, rank_of_metadata
from ..base import NamesUids
from .files import commit_mark, rank_metadata_files, sync_directory
from .lease import remove_if_empty, sweep_directory
from .read_lease import no_readers

logger = logging.getLogger(__name__)


def remove_checkpoint(directory: Path, *, unless_read: bool, max_age: float) -> None:
    """Remove the checkpoint in ``directory``; of a link to one, the link. Blocks.

    Raises: InUseError if ``unless_read`` and somebody reads it; FileNotFoundError; OSError.
    """
    if directory.is_symlink():  # what it leads to is somebody else's
        directory.unlink()
        sync_directory(directory.parent)
        return
    if commit_mark(directory) is None and not (directory / REMOVED).exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such checkpoint", os.fspath(directory))
    # another remover may be as fast, and take the directory away at any line here
    with contextlib.suppress(FileNotFoundError):
        if commit_mark(directory) is not None:
            _unpublish(directory, unless_read=unless_read)
        sync_directory(directory)
        # a `.metadata` that lies there by now is that of a save which published meanwhile
        finish_removal(directory, lambda metadata, uids: None, max_age=max_age)
    sync_directory(directory.parent)


def _unpublish(directory: Path, *, unless_read: bool) -> None:
    """From here on it is no checkpoint, and a marker tells that it was one."""
    has_metadata = os.path.lexists(directory / METADATA)
    mark = directory / (METADATA if has_metadata else FIRST_RANK_METADATA)
    with no_readers(mark) if unless_read else contextlib.nullcontext():
        if has_metadata:
            # without a `.metadata` rank 0's makes a checkpoint, with one it is dead weight that must not come
            # to life when that goes
            for file in rank_metadata_files(directory).values():
                (directory / file).unlink(missing_ok=True)
        os.rename(mark, directory / REMOVED)


def finish_removal(directory: Path, named: NamesUids, *, max_age: float) -> None:
    """Remove what is left of a checkpoint that is none any more, and its directory if that is all there was.
    Blocks. Raises OSError."""
    sweep_directory(directory, named, max_age=max_age)
    marker = directory / REMOVED
    status = marker.stat()
    # stock's files bear no uid: what it has written to this name since is younger than the marker
    until = max(status.st_mtime_ns, status.st_ctime_ns)
    is_free = commit_mark(directory) is None
    for name in os.listdir(directory):
        is_stocks = is_stock_data(name) or (is_free and rank_of_metadata(name) is not None)
        if is_stocks and os.lstat(directory / name).st_mtime_ns <= until:
            (directory / name).unlink(missing_ok=True)
    marker.unlink(missing_ok=True)
    remove_if_empty(directory)


def sweep_checkpoint(directory: Path, named: NamesUids, *, max_age: float) -> bool:
    """As ``sweep_directory``, which a removal that was killed leaves something to finish."""
    if (directory / REMOVED).exists():
        finish_removal(directory, named, max_age=max_age)
        return False
    return sweep_directory(directory, named, max_age=max_age)
