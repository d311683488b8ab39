"""Which checkpoints exist, in which order, and which one a reference means.

Enters: a Storage. Leaves: names and CheckpointInfo of committed checkpoints. Invariant: all verbs see the
same checkpoints in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from ._concurrency import BlockingThreads
from .errors import CheckpointNotFoundError
from .opening import Opener, last_number
from .response import CheckpointInfo, CheckpointRef
from .storage.base import Storage, StoredCheckpoint

_OUR_NAME = re.compile(r"step-\d{8,}")


class Catalog:
    """Reads what lies in a storage. Owns nothing."""

    def __init__(
        self, storage: Storage, threads: BlockingThreads, metadata_of: Callable[[str], Awaitable[Metadata]]
    ) -> None:
        """``metadata_of`` serves ``CheckpointInfo.metadata()``, which may be awaited on any loop."""
        self._storage = storage
        self._metadata_of = metadata_of
        self._opener = Opener(storage, threads, metadata_of)
        self.open = self._opener.open
        self.info = self._opener.info
        self.metadata = self._opener.metadata

    async def steps(self) -> list[int]:
        """The steps of all checkpoints, committed or not."""
        return [
            step
            for stored in await self._storage.list()
            if (step := (await self._key(stored))[1]) is not None
        ]

    async def _key(self, stored: StoredCheckpoint) -> tuple[bool, int | None, float]:
        """(has a step, step, time): what "latest" orders by."""
        step = None
        if stored.committed:
            manifest = await self._opener.any_manifest(stored.name)
            if manifest is not None:
                return manifest.step is not None, manifest.step, stored.modified
        # a foreign directory with digits in its name is no step: only ours count before they are committed
        step = last_number(stored.name) if stored.committed or _OUR_NAME.fullmatch(stored.name) else None
        return step is not None, step, stored.modified

    async def names(self) -> list[str]:
        """Committed checkpoints, ascending: by step, those without one first, by time."""
        keyed = [
            (await self._key(stored), stored.name)
            for stored in await self._storage.list()
            if stored.committed
        ]
        keyed.sort(key=lambda entry: (entry[0][0], entry[0][1] or 0, entry[0][2]))
        return [name for _, name in keyed]

    def info_from(self, plain: dict[str, Any]) -> CheckpointInfo:
        """What another rank told of a checkpoint, see ``CheckpointInfo._plain``."""
        return CheckpointInfo(**plain, _metadata=self._metadata_of)

    async def latest(self) -> CheckpointInfo | None:
        """The newest whole checkpoint."""
        for name in reversed(await self.names()):
            if (info := await self.info(name)) is not None:
                return info
        return None

    async def resolve(self, ref: CheckpointRef) -> list[str]:
        """The names to try, best first. Raises CheckpointNotFoundError."""
        names = await self.names()
        if isinstance(ref, CheckpointInfo):
            chosen = [ref.checkpoint_id] if ref.checkpoint_id in names else []
        elif ref == "latest":
            chosen = names[::-1]
        elif isinstance(ref, int):
            keyed = {
                stored.name: await self._key(stored)
                for stored in await self._storage.list()
                if stored.committed
            }
            chosen = [name for name in reversed(names) if keyed[name][1] == ref][:1]
        else:
            chosen = [ref] if ref in names else []
        if not chosen:
            what = "no checkpoint" if ref == "latest" else f"no checkpoint {ref!r}"
            there = f"there are {', '.join(names[-5:])}" if names else "there is none yet"
            why = await self._why_none(ref)
            raise CheckpointNotFoundError(f"{what} is committed in {self._storage!r}{why}; {there}")
        return chosen

    async def _why_none(self, ref: CheckpointRef) -> str:
        """What the storage says of a name that lies there and is no checkpoint."""
        if isinstance(ref, str) and any(stored.name == ref for stored in await self._storage.list()):
            try:
                await (await self._storage.open(ref)).close()
            except FileNotFoundError as error:
                return f" ({error.strerror})" if error.strerror else ""
        return ""
