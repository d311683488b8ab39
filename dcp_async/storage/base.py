"""What the engine asks of a medium: small transactions to write, positioned reads, and one rule.

The rule: a checkpoint exists when its `.metadata` does, and it appears whole or not at all. One exception is
stock's: where ranks saved without collectives there is no `.metadata` but a `__{rank}.metadata` per rank, and
rank 0's counts. Third parties may implement these protocols; verbs that block belong in the storage's own
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeAlias, TypeGuard, runtime_checkable

from ..errors import StorageError

# read-only, since it is the default of all calls at once
NO_NAMES: Mapping[str, str] = MappingProxyType({})
"""What most formats ask for: no other reader knows their files."""


class UnreadableError(StorageError):
    """What lies there can't be part of a checkpoint, now or later: not a regular file, closed to this
    process, of no sensible length. Whoever looks for the newest checkpoint passes over it, with a warning;
    any other StorageError says that the medium is at fault, and nothing is passed over."""


class LinkError(StorageError):
    """What lies there is a link that is not followed, or leads to nothing (ENOENT). It may be the newest
    checkpoint, so no older one is given in its place."""


class InUseError(StorageError):
    """The checkpoint is being read, and was to be removed only if it is not."""


NamesUids: TypeAlias = Callable[[bytes, Set[str]], Set[str] | None]
"""Tells which of some uids the bytes of a `.metadata` name: the files of those are the checkpoint's. None if
they can't be read; then no file beside them is a leftover. Pure, for any thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """A name under the root."""

    name: str
    committed: bool
    """Whether its `.metadata` exists, or else rank 0's of stock's."""
    modified: float
    """When it was committed (or, if it was not, last changed), in Unix seconds."""
    version: str = ""
    """Tells what was committed under this name from what was committed there before; "" where ``modified``
    does."""
    # never committed, or a link to the newest would make two checkpoints of one
    alias_of: str = ""
    """The name that this is another one for, a link to it, say; such an entry is never ``committed``."""


class Transaction(Protocol):
    """One rank's part of one save. Ends by ``commit`` or by ``abort``; ``abort`` after ``commit`` only
    releases."""

    async def put(self, file: str, offset: int, buffer: memoryview) -> None:
        """Write ``buffer`` at ``offset``: in any order, several at once; aligned to 4 KiB but for the tail of
        the file.

        The buffer is not touched any more once this returns or raises, but for a StuckThreadError.
        """

    async def seal(self, file: str) -> None:
        """Make ``file`` durable; no ``put`` to it may follow. Raises StorageError if it has not the size
        announced."""

    async def verify(self, files: Mapping[str, int]) -> None:
        """Called right before what was sealed is reported, and by the rank that leads before it commits.

        Raises: StorageError unless each of ``files`` (name -> length) is there, this rank's as it was sealed.
        A live save may have been taken for dead, and swept, by those who can't see that it lives.
        """

    def hand_over(self) -> None:
        """From here on the files belong to the rank that leads, which commits or removes them: ``abort`` only
        releases. Called before that rank is told that they are sealed, since its answer may get lost."""

    async def commit(self, metadata: bytes, manifest: bytes, *, replace: bool) -> None:
        """Publish, all or nothing: after it returns the checkpoint exists and is durable. The coordinator
        alone calls it.

        Raises: FileExistsError if the name is committed and ``replace`` is False. Then nothing has changed.
        """

    async def abort(self) -> None:
        """Leave nothing behind of an uncommitted save, and release what the transaction holds."""


class NamingTransaction(Transaction, Protocol):
    """One whose files others may know by names of their own."""

    async def commit(
        self,
        metadata: bytes,
        manifest: bytes,
        *,
        replace: bool,
        public_names: Mapping[str, str] = NO_NAMES,
    ) -> None:
        """As ``Transaction.commit``.

        ``public_names``: name -> one of the save's files, under which it is to be found as well once the
        checkpoint exists, in place of what an earlier save of this name had there.
        Raises: StorageError if a public name is that of a file of somebody else's.
        """


