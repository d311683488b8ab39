"""Leases: which uncommitted files belong to a live save.

A lease is a locked file, taken before the first data file of a save and released after it was published. The
lock dies with its process, so whatever lies under a free lease is a leftover. Files are grouped by the uid in
their names.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import operator
import os
import socket
import threading
import time
import weakref
from collections.abc import Set
from functools import partial
from pathlib import Path

from ..._names import METADATA, is_manifest, is_step_directory, lease_file, owned_file
from ..base import NamesUids
from .attached_names import give_names, take_names
from .public_names import finish_names, names_besides
from .safe_open import open_regular, read_small

logger = logging.getLogger(__name__)

_TEMPORARY = ("temporary", "copy", "lease")
"""Kinds of files that a finished save has no more of."""
_VISIBLE_SECONDS = 10.0
"""For a network file system to show one host what another made."""
# File systems whose flock may not reach other hosts; there the lease's age must agree.
_REMOTE = ("nfs", "cifs", "smb", "fuse", "9p", "afs", "lustre", "beegfs", "gpfs", "ceph")

# A forked child must not inherit a lease: its copy of the descriptor would keep the lock alive after the
# parent's death.
_live: weakref.WeakSet[Lease] = weakref.WeakSet()


# No fork may fall between opening a lease's file and knowing about it.
_forking = threading.Lock()


def _drop_in_child() -> None:
    for lease in list(_live):
        os.close(lease.fd)
    _live.clear()
    _forking.release()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_drop_in_child)


class Lease:
    """The lock of one save. Owns its descriptor; ``release()`` removes the file and closes it."""

    def __init__(self, directory: Path, uid: str) -> None:
        self.path = directory / lease_file(uid)
        with _forking:
            self._take()
            _live.add(self)
        self.is_remote = is_remote(directory)

    def _take(self) -> None:
        while True:
            self.fd = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            try:
                # not a record lock: the sweep of this very process must find it taken, and closing another
                # descriptor of the file must not drop it
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # what was locked may be a file without a name by now
                if os.fstat(self.fd).st_ino == os.stat(self.path).st_ino:
                    break
            except (BlockingIOError, FileNotFoundError):
                # a sweeper got in between create and lock, and has removed the file or will: make it anew
                logger.debug("lease %s was swept while it was taken; taking it again", self.path)
            os.close(self.fd)

    def show_life(self) -> None:
        """Make the file young again: its age is all that other hosts may see."""
        with contextlib.suppress(FileNotFoundError):  # swept, which its owner will notice, or just released
            os.utime(self.path)

    def is_held(self) -> bool:
        """Whether the file is still the one that this process has locked."""
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self in _live:  # in a forked child it is not: the save goes on in the parent
            _live.discard(self)
            # the name before the lock: a free lease is a dead save's, whose files a sweeper takes
            self.path.unlink(missing_ok=True)
            os.close(self.fd)


class Beat:
    """Shows that the owner of leases lives for as long as it does, whatever it waits for, where others can
    see nothing but their age. A thread, while there are such leases; a process that dies or is stopped beats
    no more."""

    def __init__(self, seconds: float) -> None:
        self._seconds = min(seconds, 30.0)
        self._lock = threading.Lock()
        self._leases: set[Lease] = set()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        """Until ``discard``, ``lease`` never gets older than ``seconds``."""
        if not lease.is_remote:
            return
        with self._lock:
            self._leases.add(lease)
            if self._thread is None:
                self._changed.clear()
                thread = threading.Thread(target=self._run, name="dcp_async-lease", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # the interpreter is ending
                    logger.warning("nothing shows other hosts that this save lives: %s", error)
                else:
                    self._thread = thread

    def discard(self, lease: Lease) -> None:
        """``lease`` is being released."""
        with self._lock:
            self._leases.discard(lease)
            if not self._leases:
                self._changed.set()

    def _run(self) -> None:
        while True:
            self._changed.wait(self._seconds)
            with self._lock:
                leases = list(self._leases)
                self._changed.clear()
                if not leases:
                    self._thread = None
                    return
            for lease in leases:
                try:
                    lease.show_life()
                except OSError as error:
                    logger.warning("can't show that the save of %s lives: %s", lease.path, error)


def take_lease(directory: Path, uid: str) -> Lease:
    """The lease of ``uid``; makes the directory anew if a sweeper removed it while it was empty."""
    while True:
        try:
            return Lease(directory, uid)
        except FileNotFoundError:
            directory.mkdir(parents=True, exist_ok=True)


def sees_lease(directory: Path, uid: str, since: float, host: str) -> bool:
    """Whether the lease of ``uid``, which a rank on ``host`` took, is seen here.

    Raises: OSError if it is not a while after ``since`` (time.monotonic()): then this rank and that one do
    not have the same root.
    """
    path = directory / lease_file(uid)
    with contextlib.suppress(FileNotFoundError):  # a listing refreshes what network file systems cache
        os.listdir(directory if directory.exists() else directory.parent)
    if path.exists():
        return True
    if time.monotonic() > since + _VISIBLE_SECONDS:
        raise OSError(
            errno.ENOENT,
            f"on host {socket.gethostname()} there is no {path}, which the coordinator has just made on host "
            f"{host}: "
            "the ranks have different roots. Give all of them one directory on a shared file system, or "
            "each its own with Coordination(mode='local')",
        )
    return False


def is_remote(directory: Path) -> bool:
    """Whether ``directory`` lies on a file system whose locks other hosts may not see."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return False  # not Linux: local file systems are what is supported there
    # the longest mount point above it is the one that it lies on
    real = os.path.realpath(directory)
    best, kind = "", ""
    for line in mounts:
        _, point, fstype, *_ = line.split(" ")
        point = point.replace("\\040", " ")  # as the kernel writes a blank
        # of two mounts on one point the later one hides the other
        if len(point) >= len(best) and os.path.commonpath((real, point)) == point:
            best, kind = point, fstype
    return kind.startswith(_REMOTE)


