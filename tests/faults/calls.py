"""The file-system calls of this process, shown to a watcher before and after each one.

In: `install()`, once, before the package under test is imported, so that also `from os import pwrite` gets
the tapped function. Out: `Call` objects for calls below one watched directory; a watcher may record, block,
raise, or end the process. What C code does behind a Python file object (the flush of a buffered writer) is
not seen: the open before it and the fsync after it are, which is enough to stop on either side of it.
"""

from __future__ import annotations

import builtins
import fcntl
import functools
import io
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

WRITES = frozenset({"pwrite", "pwritev", "write", "writev", "copy_file_range", "sendfile"})
SYNCS = frozenset({"fsync", "fdatasync"})
RENAMES = frozenset({"rename", "replace"})
UNLINKS = frozenset({"unlink", "remove"})
CHANGES = (
    WRITES
    | SYNCS
    | RENAMES
    | UNLINKS
    | {"open", "link", "symlink", "mkdir", "rmdir", "truncate", "ftruncate", "posix_fallocate"}
)
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call, with its paths made absolute."""

    name: str
    path: str
    target: str
    """The second path of a link or a rename, else empty."""
    args: tuple[Any, ...] = field(repr=False)
    original: Callable[..., Any] = field(repr=False)

    def publishes(self) -> bool:
        return (self.name in RENAMES or self.name == "link") and os.path.basename(self.target) == ".metadata"


class Watcher(Protocol):
    def before(self, call: Call) -> None: ...

    def after(self, call: Call) -> None: ...


class CallTap:
    """Wraps the functions of `os`, `fcntl` and `open`; silent until `watch()` names a directory."""

    def __init__(self) -> None:
        self._root = ""
        self._watcher: Watcher | None = None

    def watch(self, root: str, watcher: Watcher | None) -> None:
        self._root = os.path.realpath(root)
        self._watcher = watcher

    def install(self) -> None:
        for name in sorted(CHANGES):
            if hasattr(os, name):
                setattr(os, name, _Tapped(self, name, getattr(os, name)))
        flock = _Tapped(self, "flock", fcntl.flock)
        setattr(fcntl, "flock", flock)  # noqa: B010 - mypy takes the wrapper for a mistake in a plain assignment
        opened = _Tapped(self, "open", builtins.open)
        for module in (builtins, io):
            setattr(module, "open", opened)  # noqa: B010 - as above

    def call(
        self, name: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        watcher = self._watcher
        seen = None if watcher is None else self._seen(name, original, args, kwargs)
        if watcher is None or seen is None:
            return original(*args, **kwargs)
        watcher.before(seen)
        result = original(*args, **kwargs)
        watcher.after(seen)
        return result

    def _seen(
        self, name: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call | None:
        if name == "open" and not _opens_for_writing(original, args, kwargs):
            return None
        first = (
            args[0] if args else kwargs.get("path", kwargs.get("src", kwargs.get("fd", kwargs.get("file"))))
        )
        path = _absolute(first, kwargs.get("dir_fd", kwargs.get("src_dir_fd")))
        target = ""
        if name in RENAMES or name in ("link", "symlink"):
            target = _absolute(args[1] if len(args) > 1 else kwargs.get("dst"), kwargs.get("dst_dir_fd"))
        inside = any(p == self._root or p.startswith(self._root + os.sep) for p in (path, target))
        return Call(name=name, path=path, target=target, args=args, original=original) if inside else None


class _Tapped:
    """An object, not a function: like a builtin it does not turn into a method inside a class body."""

    def __init__(self, tap: CallTap, name: str, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._tap, self._name, self._original = tap, name, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tap.call(self._name, self._original, args, kwargs)


def _opens_for_writing(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    how = args[1] if len(args) > 1 else kwargs.get("flags", kwargs.get("mode", "r"))
    return bool(how & _WRITE_FLAGS) if isinstance(how, int) else any(letter in how for letter in "wax+")


def _absolute(where: Any, dir_fd: int | None) -> str:
    if hasattr(where, "fileno"):
        where = where.fileno()
    if isinstance(where, int):
        return _path_of(where)
    if where is None:
        return ""
    base = os.getcwd() if dir_fd is None else _path_of(dir_fd)
    return os.path.normpath(os.path.join(base, os.fsdecode(where)))


def _path_of(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
    except OSError:
        return ""


def end_process_now() -> None:
    """SIGKILL to ourselves; nothing of Python runs after it."""
    os.kill(os.getpid(), signal.SIGKILL)


def tear(call: Call) -> None:
    """Lets the first half of a positioned write through (whole pages: direct I/O takes nothing else)."""
    if call.name == "pwrite":
        fd, data, offset = call.args
        view = memoryview(data).cast("B")
        half = len(view) // 2 // 4096 * 4096
        if half:
            call.original(fd, view[:half], offset)
    elif call.name == "pwritev" and len(call.args[1]) > 1:
        fd, views, offset = call.args[:3]
        call.original(fd, views[: len(views) // 2], offset)


class Nth:
    """Counts calls of the given names and does something before the n-th (1-based)."""

    def __init__(self, names: frozenset[str], nth: int, action: Callable[[Call], None]) -> None:
        self._names, self._nth, self._action = names, nth, action
        self._lock = threading.Lock()
        self.count = 0

    def before(self, call: Call) -> None:
        if call.name not in self._names:
            return
        with self._lock:
            self.count += 1
            hit = self.count == self._nth
        if hit:
            self._action(call)

    def after(self, call: Call) -> None:
        pass


class When:
    """Does something before (or after) every call that a predicate picks."""

    def __init__(
        self,
        picks: Callable[[Call], bool],
        action: Callable[[Call], None],
        *,
        moment: str = "before",
    ) -> None:
        self._picks, self._action, self._moment = picks, action, moment

    def before(self, call: Call) -> None:
        if self._moment == "before" and self._picks(call):
            self._action(call)

    def after(self, call: Call) -> None:
        if self._moment == "after" and self._picks(call):
            self._action(call)


class Both:
    """Shows each call to several watchers, in order."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def before(self, call: Call) -> None:
        for watcher in self._watchers:
            watcher.before(call)

    def after(self, call: Call) -> None:
        for watcher in self._watchers:
            watcher.after(call)


class Recorder:
    """Keeps begin and end of every call as (moment, name, path, target)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, str, str]] = []

    def before(self, call: Call) -> None:
        self.log.append(("begin", call.name, call.path, call.target))

    def after(self, call: Call) -> None:
        self.log.append(("end", call.name, call.path, call.target))


def is_data_write(call: Call) -> bool:
    return call.name in WRITES and call.path.endswith(".distcp")
