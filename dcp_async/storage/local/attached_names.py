"""Attached files under the names that they were given, for other programs: copies of what a save wrote.

Enters: a checkpoint's directory. Leaves: copies, or none of them. Invariant: what the checkpoint has is read
from its own files, so whatever others do to a copy harms nothing; a file that is no copy of ours is somebody
else's, and stays.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..._names import attached_copy, attached_file, attached_name, owned_file
from .files import sync, sync_directory
from .safe_open import open_regular

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20


def give_names(directory: Path, uid: str) -> bool:
    """Let each file that is attached to the save ``uid`` be found under its name, in place of what an earlier
    save had there; False, and a warning, if that can't be now. Safe to be killed, and to be done again."""
    try:
        _give_names(directory, uid)
    except OSError as error:  # the checkpoint has the files all the same
        logger.warning("could not copy what is attached to %s: %s", directory, error)
        return False
    return True


def _give_names(directory: Path, uid: str) -> None:
    given = False
    for name in _attached(directory).get(uid, ()):
        target = directory / name
        original = directory / attached_file(uid, name)
        if _same(target, original):  # given before, by a process that died behind it
            continue
        if os.path.lexists(target) and not is_copy(directory, name):
            logger.warning(
                "%s is no file of this checkpoint and stays as it is; what was attached as %r is in %s",
                *(target, name, original.name),
            )
            continue
        # whole and synced before it has the name: nobody reads half a file, after a power cut neither
        copy = directory / attached_copy(uid, name)
        _copy(original, copy)
        os.rename(copy, target)
        given = True
    if given:
        sync_directory(directory)


def is_copy(directory: Path, name: str) -> bool:
    """Whether ``name`` is a copy of what some save there has attached under it."""
    # by its bytes: whatever copied the directory kept neither inodes nor times
    return any(
        _same(directory / name, directory / attached_file(uid, name))
        for uid, names in _attached(directory).items()
        if name in names
    )


def take_names(directory: Path, uid: str) -> None:
    """Remove the copies of what is attached to the save ``uid``, which is about to be removed. Raises
    OSError."""
    attached = _attached(directory)
    # one that another save has attached as well may be that one's copy
    others = {name for other, names in attached.items() if other != uid for name in names}
    for name in attached.get(uid, ()):
        if name not in others and _same(directory / name, directory / attached_file(uid, name)):
            (directory / name).unlink(missing_ok=True)


def _attached(directory: Path) -> dict[str, list[str]]:
    """uid -> the names of what is attached to that save."""
    by_uid: dict[str, list[str]] = {}
    for file in sorted(os.listdir(directory)):
        owned = owned_file(file)
        if owned is not None and owned.kind == "attached":
            by_uid.setdefault(owned.uid, []).append(attached_name(file))
    return by_uid


def _same(path: Path, original: Path) -> bool:
    """Whether both are regular files of the same bytes."""
    try:
        first = open_regular(path)
    except OSError:  # not there, a link, a directory, closed to this process
        return False
    # in chunks, since they may be as large as all that a save attaches
    with os.fdopen(first, "rb") as one, os.fdopen(open_regular(original), "rb") as other:
        if os.fstat(one.fileno()).st_size != os.fstat(other.fileno()).st_size:
            return False
        while chunk := one.read(_CHUNK_BYTES):
            if chunk != other.read(_CHUNK_BYTES):
                return False
        return True


def _copy(original: Path, copy: Path) -> None:
    # one that lies there is that of a process that was killed at it
    copy.unlink(missing_ok=True)
    with os.fdopen(open_regular(original), "rb") as source, open(copy, "xb", buffering=0) as target:
        while left := memoryview(source.read(_CHUNK_BYTES)):
            while left:
                left = left[target.write(left) :]
        sync(target.fileno())
