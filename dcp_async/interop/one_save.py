"""One save of stock's on one rank: the directory is leased, a file written, the whole published.

Enters: plans and results of stock's, with what ranks tell each other in their storage data. Leaves: a
checkpoint of ours, or nothing. Invariant: whatever goes wrong here, or is never called any more, undoes what
this rank has done.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from .._concurrency import collection_paused, first_failure
from .._names import last_number, owned_file
from ..errors import CheckpointError, Phase, SaveError
from ..formats import ItemKey
from ..planning import WrittenItem, stock_publication
from ..save import File, FileNames, ResolvedItems, make_release, save_error, write_items
from ..staging import BufferPool, StagingOptions, num_parts
from ..storage import Transaction
from .call_resources import CallResources

_PART_BYTES = StagingOptions().part_bytes
"""The unit of flow."""
_SLOTS = 4
"""One that is filled, two that are written, one that is checksummed."""
_LEASE_SECONDS = 10.0
"""For a network file system to show one host what another made."""
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Share:
    """What the coordinator tells a rank, as its plan's storage data."""

    uid: str
    token: str
    """Which save the rank's plan was made for: planners that cache hand out that of an earlier one."""
    rank: int

    @property
    def prefix(self) -> str:
        """What stock's own writer asks for, should it be given a cached plan of ours."""
        return f"__{self.rank}_"


@dataclass(frozen=True, slots=True)
class Told:
    """What a rank tells the coordinator of an item, as its result's storage data."""

    uid: str
    file: File | None
    item: WrittenItem


