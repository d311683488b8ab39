"""Copies a checkpoint's directory: aside, durable, read back and verified, and then under its name.

    source -> files of a hidden directory -> read back -> verified -> renamed

Enters: two paths. Leaves: a directory that holds what the other one holds, or nothing. Invariant: under the
name of the copy there is never anything but a whole checkpoint; `.metadata` is the last file that is written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from .._names import METADATA, owned_file
from ..errors import CheckpointNotFoundError
from ..info import VerifyReport
from ..storage.local import sync, sync_directory
from .opened import catalog_of, refuse_damaged
from .places import IO_CONCURRENCY, run
from .terminal import Refused

_BLOCK_BYTES = 8 << 20
_COPIER = "[0-9]+"
"""The process that copies, as it ends the name of its directory."""

Progress = Callable[[int, int], None]


def copy_checkpoint(source: Path, target: Path, copying: Progress, verifying: Progress) -> dict[str, Any]:
    """What was copied where. Blocks. Raises: CheckpointNotFoundError; CorruptCheckpointError if ``source`` is
    damaged; Refused; FileExistsError; OSError."""
    if not source.is_dir():
        raise CheckpointNotFoundError(f"there is no directory {source}")
    if target.is_dir() and not (target / METADATA).exists():
        # as cp of directories does
        target = target / source.name
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already; nothing was copied")
    if target.resolve().is_relative_to(source.resolve()):
        raise Refused(f"{target} lies in {source} itself; name a place outside of it")
    run(_check_opens(source))  # before gigabytes are copied
    with _aside(target) as directory:
        names = _files(source)
        digests = _copy_files(source, directory, names, copying)
        _read_back(directory, digests)
        report = run(_verified(directory, verifying))
        refuse_damaged(str(source), report, "nothing was copied")
        nbytes = sum((directory / file).stat().st_size for file in names)
        _publish(directory, target)
    return {"source": str(source), "target": str(target), "num_files": len(names), "nbytes": nbytes}


async def _check_opens(source: Path) -> None:
    async with catalog_of(str(source)) as (catalog, name):
        await (await catalog.open(name)).close()


async def _verified(directory: Path, progress: Progress) -> VerifyReport:
    async with catalog_of(str(directory)) as (catalog, name):
        return await catalog.verify(name, io_concurrency=IO_CONCURRENCY, progress=progress)


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A hidden directory beside ``target``, gone at the end unless it was renamed; those that killed copies
    to this name have left go first."""
    prefix = f".{target.name}.copy-"
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.iterdir():
        # by the whole name, and no link: whatever else begins so is somebody else's
        if not re.fullmatch(re.escape(prefix) + _COPIER, left.name) or left.is_symlink() or not left.is_dir():
            continue
        with _locked(left) as is_free:
            if is_free:
                shutil.rmtree(left)
    directory = target.parent / f"{prefix}{os.getpid()}"
    directory.mkdir()
    try:
        with _locked(directory):
            yield directory
    finally:
        # renamed, it is not there any more, which is no error
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Whether nobody else works in ``directory``; nobody will, as long as this lasts."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def _files(source: Path) -> list[str]:
    """The files to copy, `.metadata` last. Raises Refused for what can't be copied as it is."""
    names = []
    for name in sorted(os.listdir(source)):
        owned = owned_file(name)
        if owned is not None and owned.kind in ("lease", "temporary", "copy"):
            continue  # of a save that has died, or is under way
        if not stat.S_ISREG(os.lstat(source / name).st_mode):
            raise Refused(
                f"{source / name} is no regular file, and is not copied; move it away, or use cp -a"
            )
        names.append(name)
    # as a save commits: nothing is a checkpoint before all else is there
    return sorted(names, key=lambda name: name == METADATA)


def _copy_files(source: Path, directory: Path, names: list[str], progress: Progress) -> dict[str, str]:
    """Copy and make durable. File -> digest of what was read."""
    statuses = {name: os.lstat(source / name) for name in names}
    total = sum(status.st_size for status in statuses.values())
    done = 0
    digests: dict[str, str] = {}
    copied: dict[tuple[int, int], str] = {}
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    for name, status in statuses.items():
        inode = (status.st_dev, status.st_ino)
        if (first := copied.setdefault(inode, name)) != name:  # one file under two names, as weights are
            # or the copy would take twice the room
            os.link(directory / first, directory / name)
            done += status.st_size
            continue
        digest = xxhash.xxh3_64()
        with (
            open(source / name, "rb", buffering=0) as reading,
            open(directory / name, "xb", buffering=0) as writing,
        ):
            while nbytes := reading.readinto(buffer):
                block = buffer[:nbytes]
                digest.update(block)
                while block:
                    block = block[writing.write(block) :]
                done += nbytes
                progress(done, total)
            sync(writing.fileno())
            # what is read back shall come from the medium
            os.posix_fadvise(writing.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            # of stock's checkpoints it is the only time that is known
            os.utime(writing.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
        digests[name] = digest.hexdigest()
    return digests


def _read_back(directory: Path, digests: dict[str, str]) -> None:
    """Raises OSError if a file does not hold what was written."""
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    for name, written in digests.items():
        digest = xxhash.xxh3_64()
        with open(directory / name, "rb", buffering=0) as file:
            while nbytes := file.readinto(buffer):
                digest.update(buffer[:nbytes])
        if digest.hexdigest() != written:
            raise OSError(errno.EIO, f"{directory / name} does not hold what was written; nothing was copied")


def _publish(directory: Path, target: Path) -> None:
    # before the name appears: what it leads to must survive a power cut first
    sync_directory(directory)
    if os.path.lexists(target):  # an empty directory would be replaced
        raise FileExistsError(f"{target} is there by now; nothing was copied")
    os.rename(directory, target)
    # the name is an entry of this directory
    sync_directory(target.parent)
