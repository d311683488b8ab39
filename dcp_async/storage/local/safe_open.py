"""Opens what lies under a root, and nothing else: no link out of it, no device, no FIFO, no endless file.

Enters: names that somebody else may have written. Leaves: descriptors of directories and regular files, or an
error that says why not. Invariant: whatever is opened is looked at by its descriptor, so nothing can be
exchanged between the look and the use, and no call here waits for a writer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..base import LinkError, UnreadableError

# O_NONBLOCK: opening a FIFO would wait for a writer, for ever
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

SMALL_FILE_BYTES = 2 << 30
"""More than any `.metadata` or manifest has: a million tensors come to some hundred MB."""
_DENSE_BYTES = 1 << 20
"""A file that is longer is asked for holes; asking costs more than reading a shorter one."""

# What a second look can't mend: it says something of this entry, not of the medium.
_UNFIT = frozenset(
    {
        errno.EACCES,
        errno.EFBIG,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENODEV,
        errno.ENOTDIR,
        errno.ENXIO,
        errno.EPERM,
    }
)
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


@contextlib.contextmanager
def unfit_entries(verb: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """What is wrong with an entry itself becomes an UnreadableError; what the medium says passes."""
    try:
        yield
    except (LinkError, UnreadableError):
        raise
    except OSError as error:
        if error.errno in _UNFIT:
            raise UnreadableError.of(verb, os.fspath(path), error) from error
        raise


def is_beneath(path: str, directory: str) -> bool:
    """Whether ``path`` is ``directory`` or below it; both without links."""
    return os.path.commonpath((path, directory)) == directory


def _checked(fd: int) -> int:
    """``fd``, if it is a regular file's; else it is closed. Raises OSError."""
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "something else")
            raise OSError(errno.ENXIO, f"it is {kind}, not a regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_regular(path: str | os.PathLike[str], *, dir_fd: int | None = None) -> int:
    """A descriptor of the regular file ``path``, to read; never waits, follows no link at its end. Raises
    OSError."""
    try:
        return _checked(os.open(path, _READ, dir_fd=dir_fd))
    except OSError as error:
        if error.errno == errno.ENXIO and error.filename is not None:  # by open(): nobody can read from it
            raise OSError(errno.ENXIO, "it is a socket or a device, not a regular file") from error
        raise


def read_small(fd: int) -> bytes:
    """The content of a file that must be small, as long as it was when this began; closes ``fd``.

    Raises OSError (EFBIG) before anything is read where the length is no such file's, or only pretended by
    holes.
    """
    with open(fd, "rb", buffering=0) as file:
        size = os.fstat(fd).st_size
        if size > SMALL_FILE_BYTES:
            raise OSError(errno.EFBIG, f"it is {size} bytes long, which no such file is")
        if (hole := _first_hole(fd, size)) < size:
            raise OSError(errno.EFBIG, f"it is {size} bytes long and has holes, from byte {hole} on")
        # no more than it had: a file that grows while it is read would be read for as long as it does
        parts: list[bytes] = []
        while size and (part := file.read(size)):
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _first_hole(fd: int, size: int) -> int:
    """Where a file says bytes that nobody has written; ``size`` if nowhere, or if nobody knows."""
    if size <= _DENSE_BYTES or not hasattr(os, "SEEK_HOLE"):
        return size
    try:
        hole = os.lseek(fd, 0, os.SEEK_HOLE)
    except OSError:  # a file system that does not tell
        hole = size
    os.lseek(fd, 0, os.SEEK_SET)
    return hole


def open_beneath(directory_fd: int, parts: list[str], flags: int) -> int:
    """Opens ``parts`` one below the other, following no link anywhere."""
    # step by step, each without following: realpath() was right a moment ago, and a directory on the way may
    # have been exchanged for a link since
    inner = os.dup(directory_fd)
    try:
        for part in parts[:-1]:
            inner, outer = os.open(part, _DIRECTORY, dir_fd=inner), inner
            os.close(outer)
        return os.open(parts[-1] if parts else ".", flags, dir_fd=inner)
    finally:
        os.close(inner)


class CheckpointDirectory:
    """One checkpoint's directory, held by a descriptor. Owns it; ``close()`` releases it.

    Links: one that leads below the root is followed. One that leads out of it is followed if ``follow_links``
    is set, the root's owner made it, and what it leads to is that owner's.
    """

    def __init__(self, root: Path, name: str, *, follow_links: bool) -> None:
        """Raises: FileNotFoundError; LinkError; UnreadableError for what is no directory, or closed to this
        process; OSError."""
        # a checkpoint lies right below the root: a path could lead out of it
        if "/" in name or name in ("", ".", "..") or not _is_a_name(name):
            raise FileNotFoundError(errno.ENOENT, "no checkpoint has such a name", name)
        self.path = os.path.join(root, name)
        self._root = os.path.realpath(root)
        self._follow_links = follow_links
        with unfit_entries("open", self.path):
            root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._owner = os.fstat(root_fd).st_uid
                # which way only: neither follows a link at the end, so one made meanwhile is refused
                if os.path.islink(self.path):
                    self.fd = self._open_link(root_fd, self.path, [self.path], directory=True)
                    self._real = os.path.realpath(self.path)
                else:
                    self.fd = os.open(name, _DIRECTORY, dir_fd=root_fd)
                    self._real = os.path.join(self._root, name)
            finally:
                os.close(root_fd)

    def close(self) -> None:
        os.close(self.fd)

    def open_file(self, name: str) -> int:
        """A descriptor of the regular file ``name``, to read. Raises: FileNotFoundError, LinkError,
        UnreadableError; OSError."""
        path = os.path.join(self.path, name)
        with unfit_entries("open", path):
            if not _is_a_name(name):
                raise OSError(errno.EPERM, "no file has such a name")
            if "/" not in name:
                try:
                    return open_regular(name, dir_fd=self.fd)
                except OSError as error:
                    if error.errno != errno.ELOOP:  # what O_NOFOLLOW says of a link
                        raise
            links = [] if os.path.isabs(name) else _links_on(self._real, name)
            root_fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return self._open_link(root_fd, os.path.join(self._real, name), links, directory=False)
            finally:
                os.close(root_fd)

    def _open_link(self, root_fd: int, path: str, links: list[str], *, directory: bool) -> int:
        """Opens what ``path`` leads to; ``links`` are those on the way there."""
        flags = _DIRECTORY if directory else _READ
        try:
            real = os.path.realpath(path, strict=True)
        except FileNotFoundError:
            target = os.path.realpath(path)
            if links and not self._is_ours(target, directory):
                raise LinkError(
                    f"{links[0]} is a link to {os.readlink(links[0])}, which is not there; "
                    "is the disk mounted?",
                    verb="follow",
                    path=links[0],
                    errno=errno.ENOENT,
                ) from None
            raise
        # from the descriptor of what contains it, so that nobody can exchange what lies above meanwhile
        if not directory and is_beneath(real, self._real):
            fd = open_beneath(self.fd, os.path.relpath(real, self._real).split("/"), flags)
        elif is_beneath(real, self._root):
            fd = open_beneath(root_fd, os.path.relpath(real, self._root).split("/"), flags)
        elif links:
            fd = self._open_outside(real, links, flags)
        else:
            raise OSError(
                errno.EPERM, "the path leaves the root; a checkpoint may not name files outside of it"
            )
        return fd if directory else _checked(fd)

    def _is_ours(self, path: str, directory: bool) -> bool:
        return is_beneath(path, self._root) or (not directory and is_beneath(path, self._real))

    def _open_outside(self, real: str, links: list[str], flags: int) -> int:
        """Opens what a link out of the root leads to, if it may be followed."""

        def refused(why: str) -> LinkError:
            return LinkError(
                f"{links[0]} is a link out of the root, to {real}, and {why}",
                verb="follow",
                path=links[0],
                errno=errno.EPERM,
            )

        if not self._follow_links:
            raise refused(
                "links are not followed; if you made it, pass Trust(follow_links=True) to the engine "
                "(to a storage of your own: LocalStorage(..., follow_links=True))"
            )
        # in a root that others may write to, a link of theirs would read the owner's files for them
        for link in links:
            if os.lstat(link).st_uid != self._owner:
                raise refused(
                    f"{link} was not made by the root's owner (uid {self._owner}); copy what it means"
                )
        kind = os.lstat(real)
        if not (stat.S_ISDIR(kind.st_mode) or stat.S_ISREG(kind.st_mode)):
            raise OSError(errno.ENXIO, "it leads to neither a directory nor a regular file")
        # by descriptor: what lies there now is what is read
        fd = os.open(real, flags)
        if os.fstat(fd).st_uid != self._owner:
            os.close(fd)
            raise refused(f"that does not belong to the root's owner (uid {self._owner}); copy it")
        return fd


def _is_a_name(name: str) -> bool:
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _links_on(base: str, relative: str) -> list[str]:
    """The links that one passes on the way from ``base`` to ``relative``."""
    links, path = [], base
    for part in relative.split("/"):
        path = os.path.join(path, part)
        if os.path.islink(path):
            links.append(path)
    return links
