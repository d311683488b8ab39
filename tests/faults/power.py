"""What a power cut may leave of a program's file-system calls: a model of media that keep what was synced.

In: the calls of a process (`Trace`, a watcher of tests/faults/calls.py) and the tree that was there before.
Out: `CrashState` objects, trees that may be found after a cut at some moment. The model promises as little as
POSIX does: a write lasts once a sync of its file that began after it has returned, and a name once one of its
directory has; whatever else was begun may be there, be lost, or (a write) be there in part, in any
combination. A real file system does better; what survives here survives there.
"""

from __future__ import annotations

import builtins
import io
import os
import pickle
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.calls import CHANGES, RENAMES, SYNCS, UNLINKS, Call

PAGE = 4096
DIRECTORY = -1
"""What a name stands for that is a directory's; a file's is its number."""
KEPT, TORN = "kept", "torn"
Tree = dict[str, bytes | None]
"""Path below the root -> content; None for a directory."""


@dataclass(slots=True, kw_only=True)
class Op:
    """One call that changes something, or a sync, or a mark that the program set."""

    name: str
    path: str
    target: str = ""
    offset: int = 0
    data: bytes | None = None
    size: int = 0
    begin: int
    end: int = 0
    """0: it has failed, or not returned."""
    inode: int = DIRECTORY
    makes: bool = False


class Trace:
    """Watches a process and keeps all that is needed to tell what a power cut would leave."""

    def __init__(self) -> None:
        self._ops: list[Op] = []
        self._lock = threading.Lock()
        self._clock = 0
        self._running: dict[int, list[Op]] = {}
        self._positioned: set[str] = set()

    def before(self, call: Call) -> None:
        if call.name not in CHANGES:
            return
        with self._lock:
            if call.name in SYNCS | RENAMES | {"link"}:
                self._see_content(call.path)
            op = self._add(call.name, call.path, call.target)
            if call.name == "pwrite":
                self._positioned.add(call.path)
                op.data, op.offset = bytes(memoryview(call.args[1]).cast("B")), call.args[2]
            elif call.name in ("truncate", "ftruncate"):
                op.size = call.args[1]
            elif call.name == "open":
                op.makes, op.size = _open_effects(call.args)
            self._running.setdefault(threading.get_ident(), []).append(op)

    def after(self, call: Call) -> None:
        if call.name not in CHANGES:
            return
        with self._lock:
            self._clock += 1
            op = self._running[threading.get_ident()].pop()
            op.end = self._clock

    def mark(self, what: int) -> None:
        """From here on a power cut must not take what ``what`` stands for."""
        with self._lock:
            self._add("mark", "").size = what

    def dump(self, path: str) -> None:
        Path(path).write_bytes(pickle.dumps(self._ops))

    def _add(self, name: str, path: str, target: str = "") -> Op:
        self._clock += 1
        self._ops.append(Op(name=name, path=path, target=target, begin=self._clock))
        return self._ops[-1]

    def _see_content(self, path: str) -> None:
        """What Python's file objects wrote is not seen as calls: it was there at the latest now."""
        if path not in self._positioned and os.path.isfile(path):
            op = self._add("content", path)
            with _untapped_open(path) as file:
                op.data = file.read()
            op.end = self._clock


def _untapped_open(path: str) -> Any:
    return getattr(builtins.open, "__wrapped__", io.open)(path, "rb")


def _open_effects(args: Sequence[Any]) -> tuple[bool, int]:
    """Whether an open makes the file, and 1 if it empties one that is there."""
    how = args[1] if len(args) > 1 else "r"
    if isinstance(how, int):
        return bool(how & os.O_CREAT), int(bool(how & os.O_TRUNC))
    return any(letter in how for letter in "wax"), int("w" in how)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashState:
    """A tree that may be found after a power cut."""

    where: str
    durable: int
    """The last mark that was set before the cut; 0: none."""
    tree: Tree = field(repr=False)

    def lay_out(self, root: Path) -> Path:
        root.mkdir()
        for path, content in sorted(self.tree.items()):
            if content is None:
                (root / path).mkdir(exist_ok=True)
            else:
                (root / path).write_bytes(content)
        return root


def tree_of(root: Path) -> Tree:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


