"""What lies under a root: which entries may be checkpoints, and which links stand for what.

Enters: a root. Leaves: a StoredCheckpoint per directory. Invariant: nothing is opened here, and one entry
that can't be looked at hides no other.
"""

from __future__ import annotations

import heapq
import logging
import os
from collections.abc import Sequence, Set
from pathlib import Path

from ..._names import FIRST_RANK_METADATA, METADATA, is_manifest, is_step_directory
from ..base import Glimpse, StoredCheckpoint
from .files import commit_mark
from .safe_open import is_beneath, open_regular

logger = logging.getLogger(__name__)

_LOOKED_AT = 256
"""How many of the step directories that are known are looked at again each time: the newest."""
_NO_CHECKPOINTS = frozenset({"lost+found"})
"""The file system's own, closed to everybody."""


class Listing:
    """What lies under one root, looked at again and again.

    Looking into ten thousand directories takes a tenth of a second, each time. So of the directories that
    steps have named, those far behind the newest are taken to be what they were; whoever opens one finds out
    what it is. Their names are always those that lie there now.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, StoredCheckpoint] = {}
        """Committed step directories."""
        self._newest: Set[str] = frozenset()
        """Those of them that are looked at again."""

    def look(self) -> list[StoredCheckpoint]:
        """What lies under the root; nothing if there is no such directory. Blocks. Raises OSError for the
        root itself."""
        try:
            with os.scandir(self._root) as entries:
                listed = [entry for entry in entries if not entry.name.startswith(".")]
        except FileNotFoundError:
            return []
        known, newest = self._known, self._newest
        checkpoints: list[StoredCheckpoint] = []
        others: list[os.DirEntry[str]] = []
        for entry in listed:
            stored = known.get(entry.name)
            # one that is a link by now has been moved
            if stored is not None and stored.name not in newest and entry.is_dir(follow_symlinks=False):
                checkpoints.append(stored)
            else:
                others.append(entry)
        checkpoints += _look_at_all(others, self._root)
        # made anew: another thread may look as well
        seen = {
            stored.name: stored
            for stored in checkpoints
            if stored.committed and (stored.name in known or is_step_directory(stored.name))
        }
        if seen.keys() != known.keys():
            # by length first: a number of nine digits comes after those of eight
            largest = heapq.nlargest(_LOOKED_AT, seen, key=lambda name: (len(name), name))
            self._newest = frozenset(largest)
        self._known = seen
        return checkpoints


def _look_at_all(entries: Sequence[os.DirEntry[str]], root: Path) -> list[StoredCheckpoint]:
    checkpoints: list[StoredCheckpoint] = []
    for entry in entries:
        try:
            stored = _look_at(entry, root)
        except FileNotFoundError:  # removed meanwhile
            continue
        except OSError as error:
            logger.debug("%r can't be looked at: %s", entry.path, error)
            # left out, an older one would be taken for the newest; whoever opens this one is told why not
            stored = StoredCheckpoint(name=entry.name, committed=True, modified=_changed(entry))
        if stored is not None:
            checkpoints.append(stored)
    return checkpoints


def _look_at(entry: os.DirEntry[str], root: Path) -> StoredCheckpoint | None:
    """What an entry is; None for what can't be a checkpoint. Raises OSError where that can't be told."""
    if entry.is_symlink():
        return _linked(entry, os.path.realpath(root))
    if not entry.is_dir(follow_symlinks=False) or entry.name in _NO_CHECKPOINTS:
        return None
    mark = commit_mark(entry.path)
    changed = mark or entry.stat(follow_symlinks=False)
    return StoredCheckpoint(
        name=entry.name,
        committed=mark is not None,
        modified=changed.st_mtime,
        # the time alone may be that of two replaces: file systems count it in milliseconds
        version=f"{mark.st_ino}-{mark.st_mtime_ns}" if mark is not None else "",
    )


def _changed(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except OSError as error:
        logger.debug("%r has no status: %s", entry.path, error)
        return 0.0


def _linked(entry: os.DirEntry[str], root: str) -> StoredCheckpoint | None:
    """What a link stands for. One to a sibling is an alias; one to a directory that is no checkpoint, or to
    an entry of this root that is gone, is nothing."""
    try:
        real = os.path.realpath(entry.path, strict=True)
    except FileNotFoundError:
        if is_beneath(os.path.realpath(entry.path), root):
            logger.debug("%r is a link to nothing", entry.path)
            return None
        # a disk that is not mounted, whatever the link is called: whoever opens it is told
        return StoredCheckpoint(name=entry.name, committed=True, modified=_changed(entry))
    if not os.path.isdir(real):
        return None
    mark = commit_mark(real)
    # its target is listed by its own name
    if os.path.dirname(real) == root and not os.path.basename(real).startswith("."):
        changed = mark.st_mtime if mark is not None else 0.0
        alias = os.path.basename(real)
        return StoredCheckpoint(name=entry.name, committed=False, modified=changed, alias_of=alias)
    if mark is None:
        return None
    return StoredCheckpoint(name=entry.name, committed=True, modified=mark.st_mtime)


def glimpse_checkpoints(root: Path, head_bytes: int) -> list[Glimpse]:
    """See ``Glimpses``; as ``Listing`` in all else. Blocks. Raises OSError for the root itself."""
    glimpses = []
    # links and what can't be looked at are few, and told by the rules above
    others = []
    try:
        with os.scandir(root) as entries:
            listed = [entry for entry in entries if not entry.name.startswith(".")]
    except FileNotFoundError:
        return []
    for entry in listed:
        try:
            glimpse = _glimpse(entry.path, entry.name, head_bytes) if _is_plain(entry) else None
        except OSError as error:
            logger.debug("%r can't be looked at: %s", entry.path, error)
            glimpse = None
        if glimpse is None:
            others.append(entry)
        else:
            glimpses.append(glimpse)
    return glimpses + [Glimpse(stored, None, None) for stored in _look_at_all(others, root)]


def _is_plain(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and entry.name not in _NO_CHECKPOINTS


def _glimpse(path: str, name: str, head_bytes: int) -> Glimpse | None:
    """What the directory ``path`` shows; None if it is no whole checkpoint at first sight."""
    # by name alone where that will do: this is done 10,000 times for one list
    names = os.listdir(path)
    mark = METADATA if METADATA in names else FIRST_RANK_METADATA
    if mark not in names:
        return None
    manifests = [name for name in names if is_manifest(name)]
    stored = StoredCheckpoint(name=name, committed=True, modified=os.lstat(f"{path}/{mark}").st_mtime)
    if not manifests:
        return Glimpse(stored, None, {name: os.lstat(f"{path}/{name}").st_size for name in names})
    if len(manifests) > 1:
        return Glimpse(stored, None, None)
    fd = open_regular(f"{path}/{manifests[0]}")
    try:
        return Glimpse(stored, os.read(fd, head_bytes), None)
    finally:
        os.close(fd)
