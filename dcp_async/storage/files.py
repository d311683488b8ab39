"""Blocking calls on files: what LocalStorage runs in its threads, and the names that make a checkpoint one.

Enters: paths, buffers. Leaves: bytes on the medium, OSErrors as the system raises them. Invariant: nothing
here knows of leases or transactions.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

METADATA = ".metadata"
_RANK_METADATA = re.compile(r"__(\d+)\.metadata")
_FIRST_RANK_METADATA = "__0.metadata"

_ALIGN = 4096
_MAX_IOVECS = 1024
_REFUSES_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


def commit_mark(directory: str | os.PathLike[str]) -> os.stat_result | None:
    """The status of the file that makes ``directory`` a checkpoint; None if it is none.

    Stock's ``use_collectives=False`` writes no `.metadata` but one per rank, and looks for rank 0's itself.
    """
    for name in (METADATA, _FIRST_RANK_METADATA):
        try:
            return os.stat(os.path.join(directory, name))
        except FileNotFoundError:
            continue
    return None


def why_no_checkpoint(directory: Path) -> str:
    """What to tell whoever takes ``directory`` for a checkpoint."""
    if any(directory.glob("*.safetensors")):
        return (
            "it holds safetensors files, as Hugging Face's writer makes them, which dcp_async does not read; "
            "load it with HuggingFaceStorageReader and save it again"
        )
    return "there is no .metadata, so no checkpoint"


def rank_metadata_files(directory: Path) -> dict[int, Path]:
    """rank -> its metadata file, ascending."""
    found = {
        int(match[1]): directory / name
        for name in os.listdir(directory)
        if (match := _RANK_METADATA.fullmatch(name))
    }
    return dict(sorted(found.items()))


def sync(fd: int) -> None:
    if sys.platform == "darwin":  # fsync there leaves the bytes in the drive's cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """``mkdir -p`` that lasts: a directory whose own entry was not synced goes with a power cut."""
    if not path.is_dir():
        if not path.parent.is_dir():
            make_directory(path.parent)
            sync_directory(path.parent.parent)
        path.mkdir(exist_ok=True)


def _address(buffer: memoryview) -> int:
    if buffer.readonly or len(buffer) == 0:
        return 1  # ctypes can't look into it; an odd address says "not aligned"
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class DataFile:
    """A file being written: one descriptor for direct I/O, one for what is not aligned."""

    def __init__(self, path: Path, nbytes: int | None) -> None:
        self.path = path
        self.nbytes = nbytes
        self.closed = False
        self.fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
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
            aligned = aligned and done % _ALIGN == 0
            offset += done
            buffer = buffer[done:]

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self.fd)
            if self.direct_fd is not None:
                os.close(self.direct_fd)


def read_pieces(fd: int, pieces: Sequence[tuple[int, memoryview]]) -> list[tuple[int, int]]:
    """Read each run of adjacent pieces with as few calls as the kernel's limit on buffers allows; gives
    (start, stop) of the runs."""
    runs: list[tuple[int, int]] = []
    index = 0
    while index < len(pieces):
        start = end = pieces[index][0]
        buffers: list[memoryview] = []
        while index < len(pieces) and pieces[index][0] == end and len(buffers) < _MAX_IOVECS:
            buffers.append(pieces[index][1])
            end += len(pieces[index][1])
            index += 1
        runs.append((start, end))
        while buffers:
            done = os.preadv(fd, buffers, start)
            if done == 0:
                raise OSError(errno.EIO, f"it ends at byte {start}; {end - start} more were expected")
            start += done
            while buffers and done >= len(buffers[0]):
                done -= len(buffers[0])
                buffers.pop(0)
            if done:
                buffers[0] = buffers[0][done:]
    return runs