class OneSave:
    """What the calls of one save have in common. Owns its CallResources, and ends them with itself."""

    step = None
    """No call of stock's tells one."""

    def __init__(self, directory: Path, *, io_concurrency: int, overwrite: bool) -> None:
        self.directory = directory
        self.token = secrets.token_hex(8)
        self.uid = ""
        """The coordinator's, once it leads."""
        self.rank = 0
        self.is_coordinator = False
        self._overwrite = overwrite
        self._lead: Transaction | None = None
        self._resources = CallResources(directory, io_concurrency=io_concurrency)
        # a save that another rank failed ends without a call: its thread's end, or its next save, tells
        self._dropped = weakref.finalize(self, self._resources.close_elsewhere)
        self._dropped.atexit = False

    @property
    def checkpoint_id(self) -> str:
        return self.directory.name

    @property
    def has_begun(self) -> bool:
        """Whether it is past its set-up, or has ended."""
        return bool(self.uid) or not self._dropped.alive

    def close(self) -> None:
        """Undo what was not committed. A second call does nothing."""
        if self._dropped.detach() is not None:
            self._resources.close()

    @contextlib.contextmanager
    def _told(self, phase: Phase) -> Iterator[None]:
        """Whatever goes wrong inside ends the save and is raised as its SaveError."""
        try:
            yield
        except SaveError:
            self.close()
            raise
        except (Exception, BaseExceptionGroup) as error:
            self.close()
            cause = first_failure(error)
            raise save_error(cause, phase, self, rank=self.rank) from cause
        except BaseException:
            self.close()
            raise

    def lead(self) -> None:
        """Lease the directory; the coordinator's. Raises: CheckpointExistsError, SaveError."""
        self.uid = secrets.token_hex(8)

        async def begin() -> Transaction:
            storage = self._resources.storage
            await storage.connect()
            lead = await storage.begin(self.checkpoint_id, {}, uid=self.uid, replace=self._overwrite)
            self._resources.transactions.append(lead)
            return lead

        with self._told("plan"):
            self._lead = self._resources.run(begin())

    def write(
        self, items: Sequence[WriteItem], planner: SavePlanner, share: object
    ) -> list[tuple[WriteItem, Told]]:
        """Write this rank's file and make it durable. ``share``: what its plan says, of this save or, from a
        cache, of another, which may have been of another writer's. Raises: SaveError."""
        with self._told("write"):
            with collection_paused():
                resolved = ResolvedItems(items, planner)
            uid, files = self._resources.run(self._write(share, resolved))
            file = files[0] if files else None
        if not self.is_coordinator:  # the file is the coordinator's now
            self.close()
        with collection_paused():
            return [(item, Told(uid, file, written)) for item, written in resolved.written(self.rank)]

    async def _write(self, share: object, items: ResolvedItems) -> tuple[str, list[File]]:
        resources, layout = self._resources, items.layout
        uid = self.uid
        if not self.is_coordinator:
            await resources.storage.connect()
            if isinstance(share, Share) and share.token == self.token:
                uid = share.uid
            else:
                uid = await self._leading_uid()
        names = FileNames(self.rank, uid)
        transaction = await resources.storage.begin(
            self.checkpoint_id,
            names.lengths(layout),
            uid=uid,
            replace=True,  # the coordinator has the say
            led_from=socket.gethostname(),
        )
        resources.transactions.append(transaction)
        # memory for this save alone: a writer has no end at which a pool of its own could be let go
        pool = BufferPool(slot_bytes=_PART_BYTES, budget_bytes=_SLOTS * _PART_BYTES)
        pool.reserve(self, min(_SLOTS, num_parts(layout.image_bytes, _PART_BYTES)))
        try:
            files = await write_items(
                items,
                names,
                transaction,
                pool=pool,
                threads=resources.threads,
                io_concurrency=resources.io_concurrency,
                patience=resources.timeouts.storage,
            )
        finally:
            pool.close()
        await transaction.verify(names.lengths(layout))
        transaction.hand_over()
        return uid, files

    async def _leading_uid(self) -> str:
        """The uid of the save that leads in the directory: a planner's cached plan tells that of an earlier
        one, so it is looked for; ``publish`` finds out if it is another's."""
        deadline = time.monotonic() + _LEASE_SECONDS
        while (uid := await self._resources.threads.run(_newest_lease, self.directory)) is None:
            if time.monotonic() > deadline:
                raise FileNotFoundError(
                    f"no save leads in {self.directory}, as seen from host {socket.gethostname()}: give all "
                    "ranks one directory on a shared file system"
                )
            await anyio.sleep(_LOOK_SECONDS)
        return uid

    def publish(self, metadata: Metadata, told: Mapping[ItemKey, Told], files: Sequence[File | None]) -> None:
        """Make it a checkpoint; the coordinator's, at the end. ``files``: what each rank wrote. Raises:
        SaveError, CheckpointExistsError."""
        with self._told("commit"), collection_paused():
            if {item.uid for item in told.values()} - {self.uid}:
                raise CheckpointError(
                    "ranks wrote for different saves: two saves into one directory ran at once, with plans "
                    "that a planner had cached; let one end before the next begins"
                )
            publication = stock_publication(metadata, {key: item.item for key, item in told.items()})
            release = make_release(
                publication,
                [file for file in files if file is not None],
                {},
                checkpoint_id=self.checkpoint_id,
                uid=self.uid,
                world_size=len(files),
                # as a checkpoint that stock wrote has one
                step=last_number(self.checkpoint_id),
                notes={},
            )
        lead = self._lead
        assert lead is not None

        async def commit() -> None:
            await lead.verify(release.sizes)
            # whoever is interrupted in a commit could not tell whether the checkpoint exists
            with anyio.CancelScope(shield=True):
                await lead.commit(release.metadata, release.manifest, replace=self._overwrite)

        with self._told("commit"):
            self._resources.run(commit())
        self.close()


def _newest_lease(directory: Path) -> str | None:
    # the newest: those of saves that died may lie there too
    leases: list[tuple[float, str]] = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(directory):
            owned = owned_file(entry.name)
            if owned is not None and owned.kind == "lease":
                leases.append((entry.stat(follow_symlinks=False).st_mtime, owned.uid))
    return max(leases)[1] if leases else None