class SharedTransaction(NamingTransaction, Protocol):
    """One rank's part of a save whose ranks write some files in common, each its own stretches of them.

    ``put`` to such a file writes whole sectors that no other rank writes, but for the end of the file.
    """

    async def fetch(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``file``, which a rank of this save, this one or another, has sealed."""

    async def drop(self, files: Sequence[str]) -> None:
        """Remove sealed files of any rank, which are no part of the checkpoint; the rank that leads does,
        before it commits."""


class Reader(Protocol):
    """Reads one committed checkpoint; the files it opened stay readable even if somebody removes it, where
    the medium can hold them open (a bucket can't: there they are gone, an ENOENT).

    Somebody may replace the checkpoint meanwhile. Then a reader shows the old one, the new one, or both in
    part, and raises StorageError (ENOENT) for a file that is gone: whoever opens a checkpoint finds out by
    `.metadata`, and opens it again. Besides StorageError a reader may raise its kinds UnreadableError and
    LinkError, to say what an entry is.
    """

    async def metadata(self) -> bytes:
        """The bytes of `.metadata`. Raises StorageError (ENOENT) if there are only those of stock's ranks."""

    async def rank_metadata(self) -> Mapping[int, bytes]:
        """rank -> the bytes of its `__{rank}.metadata`; asked for only where there is no `.metadata`."""

    async def manifest(self) -> Sequence[bytes]:
        """The bytes of each manifest that lies there: none if stock wrote it, two if a replace was
        interrupted."""

    async def size(self, file: str) -> int:
        """Length of ``file``. Raises StorageError if there is none, or if its path leaves the root."""

    async def read_into(
        self,
        file: str,
        pieces: Sequence[tuple[int, memoryview]],
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        """Fill each buffer from its offset of ``file``.

        ``arrived``: may be called while reading, from any thread but never twice at once, with the number of
        bytes that are there, counted over ``pieces`` in their order: they are verified while the processor
        has them at hand, and must not be written to again. What it raises, this raises. A storage need not
        call it.
        Raises: StorageError if the file ends before.
        """

    async def give_back(self) -> None:
        """Nothing more will be read: what reading brought into the system's caches may go. Raises nothing."""

    async def close(self) -> None:
        """Release the files."""


@runtime_checkable
class Listing(Protocol):
    """What a reader may offer besides: where others' files can lie among a checkpoint's, which there are."""

    async def names(self) -> Sequence[str]:
        """The names of all that lies beside `.metadata`, this included."""


@runtime_checkable
class Copies(Protocol):
    """What a reader may offer besides: files that another tier has as well."""

    async def turn_to_copy(self, file: str, why: str) -> bool:
        """``file`` is not whole where it was read: from here on it is read elsewhere. False if no other tier
        has it, or none is left to turn to."""


async def turn_to_copy(reader: Reader, file: str, why: str) -> bool:
    """``Copies.turn_to_copy``; False where ``reader`` has no copies."""
    return isinstance(reader, Copies) and await reader.turn_to_copy(file, why)


class Storage(Protocol):
    """A root that holds checkpoints by name."""

    async def connect(self) -> None:
        """Get ready; called by each engine that opens on it, so a second call must do no harm."""

    async def close(self) -> None:
        """Release what it holds. Called by whoever made it."""

    def abandon(self) -> None:
        """Calls that hang are not waited for any more: the verbs that made them raise StuckThreadError.

        Called from the engine's loop when a process must end and its storage does not answer.
        """

    async def begin(
        self,
        name: str,
        files: Mapping[str, int | None],
        *,
        uid: str,
        replace: bool,
        led_from: str | None = None,
    ) -> Transaction:
        """Start to write ``name`` with these files (name -> length, None if not known before the end).

        ``led_from``: the host of the rank that commits, None on that rank itself. The others begin after it
        and find what it has begun, or say in a StorageError that they do not see it: then the ranks have no
        root in common.

        ``uid`` is part of every file's name and tells this save's files from any other's.
        Raises: FileExistsError if the name is committed and ``replace`` is False. Cancellation: nothing is
        left, or the transaction is returned all the same.
        """

    async def list(self) -> Sequence[StoredCheckpoint]:
        """All names under the root, committed or not, in no order.

        What may be a checkpoint and can't be looked at counts as committed: ``open`` says what it is.
        """

    async def remove(self, name: str, *, unless_read: bool = False) -> None:
        """Remove a checkpoint: what makes it one (`.metadata`, stock's of each rank) first, then the rest.
        What is killed half way, ``sweep`` finishes.

        ``unless_read``: not while a reader has it open, in this process or another one; a storage that can't
        tell removes it.
        Raises: StorageError (ENOENT) if there is none; InUseError.
        """

    async def sweep(self, *, named: NamesUids) -> None:
        """Remove what dead saves left under the root, and nothing that a live save or stock owns.

        ``named`` says whose files are part of a checkpoint: a storage does not decode a `.metadata` itself.
        """

    async def open(self, name: str) -> Reader:
        """Start to read ``name``.

        Raises: FileNotFoundError if it is not committed; LinkError; UnreadableError; StorageError.
        """


class ReadableStorage(Protocol):
    """What a checkpoint is opened from: the part of a Storage that looks and reads."""

    async def list(self) -> Sequence[StoredCheckpoint]:
        """As ``Storage.list``."""

    async def open(self, name: str) -> Reader:
        """As ``Storage.open``."""


class Glimpse(NamedTuple):
    """A name under the root, with as much of what lies there as a list of thousands can afford to look at."""

    stored: StoredCheckpoint
    manifest: bytes | None
    """How its only manifest begins; None if there is none or several, or if nobody has looked."""
    files: Mapping[str, int] | None
    """Name -> length of each file there, where there is no manifest; None if nobody has looked."""


@runtime_checkable
class Glimpses(Protocol):
    """A storage that looks at all its checkpoints at once, quicker than by opening each of them."""

    async def glimpse(self, head_bytes: int) -> Sequence[Glimpse]:
        """All that ``list`` gives, in no order, and the first ``head_bytes`` of each manifest."""


class SharingStorage(Storage, Protocol):
    """A storage on which several ranks may write one file, as some formats want it."""

    shares_files: bool
    """Whether it is one: a wrapper is of this class, and says what it wraps."""

    async def begin_shared(
        self,
        name: str,
        files: Mapping[str, int | None],
        shared: Mapping[str, int],
        *,
        uid: str,
        replace: bool,
        led_from: str | None = None,
    ) -> SharedTransaction:
        """As ``begin``; files of ``shared`` (name -> length) are made by the rank that leads, and all ranks
        write into them. Each seals what it has written."""


def is_sharing(storage: Storage) -> TypeGuard[SharingStorage]:
    """Whether ranks may write files of ``storage`` in common."""
    # not by isinstance(): a wrapper has the methods whatever it wraps
    return getattr(storage, "shares_files", False)


def gives_public_names(storage: Storage) -> bool:
    """Whether transactions of ``storage`` are NamingTransactions; an attribute of this name says so."""
    return getattr(storage, "gives_public_names", False)
