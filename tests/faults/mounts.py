"""Small file systems of one test, where this process may mount: who may not is told, and does without."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

DETACH = 2
"""MNT_DETACH: also when a process that failed to end still holds a file."""


@contextlib.contextmanager
def small_tmpfs(path: Path, nbytes: int) -> Iterator[bool]:
    """Gives whether there is one at ``path``."""
    libc = ctypes.CDLL(None, use_errno=True)
    mounted = libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={nbytes}".encode()) == 0
    try:
        yield mounted
    finally:
        if mounted:
            unmount(path)


@contextlib.contextmanager
def small_ext4(path: Path, nbytes: int) -> Iterator[bool]:
    """Gives whether there is one at ``path``; its image lies beside it while it is mounted."""
    image = image_of(path)
    try:
        with image.open("wb") as file:
            file.truncate(nbytes)
        made = _succeeds("mkfs.ext4", "-qF", "-m0", image)
        with mounted_image(image, path) if made else contextlib.nullcontext(False) as mounted:
            yield mounted
    finally:
        image.unlink()


@contextlib.contextmanager
def mounted_image(image: Path, path: Path) -> Iterator[bool]:
    """Gives whether ``image`` is mounted at ``path``."""
    mounted = _succeeds("mount", "-o", "loop", image, path)
    try:
        yield mounted
    finally:
        if mounted:
            unmount(path)


def image_of(path: Path) -> Path:
    return path.with_suffix(".image")


def unmount(path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.umount2(os.fsencode(path), DETACH) == 0, os.strerror(ctypes.get_errno())


def _succeeds(*command: str | Path) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0
