"""Which checkpoints exist, in which order, and which one a reference means.

Enters: a Storage, and what opens paths. Leaves: names and CheckpointInfo of committed checkpoints. Invariant:
all verbs see the same checkpoints in the same order; what a path leads to is none of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import BlockingThreads, for_each
from .._names import is_step_directory, last_number
from ..errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LoadError,
    StorageError,
)
from ..info import JSON, CheckpointInfo, CheckpointRef, Producer, VerifyReport
from ..storage import LinkError, Storage, StoredCheckpoint
from .contents import Contents
from .decoding import UnfitMetadataError
from .opening import Opener, refused_link
from .order import ascending
from .path_opener import PathOpener
from .reference import is_path, reference
from .verification import Progress

logger = logging.getLogger(__name__)


_READS_AT_ONCE = 8
"""Manifests, which are small: while one read waits, the others go on."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is told of a checkpoint without a look at its files; a CheckpointRecord."""

    checkpoint_id: str
    step: int | None
    time: float
    notes: Mapping[str, JSON]
    modified: float
    """When its `.metadata` was written, by the storage's clock."""
    producer: Producer
    """Who wrote it: the manifest has told the rest, or of stock's the name."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What lies under a root."""

    records: Sequence[Record]
    aliases: Mapping[str, str]
    """Checkpoint -> a link to it in the same root."""


def _age(record: Record) -> tuple[int, float]:
    """What orders those that have a step; the others come before."""
    return -1 if record.step is None else record.step, record.modified


def _in_order(records: Iterable[Record]) -> dict[str, int | None]:
    return ascending([(record.checkpoint_id, record.step, record.modified) for record in records])


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


