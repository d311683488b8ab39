"""Names that others know files of a checkpoint by: further links to what a save wrote.

Enters: a directory, names and the files that they stand for. Leaves: links. Invariant: a name leads to a file
of the checkpoint that is there, or nowhere; what somebody else has put under it is not touched. That a name
is ours is told by the file itself, which has one of ours besides.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..._names import is_blob, owned_file


class PublicNames:
    """The public names of one save. For a thread that may block."""

    def __init__(self, directory: Path, names: Mapping[str, str]) -> None:
        """``names``: name -> file, both in ``directory``."""
        self._directory = directory
        self._names = names

    def check(self) -> None:
        """Raises OSError if one of the names is taken by a file of somebody else's."""
        if not self._names:
            return
        ours = set(names_besides(self._directory))
        for name in self._names:
            path = self._directory / name
            if path not in ours and os.path.lexists(path):
                # no FileExistsError, which says that a checkpoint is there
                raise OSError(
                    errno.ENOTEMPTY,
                    f"{name} lies there, which no save has written, and this one writes a file of that name; "
                    "move it away",
                )

    def replace(self) -> None:
        """Let the names stand for this save's files. What an earlier one had there goes first, so that nobody
        ever finds files of two saves side by side. Nothing if the save has none and there were none."""
        for path in names_besides(self._directory):
            path.unlink(missing_ok=True)
        for name, file in self._names.items():
            os.link(self._directory / file, self._directory / name, follow_symlinks=False)

    def remove(self) -> None:
        """Take them back."""
        for name, file in self._names.items():
            path = self._directory / name
            # only if it is this save's still: a later one may have taken the name
            if path.exists() and os.path.samefile(path, self._directory / file):
                path.unlink()


def names_besides(directory: Path, blobs: Iterable[str] | None = None) -> list[Path]:
    """Further names of ``blobs``, by default of all that lie there."""
    with os.scandir(directory) as entries:
        listed = [entry for entry in entries if entry.is_file(follow_symlinks=False)]
    if blobs is None:
        blobs = [entry.name for entry in listed if is_blob(entry.name)]
    wanted = {name for name in blobs if is_blob(name)}
    if not wanted:  # as of nearly all checkpoints: no file of theirs is looked at
        return []
    files = {entry.inode() for entry in listed if entry.name in wanted}
    # the blob's own name has that inode too
    return [Path(entry.path) for entry in listed if entry.inode() in files and owned_file(entry.name) is None]