class Medium:
    """A traced program on a medium that held ``before``, all of it durable."""

    def __init__(self, root: Path, before: Tree, trace: Path) -> None:
        self._root = os.path.realpath(root)
        self._contents: list[bytes] = []
        """What each file held before, by its number; empty for those made since."""
        names: dict[str, int] = {}
        for path, content in before.items():
            names[path] = DIRECTORY if content is None else self._file(content)
        self._before = dict(names)
        self.ops: list[Op] = [op for op in pickle.loads(trace.read_bytes()) if op.end or op.name == "mark"]
        for op in self.ops:
            self._resolve(op, names)
        self._moments = sorted({moment for op in self.ops for moment in (op.begin, op.end) if moment})

    def _file(self, content: bytes) -> int:
        self._contents.append(content)
        return len(self._contents) - 1

    def _resolve(self, op: Op, names: dict[str, int]) -> None:
        """Find out which file the names of ``op`` stood for when it was called."""
        op.path = os.path.relpath(op.path, self._root) if op.path else ""
        op.target = os.path.relpath(op.target, self._root) if op.target else ""
        if op.name == "open" and op.makes and op.path not in names:
            op.name, op.inode = "create", self._file(b"")
        elif op.name == "open" and op.size:
            op.name, op.size = "truncate", 0
        if op.name != "create":
            op.inode = names.get(op.path, DIRECTORY)
        if op.name != "mark":
            _rename_in(names, op)

    def states(self, rng: random.Random, *, subsets: int) -> Iterator[CrashState]:
        """Each moment's: everything begun is there; nothing unsynced is; each one alone is lost, or alone is
        there; ``subsets`` random mixtures. No state twice."""
        seen: set[object] = set()
        for moment in self._moments:
            begun = [op for op in self.ops if op.begin <= moment and op.name not in (*SYNCS, "open")]
            durable = max((op.size for op in begun if op.name == "mark"), default=0)
            begun = [op for op in begun if op.name != "mark"]
            pending = [op for op in begun if not self._is_synced(op, moment)]
            kept = {op.begin: KEPT for op in begun}
            # most telling first: of equal states the first one's words are what a failure shows
            for said, fates in _mixtures(kept, pending, rng, subsets):
                key = (durable, self._key(begun, fates))
                if key in seen:
                    continue
                seen.add(key)
                where = f"cut at {moment} of {self._moments[-1]}, {said}"
                yield CrashState(where=where, durable=durable, tree=self._tree(begun, fates))

    def _is_synced(self, op: Op, moment: int) -> bool:
        changed = {os.path.dirname(path) for path in (op.path, op.target) if path}
        return all(
            any(
                sync.name in SYNCS
                and 0 < sync.end <= moment
                and 0 < op.end < sync.begin
                and (sync.inode == op.inode if is_content(op) else _directory(sync) == parent)
                for sync in self.ops
            )
            for parent in ([""] if is_content(op) else changed)
        )

    def _key(self, begun: Sequence[Op], fates: Mapping[int, str]) -> object:
        names = self._names(begun, fates)
        content = [(op.begin, fates[op.begin]) for op in begun if is_content(op) and op.begin in fates]
        inodes = set(names.values())
        shown = {op.begin for op in begun if op.inode in inodes}
        return (
            frozenset(names.items()),
            tuple(entry for entry in content if entry[0] in shown),
        )

    def _names(self, begun: Sequence[Op], fates: Mapping[int, str]) -> dict[str, int]:
        names = dict(self._before)
        for op in begun:
            if op.begin in fates and not is_content(op):
                _rename_in(names, op)

        def is_reachable(path: str) -> bool:
            parent = os.path.dirname(path)
            return not parent or (names.get(parent) == DIRECTORY and is_reachable(parent))

        return {path: inode for path, inode in names.items() if is_reachable(path)}

    def _tree(self, begun: Sequence[Op], fates: Mapping[int, str]) -> Tree:
        names = self._names(begun, fates)
        contents = {inode: bytearray(self._contents[inode]) for inode in names.values() if inode != DIRECTORY}
        for op in begun:
            if is_content(op) and op.begin in fates and op.inode in contents:
                _write(contents[op.inode], op, fates[op.begin])
        return {path: None if inode == DIRECTORY else bytes(contents[inode]) for path, inode in names.items()}


def is_content(op: Op) -> bool:
    return op.name in ("pwrite", "content", "truncate", "ftruncate")


def _directory(sync: Op) -> str:
    return "" if sync.path == "." else sync.path


def _rename_in(names: dict[str, int], op: Op) -> None:
    """Change ``names`` as ``op`` does."""
    if op.name == "create":
        names[op.path] = op.inode
    elif op.name == "mkdir":
        names[op.path] = DIRECTORY
    elif op.name == "link" or op.name in RENAMES:
        names[op.target] = op.inode
        if op.name != "link":
            names.pop(op.path, None)
    elif op.name in UNLINKS | {"rmdir"}:
        names.pop(op.path, None)
    else:
        assert op.name in SYNCS or is_content(op) or op.name == "open", f"no model of {op.name}"


def _write(content: bytearray, op: Op, fate: str) -> None:
    if op.name in ("truncate", "ftruncate"):
        del content[op.size :]
        content.extend(bytes(op.size - len(content)))
        return
    assert op.data is not None
    data = op.data[: len(op.data) // 2 // PAGE * PAGE] if fate == TORN else op.data
    content.extend(bytes(max(0, op.offset + len(data) - len(content))))
    content[op.offset : op.offset + len(data)] = data


def _mixtures(
    kept: dict[int, str], pending: Sequence[Op], rng: random.Random, subsets: int
) -> Iterator[tuple[str, dict[int, str]]]:
    """(in words, what of it is there) for one moment."""
    unsynced = [op.begin for op in pending]
    synced = {begin: fate for begin, fate in kept.items() if begin not in unsynced}
    yield "all begun is there", kept
    yield "nothing unsynced is there", synced
    for op in pending:
        words = f"{op.name} of {op.target or op.path}"
        yield f"lost alone: {words}", {begin: fate for begin, fate in kept.items() if begin != op.begin}
        yield f"kept alone: {words}", synced | {op.begin: KEPT}
        if op.name == "pwrite":
            yield f"torn: {words}", kept | {op.begin: TORN}
    for number in range(subsets if len(pending) > 1 else 0):
        fates = {op.begin: rng.choice((KEPT, TORN) if op.name == "pwrite" else (KEPT,)) for op in pending}
        mixture = {begin: fate for begin, fate in fates.items() if rng.random() < 0.5}
        yield f"mixture {number}", synced | mixture
