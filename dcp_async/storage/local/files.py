"""Blocking calls on files: what LocalStorage runs in its threads.

Enters: paths, buffers. Leaves: bytes on the medium, OSErrors as the system raises them. Invariant: nothing
here knows of leases or transactions.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

from ..._names import FIRST_RANK_METADATA, METADATA, is_manifest, rank_of_metadata
from .page_cache import absent_ranges, give_back, overlaps
from .safe_open import open_regular

# what direct I/O asks of offsets, lengths and addresses, on media with sectors of up to 4 KiB
_ALIGN = 4096
# the system's IOV_MAX: a longer list of buffers is refused
_MAX_IOVECS = 1024
_HELD_CALL_BYTES = 4 << 20
"""The most that one call takes out of the page cache: what the processor's caches still hold when it is
verified."""
_REFUSES_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


def commit_mark(directory: str | os.PathLike[str] | int) -> os.stat_result | None:
    """The status of what makes ``directory`` (or its descriptor) a checkpoint, of whatever kind it is; None
    if it is none.

    Stock's ``use_collectives=False`` writes no `.metadata` but one per rank, and looks for rank 0's itself.
    """
    # of a link its own status: the checkpoint is there, and whoever opens it says what is wrong with it
    for name in (METADATA, FIRST_RANK_METADATA):
        try:
            if isinstance(directory, int):
                return os.stat(name, dir_fd=directory, follow_symlinks=False)
            return os.lstat(os.path.join(directory, name))
        except FileNotFoundError:
            continue
    return None


def why_no_checkpoint(directory: int) -> str:
    """What to tell whoever takes the directory of this descriptor for a checkpoint."""
    if any(name.endswith(".safetensors") for name in os.listdir(directory)):
        return (
            "it holds safetensors files and no .metadata: it is read by its own path, here or with "
            "dcp_async.open_checkpoint(path)"
        )
    return "there is no .metadata, so no checkpoint"


def manifest_files(directory: int) -> list[str]:
    """The names of the manifests in the directory of this descriptor."""
    return sorted(name for name in os.listdir(directory) if is_manifest(name))


def rank_metadata_files(directory: str | os.PathLike[str] | int) -> dict[int, str]:
    """rank -> the name of its metadata file, ascending."""
    files = {rank: name for name in os.listdir(directory) if (rank := rank_of_metadata(name)) is not None}
    return dict(sorted(files.items()))


def sync(fd: int) -> None:
    """Make what ``fd`` holds durable."""
    if sys.platform == "darwin":  # fsync there leaves the bytes in the drive's cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Make the names in ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def refuse_link(path: Path) -> None:
    """Raises OSError if a checkpoint of this name would be written through a link, or into what is no
    directory."""
    if path.is_symlink():
        raise OSError(
            errno.ELOOP,
            f"it is a link to {os.readlink(path)}, and nothing is written through links; remove it, or save "
            "under another name",
        )
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "it is no directory; remove it, or save under another name", os.fspath(path)
        )


def make_directory(path: Path) -> None:
    """``mkdir -p`` that lasts: a directory whose own entry was not synced goes with a power cut."""
    if not path.is_dir():
        if not path.parent.is_dir():
            make_directory(path.parent)
            sync_directory(path.parent.parent)
        # its own entry is synced when the checkpoint is published
        path.mkdir(exist_ok=True)


def _address(buffer: memoryview) -> int:
    if buffer.readonly or len(buffer) == 0:
        return 1  # ctypes can't look into it; an odd address says "not aligned"
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class DataFile:
    """A file being written: one descriptor for direct I/O, one for what is not aligned."""

    def __init__(self, path: Path, nbytes: int | None, *, made_by_another: bool = False) -> None:
        self.path = path
        self.nbytes = nbytes
        self.closed = False
        # O_EXCL: a file of this name would be another save's with the same uid
        make = 0 if made_by_another else os.O_CREAT | os.O_EXCL
        self.fd = os.open(path, make | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        self.direct_fd: int | None = None
        if hasattr(os, "O_DIRECT"):
            try:
                self.direct_fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:  # tmpfs, overlay: buffered then
                if error.errno not in _REFUSES_DIRECT:
                    os.close(self.fd)
                    raise

    def write(self, offset: int, buffer: memoryview) -> None:
        aligned = offset % _ALIGN == 0 and len(buffer) % _ALIGN == 0 and _address(buffer) % _ALIGN == 0
        while buffer:
            direct = self.direct_fd if aligned else None
            try:
                done = os.pwrite(self.fd if direct is None else direct, buffer, offset)
            except OSError as error:
                if direct is None or error.errno not in _REFUSES_DIRECT:
                    raise
                # refused only now; the descriptor stays, since another thread may be writing through it
                aligned = False
                continue
            # a short write leaves the rest unaligned, and direct I/O would refuse it
            aligned = aligned and done % _ALIGN == 0
            offset += done
            buffer = buffer[done:]

    def end_direct(self) -> None:
        """Nothing more is written; ``fd`` stays, and with it the inode."""
        if self.direct_fd is not None:
            os.close(self.direct_fd)
            self.direct_fd = None

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self.fd)
            self.end_direct()


def read_exactly(path: Path, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from ``offset`` on. Raises OSError if the file ends before."""
    fd = open_regular(path)
    try:
        while buffer:
            done = os.preadv(fd, [buffer], offset)
            if done == 0:
                raise OSError(errno.EIO, f"it ends at byte {offset}; {len(buffer)} more were expected")
            offset, buffer = offset + done, buffer[done:]
    finally:
        os.close(fd)


