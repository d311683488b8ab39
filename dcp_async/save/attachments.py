"""Small files that are committed with a checkpoint: read before ``save()`` returns, written beside the data.

Enters: names with bytes or paths, on each rank. Leaves: sealed files, and what a manifest says of them.
Invariant: what is published under a name is what every rank that gave it had, and one of them has written it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .._names import attached_file, folded_name
from ..formats import attached_digest
from ..planning import ConflictError
from ..storage import Transaction

MAX_ATTACHED_BYTES = 64 << 20
"""The most that one rank may attach: it lies in memory beside the staging pool until it is written."""

Told = dict[str, tuple[int, str]]
"""Name -> (length, digest), as ranks tell each other. Plain data: it travels."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """One file as it was when it was attached."""

    content: bytes
    digest: str

    @classmethod
    def of(cls, content: bytes) -> Attachment:
        return cls(content, attached_digest(content))


def read_attachments(sources: Mapping[str, bytes | Path]) -> dict[str, Attachment]:
    """The bytes of each file, read where it is a path. Blocks. Raises ValueError for one that can't be read,
    or if they are too large together."""
    room = MAX_ATTACHED_BYTES
    read: dict[str, Attachment] = {}
    for name, source in sources.items():
        content = source if isinstance(source, bytes) else _read(name, source, room)
        if len(content) > room:
            raise _too_large(name)
        room -= len(content)
        read[name] = Attachment.of(content)
    return read


def _read(name: str, path: Path, room: int) -> bytes:
    try:
        # before it is opened: a FIFO would wait for its writer
        if not stat.S_ISREG((status := os.stat(path)).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        if status.st_size > room:
            raise _too_large(name)
        with open(path, "rb") as file:
            return file.read(room + 1)  # it may have grown since
    except OSError as error:
        raise ValueError(
            f"files[{name!r}]: {os.fspath(path)!r} can't be read: {error.strerror or error}. A str is a "
            "path; what is no file yet is passed as bytes"
        ) from error


def _too_large(name: str) -> ValueError:
    return ValueError(
        f"files[{name!r}]: with it, what is attached takes more than {MAX_ATTACHED_BYTES >> 20} MiB; put "
        "large data into the state, as a tensor or a leaf"
    )


def deal(told: Sequence[Told]) -> list[list[str]]:
    """Which names each rank writes: the first of those that have one. Raises ConflictError for a name that
    stands for other bytes on another rank, or that file systems may take for another one."""
    writer: dict[str, int] = {}
    folded: dict[str, str] = {}
    shares: list[list[str]] = [[] for _ in told]
    for rank, files in enumerate(told):
        for name, file in files.items():
            # one writer: a thousand ranks that give the same tokenizer must not write it a thousand times
            first = writer.setdefault(name, rank)
            if file != told[first][name]:
                raise ConflictError(
                    f"files[{name!r}] has {told[first][name][0]} bytes on rank {first} and other ones "
                    f"({file[0]} bytes) on rank {rank}; attach it on one rank alone, the same bytes on all, "
                    "or under another name on each"
                )
            if (other := folded.setdefault(folded_name(name), name)) != name:
                raise ConflictError(
                    f"files[{other!r}] of rank {writer[other]} and files[{name!r}] of rank {rank} differ in "
                    "case or accents alone, and some file systems take them for one; rename one of them"
                )
            if first == rank:
                shares[rank].append(name)
    return shares


class Attachments:
    """What is attached to one save, as far as this rank knows. Owns nothing."""

    def __init__(self, files: Mapping[str, Attachment], uid: str) -> None:
        self._files = files
        self._uid = uid
        self._share: list[str] = []
        """The names that this rank writes."""

    @property
    def told(self) -> Told:
        """What the other ranks are told of it."""
        return {name: (len(file.content), file.digest) for name, file in self._files.items()}

    @property
    def written(self) -> Told:
        """What this rank writes, and has written once ``write`` has returned."""
        return {name: self.told[name] for name in self._share}

    @property
    def lengths(self) -> dict[str, int]:
        """The files that this rank writes -> their lengths."""
        return {attached_file(self._uid, name): nbytes for name, (nbytes, _) in self.written.items()}

    def take(self, share: Sequence[str]) -> None:
        """This rank writes the names in ``share``."""
        self._share = list(share)

    async def write(self, transaction: Transaction) -> None:
        """Write this rank's share, and make it durable. Raises StorageError."""
        for name in self._share:
            file = attached_file(self._uid, name)
            # of an empty one there is nothing to put, and the storage has made it
            if content := self._files[name].content:
                await transaction.put(file, 0, memoryview(content))
            await transaction.seal(file)
