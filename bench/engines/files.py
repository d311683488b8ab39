"""Files as the bench needs them: made durable from outside, removed for good, forgotten by the page cache.

In: paths below a directory of the bench. Out: their state on the disk or in the cache.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, durable."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)


def sync_tree(path: Path) -> None:
    """Make a file, or a directory with all below it, durable, and its name as well."""
    below = list(path.rglob("*")) if path.is_dir() else []
    for entry in (*below, path, path.parent):
        sync(entry)


def remove(path: Path) -> None:
    """Delete a checkpoint and wait until the file system has let go of it."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    # The journal's commit frees the unlinked blocks: it is waited for here, not in the next sample.
    sync(path.parent)


def drop_cache(directory: Path) -> None:
    """Forget the cached pages of every file below `directory` (POSIX_FADV_DONTNEED, after a sync).

    A cold cache is this machine's: the host of a virtual one may still hold the blocks.
    """
    for path in directory.rglob("*"):
        if path.is_file():
            with _opened(path) as descriptor:
                os.fsync(descriptor)  # dirty pages would stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def warm_cache(directory: Path) -> None:
    """Read every file below `directory` once, so that its pages are cached."""
    buffer = bytearray(8 << 20)
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
