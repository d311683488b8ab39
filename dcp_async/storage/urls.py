"""Which storage a root names: a path, or a URL.

Enters: what a user gave. Leaves: a storage that is the engine's own. Invariant: only a str can be a URL; a
Path, and a str without `scheme://`, is a path whatever it looks like.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from .base import Storage
from .deadline import LimitedStorage
from .local import LocalStorage
from .memory import MemoryStorage
from .object_store import SCHEMES, ObjectStorage

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SERVED = "s3://bucket/run1, gs://bucket/run1, az://container/run1, file:///absolute/path and memory://name"


def storage_at(
    root: str | os.PathLike[str],
    *,
    io_concurrency: int,
    timeout: float,
    lease_max_age: float,
    follow_links: bool,
) -> Storage:
    """The storage that ``root`` names, made with these options as far as it has them.

    Raises: ValueError for a URL that no storage serves; ModuleNotFoundError for one that needs an extra.
    """
    match = _SCHEME.match(root) if isinstance(root, str) else None
    if match is not None:
        assert isinstance(root, str)
        scheme = match[1].lower()
        if scheme == "memory":
            return MemoryStorage(root[match.end() :], io_concurrency=io_concurrency, timeout=timeout)
        if scheme in SCHEMES:
            # what waits is no thread of ours, which BlockingCalls would give up after this time
            return LimitedStorage(ObjectStorage(root, lease_max_age=lease_max_age), timeout)
        if scheme != "file":
            raise ValueError(
                f"root={root!r}: no storage serves {scheme}://; those that are served are {_SERVED}. "
                f"A directory of that name is './{root}', anything else a Storage of your own"
            )
        root = _path_of(root)
    return LocalStorage(
        root,
        io_concurrency=io_concurrency,
        timeout=timeout,
        lease_max_age=lease_max_age,
        follow_links=follow_links,
    )


def _path_of(url: str) -> str:
    """The absolute path of a file URL, as ``Path.as_uri()`` writes them. Raises: ValueError."""
    parts = urlsplit(url)
    # RFC 8089 lets a file's own host be named
    if parts.netloc.lower() not in ("", "localhost"):
        raise ValueError(
            f"root={url!r} names the host {parts.netloc!r}; a local path is file:///absolute/path"
        )
    if "?" in url or "#" in url:
        raise ValueError(f"root={url!r}: within a file URL ? is written %3F, and # is written %23")
    path = unquote(parts.path)
    if not path.startswith("/"):
        raise ValueError(f"root={url!r} has no path; write file:///absolute/path")
    return path


def root_and_name(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The root that the checkpoint ``path`` lies under, a directory or its URL, and its name there. Raises:
    ValueError for a URL of a root alone."""
    text = os.fspath(path)
    if isinstance(text, str) and (match := _SCHEME.match(text)):
        is_file = match[1].lower() == "file"
        root, _, name = text[match.end() :].rstrip("/").rpartition("/")
        if not name or not (root or is_file):
            raise ValueError(
                f"{text!r} names no checkpoint, but at most what holds some; a checkpoint's URL is that of "
                "its root, a slash and its name: s3://bucket/run1/step-00000100"
            )
        return match[0] + (root or "/"), unquote(name) if is_file else name
    # links are followed where it is opened: this very directory was asked for, wherever it lies
    return os.path.split(os.path.abspath(os.path.expanduser(os.fsdecode(text))))
