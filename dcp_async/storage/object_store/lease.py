"""Leases: which uncommitted objects belong to a live save.

A lease is an object that its save writes before its first file, writes again while it lives, and removes
after it was published. Whoever finds none, or one that grew old, knows the save for dead. Ages are told by
the server's clock alone. Objects are grouped by the uid in their names.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import socket
from collections.abc import Iterable, Set

import anyio

from ..._names import FIRST_RANK_METADATA, METADATA, lease_file, owned_file
from ...errors import StorageError
from ..base import NamesUids
from .bucket import Bucket, Entry, all_of

logger = logging.getLogger(__name__)

# in the time after which a lease is old
_BEATS = 5
_LOOK_SECONDS = 0.2
# for one rank to see what another has put. A bucket shows it at once; ranks of one root may begin apart
_VISIBLE_SECONDS = 10.0


class Lease:
    """The lease of one save. Owns the task that renews it; ``release`` ends it."""

    def __init__(self, bucket: Bucket, name: str, uid: str, *, max_age: float) -> None:
        self.uid = uid
        self.key = f"{name}/{lease_file(uid)}"
        self._bucket = bucket
        self._pause = max_age / _BEATS
        # for whoever looks into the bucket by hand; nothing reads it
        self._content = f"{socket.gethostname()} {os.getpid()}\n".encode()
        self._task: asyncio.Task[None] | None = None
        self._renewed = 0.0

    async def take(self) -> None:
        await self._bucket.put(self.key, self._content)
        self._renewed = anyio.current_time()
        self._task = asyncio.get_running_loop().create_task(self._renew())

    async def is_exclusive(self) -> bool:
        """Whether the server refuses to create what is there already, as it should."""
        # with the lease itself, which is there: no object more, and nothing that only a reader would write
        return not await self._bucket.create(self.key, self._content)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._pause)
            try:
                await self._bucket.put(self.key, self._content)
                self._renewed = anyio.current_time()
            except StorageError as error:  # it is young enough for some more of these
                logger.debug("could not renew the lease: %s", error)

    @property
    def lives(self) -> bool:
        """Whether it is renewed."""
        return self._task is not None

    @property
    def was_idle(self) -> bool:
        """Whether it was not renewed in time: this process stood still, and others may have swept."""
        return anyio.current_time() - self._renewed > 2 * self._pause

    def stop(self) -> None:
        """Renew it no more, so that it grows old."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def release(self) -> None:
        task = self._task
        self.stop()
        if task is not None:
            # or a renewal that is on its way would come after the removal
            await asyncio.wait({task})
        await self._bucket.delete([self.key])


async def wait_for_lease(bucket: Bucket, name: str, uid: str, host: str) -> None:
    """Until the lease of ``uid``, which a rank on ``host`` took, is seen here. Raises: StorageError
    (ENOENT)."""
    key = f"{name}/{lease_file(uid)}"
    deadline = anyio.current_time() + _VISIBLE_SECONDS
    while await bucket.head(key) is None:
        if anyio.current_time() > deadline:
            raise bucket.refusal(
                "create",
                key,
                errno.ENOENT,
                f"on host {socket.gethostname()} it is not there, though the coordinator has just made it "
                f"on host {host}: the ranks have different roots. Give all of them one bucket and prefix, "
                "or each its own with Coordination(mode='local')",
            )
        await anyio.sleep(_LOOK_SECONDS)


async def is_committed(bucket: Bucket, name: str) -> Entry | None:
    """What makes ``name`` a checkpoint; None if it is none."""
    return await bucket.head(f"{name}/{METADATA}") or await bucket.head(f"{name}/{FIRST_RANK_METADATA}")


async def _server_time(bucket: Bucket) -> float:
    """What time it is by the clock that leases are dated by."""
    key = f".clock-{secrets.token_hex(8)}"
    await bucket.put(key, b"")
    entry = await bucket.head(key)
    await bucket.delete([key])
    if entry is None:
        raise bucket.refusal("look at", key, errno.EIO, "it was written a moment ago and is not there")
    return entry.modified


async def dead_uids(bucket: Bucket, name: str, uids: Iterable[str], *, max_age: float) -> set[str]:
    """Those of ``uids`` whose save has no lease, or an old one. Asked after their files were listed."""

    async def lease_of(uid: str) -> Entry | None:
        return await bucket.head(f"{name}/{lease_file(uid)}")

    # by name, each a round trip, all at once: a listing of everything else beside them would cost more
    listed = list(uids)
    leases = dict(zip(listed, await all_of(lease_of, listed), strict=True))
    dead = {uid for uid, lease in leases.items() if lease is None}
    if len(dead) < len(leases):
        # this host's clock may be hours from the one that dated the leases
        now = await _server_time(bucket)
        dead |= {uid for uid, lease in leases.items() if lease is not None and now - lease.modified > max_age}
    return dead


async def sweep_name(
    bucket: Bucket, name: str, named: NamesUids, *, max_age: float, own: Set[str] = frozenset()
) -> bool:
    """Remove the objects of dead saves under ``name``; whether a live save is left, to be looked at again,
    but for this process's ``own``.

    Order: list, look at the leases, only then read `.metadata`, then delete; so a save that publishes
    meanwhile is never hurt: its lease was there when it was looked for, or its `.metadata` is there now."""
    by_uid: dict[str, list[Entry]] = {}
    entries = await bucket.entries(name)
    is_settled = any(entry.name == METADATA for entry in entries)
    for entry in entries:
        if (owned := owned_file(entry.name)) is not None and owned.uid not in own:
            by_uid.setdefault(owned.uid, []).append(entry)
            is_settled = is_settled and owned.kind != "lease"
    # no request beyond the listing where there is nothing to decide
    if not by_uid or (is_settled and len(by_uid) == 1):
        return False  # nothing, or the usual case: one checkpoint
    dead = await dead_uids(bucket, name, by_uid, max_age=max_age)
    published = await _published(bucket, name, dead, named)
    if published is None:
        logger.warning("%s: .metadata can't be read, so nothing is swept there", bucket.path_of(name))
        return False
    for uid in dead:
        leftovers = [entry.key for entry in by_uid[uid] if uid not in published or _is_lease(entry)]
        if uid not in published:
            await bucket.abort_uploads(name, uid)
        # the lease goes last: until then the leftovers stay recognisable as dead
        await bucket.delete(key for key in leftovers if not key.endswith(lease_file(uid)))
        await bucket.delete(key for key in leftovers if key.endswith(lease_file(uid)))
        if leftovers:
            logger.info(
                "swept %d objects of the save %s, which has ended, from %s",
                len(leftovers),
                uid,
                bucket.path_of(name),
            )
    return len(dead) < len(by_uid)


def _is_lease(entry: Entry) -> bool:
    owned = owned_file(entry.name)
    return owned is not None and owned.kind == "lease"


async def _published(bucket: Bucket, name: str, uids: Set[str], named: NamesUids) -> Set[str] | None:
    try:
        metadata = await bucket.get(f"{name}/{METADATA}")
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return set()
        raise
    return named(metadata, uids)
