"""A list of all that lies under a root, told without opening any of it.

    Storage -[Glimpse]-> survey -> Listed

Enters: a Storage. Leaves: a row per name. Invariant: the committed ones stand in the order in which every
other verb sees them; what is wrong with one is told in its row and hides no other. Needs no torch.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import xxhash

from .._concurrency import collection_paused
from .._names import FIRST_RANK_METADATA, last_number, names_file_of_ours, owned_file, rank_of_metadata
from ..errors import StorageError
from ..formats import Manifest, ManifestError, decode_head
from ..info import CheckpointInfo
from ..storage import Glimpse, Glimpses, Reader, Storage, StoredCheckpoint
from .described import info_of
from .order import ascending

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

HEAD_BYTES = 256 << 10
"""What is read of a manifest at first: in front of its tree stand some hundred bytes a file."""
_AT_ONCE = 16
"""How many checkpoints are opened at once where each has to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A row of the list."""

    stored: StoredCheckpoint
    info: CheckpointInfo | None
    """What it says of itself; None if it is not committed, or nothing can be told."""
    problem: str
    """Why nothing can be told of it, or "". Most that can be wrong with a checkpoint shows only when it is
    opened, or read."""


async def survey(storage: Storage, metadata_of: Callable[[str], Awaitable[Metadata]]) -> list[Listed]:
    """Committed checkpoints, oldest first, as a Catalog orders them; then whatever else has a name there.

    ``metadata_of`` serves ``CheckpointInfo.metadata()``. Raises StorageError for the root itself.
    """
    if isinstance(storage, Glimpses):
        glimpses = await storage.glimpse(HEAD_BYTES)
    else:
        # a storage of somebody else's that can't look at all at once: each is opened below
        glimpses = [Glimpse(stored, None, None) for stored in await storage.list()]
    looks = _Survey(storage, metadata_of)
    with collection_paused():  # of thousands, it is as many objects
        rows = [looks.at_once(glimpse) for glimpse in glimpses]
    await looks.open_others([index for index, row in enumerate(rows) if row is None], glimpses, rows)
    # by name first, so that a list does not depend on the medium's order
    listed = {row.stored.name: row for row in rows if row is not None}
    names = sorted(listed)
    committed = [listed[name] for name in names if listed[name].stored.committed]
    others = [listed[name] for name in names if not listed[name].stored.committed]
    return [listed[name] for part in (committed, others) for name in ascending(map(_told, part))]


def _told(row: Listed) -> tuple[str, int | None, float]:
    """What a row is put in order by."""
    stored = row.stored
    step = row.info.step if row.info is not None else last_number(stored.name)
    return stored.name, step, stored.modified


class _Survey:
    """One look at all checkpoints of a storage."""

    def __init__(self, storage: Storage, metadata_of: Callable[[str], Awaitable[Metadata]]) -> None:
        self._storage = storage
        self._metadata_of = metadata_of

    def at_once(self, glimpse: Glimpse) -> Listed | None:
        """What a glimpse tells; None if the checkpoint has to be opened."""
        stored = glimpse.stored
        if not stored.committed:
            return Listed(stored=stored, info=None, problem="")
        if glimpse.manifest is not None:
            try:
                return Listed(
                    stored=stored,
                    info=info_of(stored.name, decode_head(glimpse.manifest), self._metadata_of),
                    problem="",
                )
            except ManifestError as error:
                if len(glimpse.manifest) == HEAD_BYTES:  # cut: it may be of thousands of files
                    return None
                return Listed(stored=stored, info=None, problem=f"its manifest is damaged: {error}")
        if glimpse.files is not None:
            return self._without_manifest(stored, glimpse.files)
        return None

    async def open_others(
        self, indices: Sequence[int], glimpses: Sequence[Glimpse], rows: list[Listed | None]
    ) -> None:
        """Open those at ``indices``, some at once, and put what they say into ``rows``."""
        waiting = iter(indices)

        async def open_some() -> None:
            for index in waiting:  # shared: each takes the next one
                rows[index] = await self._opened(glimpses[index].stored)

        async with anyio.create_task_group() as group:
            for _ in range(min(_AT_ONCE, len(indices))):
                group.start_soon(open_some)

    async def _opened(self, stored: StoredCheckpoint) -> Listed | None:
        """What ``stored`` says once it is open; None if it was removed meanwhile."""
        try:
            reader = await self._storage.open(stored.name)
        except FileNotFoundError:
            return None
        except StorageError as error:
            return Listed(stored=stored, info=None, problem=str(error))
        try:
            manifest, is_ours = await _manifest_in(reader)
        except (ManifestError, StorageError) as error:
            return Listed(stored=stored, info=None, problem=str(error))
        finally:
            await reader.close()
        if manifest is None and is_ours:
            return Listed(stored=stored, info=None, problem="no manifest belongs to its .metadata")
        if manifest is None:
            return Listed(stored=stored, info=self._stock(stored, None), problem="")
        return self._by_manifest(stored, manifest)

    def _by_manifest(self, stored: StoredCheckpoint, manifest: Manifest) -> Listed:
        info = info_of(stored.name, manifest, self._metadata_of)
        return Listed(stored=stored, info=info, problem="")

    def _without_manifest(self, stored: StoredCheckpoint, files: Mapping[str, int]) -> Listed:
        # stock's files have no uids in their names
        if any(owned_file(name) for name in files):
            return Listed(stored=stored, info=None, problem="its manifest is missing")
        return Listed(stored=stored, info=self._stock(stored, files), problem="")

    def _stock(self, stored: StoredCheckpoint, files: Mapping[str, int] | None) -> CheckpointInfo:
        """Stock says nothing of itself: names and lengths are all there is, short of decoding."""
        data = [length for name, length in (files or {}).items() if not _is_no_data(name)]
        return CheckpointInfo(
            checkpoint_id=stored.name,
            step=last_number(stored.name),
            time=stored.modified,
            nbytes=sum(data),
            num_files=len(data),
            world_size=sum(rank_of_metadata(name) is not None for name in files or ()) or None,
            torch_version=None,
            producer="stock",
            _metadata=self._metadata_of,
        )


def _is_no_data(name: str) -> bool:
    return name.startswith(".") or name == FIRST_RANK_METADATA or rank_of_metadata(name) is not None


async def _manifest_in(reader: Reader) -> tuple[Manifest | None, bool]:
    """The manifest that belongs to what `reader` reads, and whether there has to be one."""
    contents = await reader.manifest()
    # `.metadata`, which is far longer, is read only where it has to choose between two
    if len(contents) == 1:
        return decode_head(contents[0]), True
    try:
        metadata = await reader.metadata()
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        return None, False  # of stock's ranks, each of which has metadata of its own
    digest = xxhash.xxh3_64_hexdigest(metadata)
    for manifest in map(decode_head, contents):
        if manifest.metadata_digest == digest:
            return manifest, True
    return None, names_file_of_ours(metadata)
