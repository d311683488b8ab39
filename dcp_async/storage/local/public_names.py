"""Names that others know files of a checkpoint by: further links to what a save wrote.

Enters: a directory, names and the files that they stand for. Leaves: links. Invariant: once a sweep has
finished what was killed, a name leads to a file of the checkpoint that is there, or nowhere; what somebody
else has put under it is not touched. That a name is ours is told by the file itself, which has one of ours
besides.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..._names import attached_copy, is_blob, owned_file
from .files import sync_directory

_ASIDE = "~"


def _aside(uid: str, name: str) -> str:
    # with an ending that nothing looks for which globs: it is there before the commit
    return attached_copy(uid, f"{name}{_ASIDE}")


class PublicNames:
    """The public names of one save. For a thread that may block."""

    def __init__(self, directory: Path, uid: str, names: Mapping[str, str]) -> None:
        """``names``: name -> file, both in ``directory``."""
        self._directory = directory
        self._uid = uid
        self._names = names

    def prepare(self) -> None:
        """Link all of them aside, where ``give`` finds them, and so does a sweep if this process is killed.
        Raises OSError if one of the names is taken by a file of somebody else's."""
        if not self._names:
            return
        ours = set(names_besides(self._directory))
        for name, file in self._names.items():
            path = self._directory / name
            if path not in ours and os.path.lexists(path):
                # no FileExistsError, which says that a checkpoint is there
                raise OSError(
                    errno.ENOTEMPTY,
                    f"{name} lies there, which no save has written, and this one writes a file of that name; "
                    "move it away",
                )
            aside = self._directory / _aside(self._uid, name)
            os.link(self._directory / file, aside, follow_symlinks=False)

    def give(self) -> None:
        """Let the names stand for this save's files. What an earlier one had there goes first, so that nobody
        ever finds files of two saves side by side. Nothing if the save has none and there were none."""
        for path in names_besides(self._directory):
            path.unlink(missing_ok=True)
        give_prepared(self._directory, self._uid, self._names)

    def remove(self) -> None:
        """Take them back."""
        for name, file in self._names.items():
            path = self._directory / name
            # only if it is this save's still: a later one may have taken the name
            if path.exists() and os.path.samefile(path, self._directory / file):
                path.unlink()


def finish_names(directory: Path, uid: str, files: Sequence[str]) -> None:
    """Give the names that the save ``uid``, which has published, was killed before. Blocks. Raises OSError.

    Args:
        files: those of the save.
    """
    own = set(names_besides(directory, files, aside=True))
    head = attached_copy(uid, "")
    prepared = [
        path.name.removeprefix(head).removesuffix(_ASIDE) for path in own if path.name.startswith(head)
    ]
    if not prepared:
        return
    for path in names_besides(directory):
        if path not in own:
            path.unlink(missing_ok=True)
    give_prepared(directory, uid, prepared)
    sync_directory(directory)


def give_prepared(directory: Path, uid: str, names: Iterable[str]) -> None:
    """Move the links that lie aside to ``names``. Raises FileExistsError for one that is taken."""
    for name in names:
        path, aside = directory / name, directory / _aside(uid, name)
        # no rename, which would take the place of whatever somebody has put there meanwhile
        if not (path.exists() and os.path.samefile(path, aside)):
            os.link(aside, path, follow_symlinks=False)
        aside.unlink()


def names_besides(directory: Path, blobs: Iterable[str] | None = None, *, aside: bool = False) -> list[Path]:
    """Further names of ``blobs``, by default of all that lie there; with those that lie ``aside`` still."""
    with os.scandir(directory) as entries:
        listed = [entry for entry in entries if entry.is_file(follow_symlinks=False)]
    if blobs is None:
        blobs = [entry.name for entry in listed if is_blob(entry.name)]
    wanted = {name for name in blobs if is_blob(name)}
    if not wanted:  # as of nearly all checkpoints: no file of theirs is looked at
        return []
    files = {entry.inode() for entry in listed if entry.name in wanted}
    # the blob's own name has that inode too
    return [
        Path(entry.path)
        for entry in listed
        if entry.inode() in files
        and ((owned := owned_file(entry.name)) is None or (aside and owned.kind == "copy"))
    ]