def _lock_if_free(directory: Path, uid: str, max_age: float) -> int | None:
    """The lease's descriptor, locked, if nobody holds it; -1 if there is none; None if its save lives.

    Locked until the leftovers are gone: a save that takes the lease meanwhile finds its file removed and
    makes it anew.
    """
    path = directory / lease_file(uid)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return -1  # taken before the first file and released after publishing
    except OSError as error:
        logger.debug("%s can't be taken, so its save may live: %s", path, error)
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # a free lock says that its process is dead, but across hosts it may say nothing: there age decides
        if not is_remote(directory) or time.time() - os.fstat(fd).st_mtime > max_age:
            return fd
    except BlockingIOError:
        logger.debug("%s belongs to a live save", path)
    os.close(fd)
    return None


def _is_temporary(name: str) -> bool:
    owned = owned_file(name)
    return owned is not None and owned.kind in _TEMPORARY


def sweep_directory(directory: Path, named: NamesUids, *, max_age: float) -> bool:
    """Remove the files of dead saves from one checkpoint directory, and the directory if nothing is left in
    it; ``named`` reads its `.metadata`.

    Returns whether nothing but one committed checkpoint is there, so that nobody need look again until it
    changes. Order: list, try the lease, only then read `.metadata`, then delete; so a save that publishes
    meanwhile is never hurt.
    """
    by_uid: dict[str, list[str]] = {}
    temporary = False
    listed = os.listdir(directory)
    if not listed and is_step_directory(directory.name):
        remove_if_empty(directory)  # its maker died before it took a lease; one that lives makes it again
    for name in listed:
        if (owned := owned_file(name)) is not None:
            by_uid.setdefault(owned.uid, []).append(name)
            temporary = temporary or _is_temporary(name)
    committed = (directory / METADATA).exists()
    if (
        committed
        and len(by_uid) == 1
        and not temporary
        and any(is_manifest(name) for name in next(iter(by_uid.values())))
    ):
        return True  # the usual case: one checkpoint and its manifest
    # all locks before `.metadata` is read: a save that publishes in between holds its own, and is passed over
    locks: dict[str, int] = {}
    try:
        for uid in by_uid:
            if (lock := _lock_if_free(directory, uid, max_age)) is not None:
                locks[uid] = lock
        if locks and not _sweep_free(directory, by_uid, set(locks), named):
            logger.warning("%s: .metadata can't be read, so nothing is swept there", directory)
    finally:
        for lock in locks.values():
            if lock >= 0:
                os.close(lock)
    return False


def _sweep_free(directory: Path, by_uid: dict[str, list[str]], free: set[str], named: NamesUids) -> bool:
    """Delete what free leases leave behind; False if an unreadable `.metadata` protects the directory."""
    committed = True
    published: Set[str] | None
    try:
        metadata = read_small(open_regular(directory / METADATA))
    except FileNotFoundError:
        published = set()
        committed = False
    except OSError as error:
        logger.debug("%s protects its directory: %s", directory / METADATA, error)
        published = None
    else:
        published = named(metadata, free)
    if published is None:
        return False
    for uid in free & published:  # published by a process that died before it had tidied up
        left = [name for name in by_uid[uid] if _is_temporary(name)]
        # before an earlier save's are removed: only by them are its names and copies known for ours
        if left and _finished(directory, uid, by_uid[uid]):
            for name in left:
                (directory / name).unlink(missing_ok=True)
    for uid in free - published:
        take_names(directory, uid)
        for path in names_besides(directory, by_uid[uid]):
            path.unlink(missing_ok=True)
        # the lease goes last: until then the leftovers stay recognisable as free
        for name in sorted(by_uid[uid], key=partial(operator.eq, lease_file(uid))):
            (directory / name).unlink(missing_ok=True)
        logger.info("swept %d files of the unfinished save %s from %s", len(by_uid[uid]), uid, directory)
    if not committed and free - published:
        remove_if_empty(directory)
    return True


def _finished(directory: Path, uid: str, files: list[str]) -> bool:
    """Whether what the save ``uid`` has published is found under the names that others know it by."""
    try:
        finish_names(directory, uid, files)
    except OSError as error:  # the checkpoint has the files all the same
        logger.warning("could not give the files of %s their public names: %s", directory, error)
        return False
    return give_names(directory, uid)


def remove_if_empty(directory: Path) -> None:
    """``rmdir`` that leaves a directory with anything in it alone."""
    try:
        directory.rmdir()
    except OSError as error:
        logger.debug("kept %s: %s", directory, error)