class ReadFile:
    """A file being read, and what that has brought into the page cache. Owns its descriptor."""

    def __init__(self, file: Path | int) -> None:
        """``file``: a regular file's path, or its descriptor, which this closes then."""
        self.fd = file if isinstance(file, int) else open_regular(file)
        try:
            self.nbytes = os.fstat(self.fd).st_size
            # before anything is read: later nobody can tell what reading has brought in
            self._absent = absent_ranges(self.fd, self.nbytes)
            """What the page cache did not hold when the file was opened; None if nobody knows."""
        except BaseException:
            os.close(self.fd)
            raise
        self._read: list[tuple[int, int]] = []
        """(start, stop) of what was read."""

    def read(self, pieces: Sequence[tuple[int, memoryview]], arrived: Callable[[int], None] | None) -> None:
        """Fill each buffer from its offset, adjacent ones by one call.

        ``arrived`` is told how many bytes are there, over all pieces, after each of many calls that begin
        where the page cache has the file. Where the disk may have to be read, few large calls serve best, and
        it shall not wait until what came is verified: ``arrived`` is not called.
        """
        waiting = deque(piece for piece in pieces if len(piece[1]))
        done = 0
        while waiting:
            start = end = waiting[0][0]
            # cached: small calls, verified while the processor's caches have the bytes; not cached:
            # large ones, since each waits for the disk
            held = self._holds(start)
            most = _HELD_CALL_BYTES if held else sys.maxsize
            buffers: list[memoryview] = []
            while waiting and waiting[0][0] == end and len(buffers) < _MAX_IOVECS and end - start < most:
                offset, memory = waiting.popleft()
                room = most - (end - start)
                if len(memory) > room:
                    waiting.appendleft((offset + room, memory[room:]))
                buffers.append(memory[:room])
                end += len(buffers[-1])
            self._read_run(start, end, buffers)
            # no lock among the threads that read one file: an append is one step
            self._read.append((start, end))
            done += end - start
            if held and arrived is not None:
                arrived(done)

    def _holds(self, offset: int) -> bool:
        """Whether the page cache had what lies around ``offset`` when the file was opened, some of it at
        least."""
        if self._absent is None:
            return False
        index = bisect_right(self._absent, offset, key=itemgetter(0)) - 1
        return index < 0 or offset >= sum(self._absent[index])

    def _read_run(self, start: int, end: int, buffers: list[memoryview]) -> None:
        while buffers:
            done = os.preadv(self.fd, buffers, start)
            # a file that was cut short reads as its end, not as an error
            if done == 0:
                raise OSError(errno.EIO, f"it ends at byte {start}; {end - start} more were expected")
            start += done
            while buffers and done >= len(buffers[0]):
                done -= len(buffers[0])
                buffers.pop(0)
            if done:
                buffers[0] = buffers[0][done:]

    def give_back(self) -> None:
        """Let the page cache forget what reading has brought into it."""
        give_back(self.fd, overlaps(self._absent or (), self._read))

    def close(self) -> None:
        os.close(self.fd)
