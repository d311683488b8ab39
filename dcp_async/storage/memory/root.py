"""What a name of memory stands for in this process: its checkpoints, and which saves are under way.

Enters: checkpoints, whole. Leaves: the same. Invariant: a checkpoint is swapped, read and dropped as one
frozen value. Its memory goes with the last who holds it, the root or a reader.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from ...errors import StorageError
from ..base import InUseError, StoredCheckpoint
from .files import Content

# what a URL says without escapes: memory://run1 and MemoryStorage("run1") have to be one
_NAME = re.compile(r"[^\s/?#%]+(/[^\s/?#%]+)*")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryCheckpoint:
    """What is published under a name."""

    files: Mapping[str, Content]
    metadata: bytes
    manifest: bytes
    modified: float
    # weak: one that was dropped reads no more
    readers: weakref.WeakSet[object] = field(default_factory=weakref.WeakSet)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class LiveSave:
    """Says that a save of this name is under way, for as long as its transaction holds it."""

    name: str
    begun: float = field(default_factory=time.time)


# State of the module, for a name has to mean the same wherever in the process it is opened. A root without a
# checkpoint lives as long as somebody holds it: names that were only looked at are not kept.
_named: weakref.WeakValueDictionary[str, MemoryRoot] = weakref.WeakValueDictionary()
_kept: set[MemoryRoot] = set()
_lock = threading.Lock()
"""Held for a few steps at a time, never while bytes are copied."""

# No fork may fall into those steps: the child's copy would be locked for ever.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def refusal(verb: str, path: str, code: int, why: str) -> StorageError:
    return StorageError.of(verb, path, OSError(code, why))


class MemoryRoot:
    """What the storages of one name share: its checkpoints, and which saves are under way."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.url = f"memory://{name or '<unnamed>'}"
        self._pid = os.getpid()
        self._checkpoints: dict[str, MemoryCheckpoint] = {}
        # weak: a save that its engine dropped takes its bytes along, and there is nothing to sweep
        self._saves: weakref.WeakSet[LiveSave] = weakref.WeakSet()

    @classmethod
    def of(cls, name: str) -> MemoryRoot:
        with _lock:
            root = _named.get(name)
            if root is None:
                root = _named[name] = cls(name)
            return root

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock; afterwards the root is kept if it has a checkpoint. Raises StorageError in a forked
        child."""
        if os.getpid() != self._pid:
            raise refusal(
                "open",
                self.url,
                errno.EPERM,
                f"it is the memory of process {self._pid}, from which this one was forked, and what is saved "
                "here would not be seen there; use a directory",
            )
        with _lock:
            yield
            if self.name is not None:
                (_kept.add if self._checkpoints else _kept.discard)(self)

    def refuse_ranks(self) -> NoReturn:
        raise refusal(
            "open",
            self.url,
            errno.EPERM,
            "this is the memory of one process, and several ranks save here. Give all of them one directory "
            "on a shared file system, or each its own root with Coordination(mode='local')",
        )

    def add(self, save: LiveSave, *, replace: bool) -> None:
        """Raises: FileExistsError."""
        with self._changing():
            if not replace:
                self._refuse_taken(save.name)
            self._saves.add(save)

    def discard(self, save: LiveSave) -> None:
        with self._changing():
            self._saves.discard(save)

    def check_lives(self, save: LiveSave) -> None:
        """Raises: StorageError."""
        with self._changing():
            self._refuse_cleared(save)

    def publish(self, save: LiveSave, checkpoint: MemoryCheckpoint, *, replace: bool) -> None:
        """Raises: FileExistsError; StorageError."""
        with self._changing():
            self._refuse_cleared(save)
            if not replace:
                self._refuse_taken(save.name)
            self._checkpoints[save.name] = checkpoint
            self._saves.discard(save)

    def _refuse_taken(self, name: str) -> None:
        if name in self._checkpoints:
            raise FileExistsError(
                errno.EEXIST, "a checkpoint of this name is committed", f"{self.url}/{name}"
            )

    def _refuse_cleared(self, save: LiveSave) -> None:
        if save not in self._saves:
            why = "the storage was cleared since this save began"
            raise refusal("publish", f"{self.url}/{save.name}", errno.ESTALE, why)

    def clear(self) -> None:
        with self._changing():
            self._checkpoints.clear()
            # those that are under way find themselves missing, as a save does whose directory was removed
            self._saves.clear()

    def list(self) -> Sequence[StoredCheckpoint]:
        with self._changing():
            stored = [
                StoredCheckpoint(name=name, committed=True, modified=checkpoint.modified)
                for name, checkpoint in self._checkpoints.items()
            ]
            begun = {save.name: save.begun for save in self._saves if save.name not in self._checkpoints}
            stored += [
                StoredCheckpoint(name=name, committed=False, modified=modified)
                for name, modified in begun.items()
            ]
            return stored

    def get(self, name: str) -> MemoryCheckpoint | None:
        with self._changing():
            return self._checkpoints.get(name)

    def pop(self, name: str, *, unless_read: bool) -> MemoryCheckpoint | None:
        """Raises: InUseError."""
        with self._changing():
            if unless_read and (checkpoint := self._checkpoints.get(name)) and checkpoint.readers:
                path = f"{self.url}/{name}"
                raise InUseError(f"{path} is being read", verb="remove", path=path, errno=errno.EBUSY)
            return self._checkpoints.pop(name, None)


def checked_name(name: str) -> str:
    """``name``, if it is one. Raises: TypeError; ValueError."""
    if not isinstance(name, str):
        raise TypeError(f"name={name!r} must be a str")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"name={name!r} can't be a name of memory: memory://run1 and memory://team/run1 have one, "
            "without blanks and without any of ? # %"
        )
    return name