class Catalog:
    """Reads what lies in a storage. Owns nothing.

    Committed checkpoints have one order for all verbs. Going down from the newest, one that is damaged is
    passed over with a warning; one that the medium can't read, or behind a link that is not followed, ends
    the search: it may be whole. Older ones of that kind are in nobody's way.
    """

    def __init__(
        self,
        storage: Storage,
        threads: BlockingThreads,
        metadata_of: Callable[[str], Awaitable[Metadata]],
        *,
        timeout: float = 600.0,
        paths: PathOpener | None = None,
        opener: PathOpener | None = None,
    ) -> None:
        """
        Args:
            metadata_of: serves ``CheckpointInfo.metadata()``, which may be awaited on any loop.
            timeout: seconds after which a checkpoint that is replaced again and again is given up.
            paths: opens what absolute paths lead to; None where names are all that is asked for.
            opener: opens names, where they may be those of more than checkpoints.
        """
        self._storage = storage
        self._metadata_of = metadata_of
        self._paths = paths
        self._opener = opener or Opener(storage, threads, metadata_of, timeout=timeout)
        self._known: dict[str, tuple[tuple[str, float], Record]] = {}
        """Name -> (which of its states, what that tells)."""
        self._told: set[tuple[str, str]] = set()
        """(name, why) of what could not be read: told once, not at every look."""

    def _opener_of(self, name: str) -> Opener | PathOpener:
        return self._paths if self._paths is not None and is_path(name) else self._opener

    async def open(self, name: str) -> Contents:
        """Open ``name`` and all its files, and check everything but the payload. Raises:
        CheckpointNotFoundError, CorruptCheckpointError, UntrustedCheckpointError."""
        return await self._opener_of(name).open(name)

    async def metadata(self, name: str) -> Metadata:
        """DCP's Metadata of ``name``. Raises: as ``open``."""
        return await self._opener_of(name).metadata(name)

    async def verify(
        self, name: str, *, io_concurrency: int, progress: Progress | None = None
    ) -> VerifyReport:
        """Read all of ``name`` and tell what is damaged; ``progress`` as for ``Verification``. Raises: as
        ``Opener.verify``."""
        return await self._opener_of(name).verify(name, io_concurrency=io_concurrency, progress=progress)

    async def is_current(self, contents: Contents) -> bool:
        """Whether what was opened has not been replaced or removed since."""
        return await self._opener_of(contents.info.checkpoint_id).is_current(contents)

    async def steps(self) -> list[int]:
        """The steps of all checkpoints, committed or not."""
        listed = await self._storage.list()
        steps = [record.step for record in (await self._recorded(listed)).values()]
        steps += [
            last_number(stored.name)
            for stored in listed
            # digits in the name of a foreign directory are no step
            if not stored.committed and is_step_directory(stored.name)
        ]
        return [step for step in steps if step is not None]

    async def records(self) -> Inventory:
        """What retention is told: of checkpoints without a look at their files, in no order.

        Each is read once, and again when it was replaced.
        """
        listed = await self._storage.list()
        records = await self._recorded(listed)
        aliases = {stored.alias_of: stored.name for stored in listed if stored.alias_of}
        return Inventory(records=list(records.values()), aliases=aliases)

    async def _recorded(self, listed: Sequence[StoredCheckpoint]) -> Mapping[str, Record]:
        """What is known of the committed ones of ``listed``, by name; read where it is not known yet."""
        known = self._known
        committed = [stored for stored in listed if stored.committed]
        unread = [
            stored
            for stored in committed
            if stored.name not in known or known[stored.name][0] != (stored.version, stored.modified)
        ]
        records: dict[str, Record] = {}

        async def read(stored: StoredCheckpoint) -> None:
            record, is_sure = await self._record(stored)
            if is_sure:
                known[stored.name] = ((stored.version, stored.modified), record)
            records[stored.name] = record

        await for_each(unread, read, at_once=min(_READS_AT_ONCE, len(unread)))
        # in this order: what could not be read is not among the known
        records |= {stored.name: known[stored.name][1] for stored in committed if stored.name not in records}
        if len(known) > 2 * len(committed) + _READS_AT_ONCE:  # names that are gone
            self._known = {name: known[name] for name in records if name in known}
        return records

    async def _record(self, stored: StoredCheckpoint) -> tuple[Record, bool]:
        """What a checkpoint tells of itself, and whether it does: what its name tells if it can't be read,
        which is no reason to know nothing of the others. Whoever opens this one is told why not."""
        name = stored.name
        try:
            gist = await self._opener.gist(name)
        except CheckpointNotFoundError:
            pass  # removed meanwhile
        except (LoadError, StorageError) as error:
            problem = refused_link(name, error) if isinstance(error, LinkError) else error
            is_medium = isinstance(problem, StorageError) and not isinstance(error, LinkError)
            if is_medium or not is_step_directory(name):  # of ours, the name tells the step
                self._tell(name, problem, "is put in order by its name and time")
            else:
                logger.debug("%r has no manifest to order it by: %s", name, problem)
        else:
            if gist is not None:
                record = Record(name, gist.step, gist.time, gist.notes, stored.modified, "dcp_async")
                return record, True
            return self._by_name(stored), True
        return self._by_name(stored), False

    def _by_name(self, stored: StoredCheckpoint) -> Record:
        step, modified = last_number(stored.name), stored.modified
        return Record(stored.name, step, modified, {}, modified, "stock")

    async def _ordered(self) -> dict[str, int | None]:
        """Name -> step of committed checkpoints, ascending."""
        return _in_order((await self._recorded(await self._storage.list())).values())

    async def names(self) -> list[str]:
        """Committed checkpoints, ascending, for ``info`` to say what they are.

        Raises: as ``latest``, so that no list ends with an older one.
        """
        names = list(await self._ordered())
        await self._newest(names)
        return names

    async def info(self, name: str) -> CheckpointInfo | None:
        """What ``name`` is; None, and a warning, if it is not whole, can't be read, or is behind a link that
        is not followed."""
        try:
            return await self._opener.describe(name)
        except CheckpointNotFoundError:
            return None  # removed meanwhile
        except LinkError as error:
            self._pass_over(name, refused_link(name, error))
        except (LoadError, StorageError) as error:
            self._pass_over(name, error)
        return None

    def tell_passed_over(self, reasons: Mapping[str, str]) -> None:
        """Log what another rank has passed over, by name, in its words."""
        for name, reason in reasons.items():
            self._pass_over(name, reason)

    def _pass_over(self, name: str, error: CheckpointError | str) -> None:
        self._tell(name, error, "is passed over")

    def _tell(self, name: str, error: CheckpointError | str, what: str) -> None:
        if (name, str(error)) not in self._told:
            self._told.add((name, str(error)))
            logger.warning("%r in %r %s: %s", name, self._storage, what, error)

    def info_from(self, plain: dict[str, Any]) -> CheckpointInfo:
        """What another rank told of a checkpoint, see ``plain_fields``."""
        return CheckpointInfo(**plain, _metadata=self._metadata_of)

    async def latest(self) -> tuple[CheckpointInfo | None, Mapping[str, str]]:
        """The newest whole checkpoint; and of newer ones that are not, by name, what is wrong with them.

        Raises: UntrustedCheckpointError or StorageError for a link that is not followed, or leads to nothing,
        and may be newer; LoadError for one that a newer release wrote.
        """
        names: list[str] | None = None
        while True:
            records = (await self._recorded(await self._storage.list())).values()
            newest = max(records, key=_age, default=None)
            if newest is not None and newest.step is not None:
                # by itself, since putting ten thousand in order takes longer; what is wrong with it is told
                # below
                with contextlib.suppress(CheckpointError):
                    return await self._opener.describe(newest.checkpoint_id), {}
            before, names = names, list(_in_order(records))
            info, passed_over, is_gone = await self._newest(names)
            # whoever removed one that was newer has saved another before: that is not in the list yet
            if not is_gone or names == before:
                return info, passed_over

    async def _newest(self, names: Sequence[str]) -> tuple[CheckpointInfo | None, Mapping[str, str], bool]:
        """As ``latest``, of ``names``; and whether one that was newer has been removed meanwhile."""
        passed_over: dict[str, str] = {}
        is_gone = False
        for name in reversed(names):
            try:
                return await self._opener.describe(name), passed_over, is_gone
            except CheckpointNotFoundError:
                is_gone = True
            except LinkError as error:
                # what lies behind it may be the newest: an older one in its place would be a silent loss
                raise refused_link(name, error) from error
            # not every LoadError: what a newer release wrote is whole, and an older one no substitute
            except (CorruptCheckpointError, UnfitMetadataError) as error:
                passed_over[name] = str(error)
                self._pass_over(name, error)
        return None, passed_over, is_gone

    async def resolve(self, ref: CheckpointRef) -> list[str]:
        """The names to try, best first. Raises CheckpointNotFoundError; TypeError for what can't be a
        reference."""
        wanted = reference(ref)
        if self._paths is not None and isinstance(wanted, str) and is_path(wanted):
            # before the root is looked at, which may hold many and need not even be there
            await self._paths.check(wanted)
            return [wanted]
        steps = await self._ordered()
        names = list(steps)
        if wanted == "latest":
            # all of them: a load goes on to the next where the newest turns out to be damaged
            chosen = names[::-1]
        elif isinstance(wanted, int):
            # of a step that was saved twice the newer one
            chosen = [name for name in reversed(names) if steps[name] == wanted][:1]
        else:
            # links to siblings are not among the names; such a one means what it leads to
            name = wanted if wanted in names else await self._meant_by(wanted)
            chosen = [name] if name in names else []
        if not chosen:
            what = "no checkpoint" if wanted == "latest" else f"no checkpoint {wanted!r}"
            others = f"there are {', '.join(map(_shown, names[-5:]))}" if names else "there is none yet"
            why = await self._why_none(wanted)
            is_name = isinstance(wanted, str) and wanted != "latest"
            hint = f"; what lies elsewhere is named by its path, such as './{wanted}'" if is_name else ""
            raise CheckpointNotFoundError(f"{what} is committed in {self._storage!r}{why}; {others}{hint}")
        return chosen

    async def is_still(self, record: Record) -> bool:
        """Whether ``record`` tells what lies there now, read anew. Raises: LoadError; StorageError."""
        gist = await self._opener.gist(record.checkpoint_id)
        if gist is None or record.producer != "dcp_async":
            return gist is None and record.producer != "dcp_async"
        # not by its step: what replaced it under this name has the same
        return (gist.time, gist.notes) == (record.time, record.notes)

    async def removable(self, ref: str | int) -> str:
        """The name to remove: of a link the link's own. Raises CheckpointNotFoundError."""
        for stored in await self._storage.list():
            if stored.name == ref and (stored.committed or stored.alias_of):
                return stored.name
        return (await self.resolve(ref))[0]

    async def _meant_by(self, name: str) -> str:
        """The checkpoint that ``name`` is an alias of."""
        return next((stored.alias_of for stored in await self._storage.list() if stored.name == name), "")

    async def _why_none(self, ref: str | int) -> str:
        """What the storage says of a name that lies there and is no checkpoint."""
        if isinstance(ref, str) and any(stored.name == ref for stored in await self._storage.list()):
            try:
                await (await self._storage.open(ref)).close()
            except (FileNotFoundError, StorageError) as error:
                return f" ({error.strerror or error})"
        return ""
