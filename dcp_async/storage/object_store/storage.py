"""Checkpoints in a bucket: a prefix for each, whose `.metadata` is created last.

Enters: parts of file images. Leaves: an object per file, under the names that a directory would have.
Invariant: objects that a `.metadata` names were complete before it was put, and are removed only after it is
gone or names others.
"""

from __future__ import annotations

import errno
import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import anyio

from ..._names import FIRST_RANK_METADATA, METADATA, is_stock_data, owned_file, rank_of_metadata
from ...errors import StorageError
from ..base import InUseError, NamesUids, StoredCheckpoint
from .bucket import Bucket, all_of
from .check import Finding, check_bucket
from .lease import Lease, dead_uids, is_committed, sweep_name, wait_for_lease
from .options import Credentials, Retries, resolve
from .reader import ObjectReader
from .transaction import ObjectTransaction
from .upload import LEAST_PART_BYTES

if TYPE_CHECKING:
    from obstore.store import ObjectStore

logger = logging.getLogger(__name__)

# between two sweeps of the whole root, where the last one left nothing to be looked at again
_SWEEP_SECONDS = 3600.0
_SWEPT_AT_ONCE = 8


def _check_least(option: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"ObjectStorage({option}=...) is at least {least}, not {value}")


class ObjectStorage:
    """A bucket, or a prefix of one, of checkpoints. Owns no connection that has to be closed."""

    def __init__(
        self,
        url_or_store: str | ObjectStore,
        *,
        endpoint: str | None = None,
        credentials: Credentials | None = None,
        config: Mapping[str, Any] | None = None,
        retries: Retries = Retries(),
        request_timeout: float = 60.0,
        concurrency: int = 16,
        part_bytes: int = 8 << 20,
        lease_max_age: float = 600.0,
    ) -> None:
        """
        Args:
            url_or_store: `s3://bucket/run1`, `gs://`, `az://`, with credentials from where the cloud's tools
            have them; or a store of obstore's, which brings what the next three would say.
            endpoint: the server's URL, where it is not the cloud itself.
            credentials: gives them anew whenever they expire.
            config: settings of the store, by obstore's names: `{"region": "eu-west-1"}`.
            request_timeout: seconds for one request, which moves at most a part.
            concurrency: requests in flight, for each file that is written and each call that reads.
            part_bytes: the least length of an upload's parts, doubled until a file has 10,000 at most. Those
            that divide `StagingOptions.part_bytes` are sent without a copy.
            lease_max_age: seconds after which a lease that nobody renewed is taken for dead.
        Raises: ModuleNotFoundError, without obstore; ValueError; TypeError.
        """
        _check_least("concurrency", concurrency, 1)
        _check_least("part_bytes", part_bytes, LEAST_PART_BYTES)
        _check_least("lease_max_age", lease_max_age, 0.0)
        url, store = resolve(
            url_or_store,
            endpoint=endpoint,
            credentials=credentials,
            config=config,
            retries=retries,
            request_timeout=request_timeout,
        )
        self._bucket = Bucket(store, url, retries, credentials)
        self._concurrency = concurrency
        self._part_bytes = part_bytes
        self._lease_max_age = lease_max_age
        # whether the server refuses to create what is there; None until a save has asked it
        self._is_exclusive: bool | None = None
        # names with a save that was neither dead nor ours at the last sweep
        self._unsettled: set[str] = set()
        self._swept: float | None = None
        # of saves that this process leads
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._open_readers: weakref.WeakSet[ObjectReader] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"ObjectStorage({self._bucket.url!r})"

    async def connect(self) -> None:
        # a wrong bucket or key is told now, not at the first save
        await self._bucket.names()

    async def close(self) -> None:
        """Nothing: obstore ends its connections when they are idle."""

    def abandon(self) -> None:
        """Nothing: no thread of ours waits."""

    async def begin(
        self,
        name: str,
        files: Mapping[str, int | None],
        *,
        uid: str,
        replace: bool,
        led_from: str | None = None,
    ) -> ObjectTransaction:
        lease: Lease | None = None
        if led_from is not None:
            await wait_for_lease(self._bucket, name, uid, led_from)
        else:
            # early, so that nothing is written in vain; the commit has the last word
            if not replace and await is_committed(self._bucket, name) is not None:
                raise FileExistsError(
                    errno.EEXIST, "a checkpoint of this name is committed", self._bucket.path_of(name)
                )
            lease = Lease(self._bucket, name, uid, max_age=self._lease_max_age)
            # a cancellation in between would leave a lease that nobody removes
            with anyio.CancelScope(shield=True):
                await lease.take()
                self._leases.add(lease)
                await self._learn(lease)
        return ObjectTransaction(
            self._bucket,
            name,
            files,
            uid=uid,
            lease=lease,
            lease_max_age=self._lease_max_age,
            part_bytes=self._part_bytes,
            concurrency=self._concurrency,
        )

    async def _learn(self, lease: Lease) -> None:
        """Find out, once, whether the server can keep two writers of one name apart."""
        if self._is_exclusive is None:
            try:
                self._is_exclusive = await lease.is_exclusive()
            except BaseException:
                lease.stop()
                raise
            if not self._is_exclusive:
                logger.warning(
                    "%r: the server ignores If-None-Match, so of two saves of one fresh name that commit at "
                    "the same moment the second replaces the first. Let one job at a time save here, or use "
                    "a server that creates objects conditionally",
                    self,
                )

    async def list(self) -> Sequence[StoredCheckpoint]:
        async def look_at(name: str) -> StoredCheckpoint | None:
            mark = await is_committed(self._bucket, name)
            if mark is not None:
                return StoredCheckpoint(
                    name=name, committed=True, modified=mark.modified, version=mark.version
                )
            # a server may keep a directory for a while that has nothing in it any more
            changes = [entry.modified for entry in await self._bucket.entries(name)]
            return StoredCheckpoint(name=name, committed=False, modified=max(changes)) if changes else None

        stored = await all_of(look_at, await self._bucket.names())
        return [checkpoint for checkpoint in stored if checkpoint is not None]

    async def remove(self, name: str, *, unless_read: bool = False) -> None:
        bucket = self._bucket
        # a bucket holds nothing open; of what other processes read, it can tell nothing
        if unless_read and any(reader.name == name for reader in self._open_readers):
            path = bucket.path_of(name)
            raise InUseError(f"{path} is being read", verb="remove", path=path, errno=errno.EBUSY)
        entries = await bucket.entries(name)
        if not any(entry.name in (METADATA, FIRST_RANK_METADATA) for entry in entries):
            raise bucket.refusal("remove", name, errno.ENOENT, "there is no such checkpoint")
        # rank 0's comes first: without a `.metadata` it is what makes the checkpoint, with one it is dead
        # weight that must not come to life when `.metadata` goes
        marks = sorted((entry.key for entry in entries if rank_of_metadata(entry.name) is not None), key=len)
        await bucket.delete(marks)
        await bucket.delete([f"{name}/{METADATA}"])
        # of the uids that were there before: a save that begins now is not looked at
        uids = {entry.key: owned.uid for entry in entries if (owned := owned_file(entry.name)) is not None}
        dead = await dead_uids(bucket, name, {*uids.values()}, max_age=self._lease_max_age)
        if await bucket.head(f"{name}/{METADATA}") is not None:
            logger.info("%s was saved again while it was removed", bucket.path_of(name))
            return
        # stock's bear no uid; what else lies there is somebody else's, and stays
        gone = [entry.key for entry in entries if is_stock_data(entry.name) or uids.get(entry.key) in dead]
        await bucket.delete(gone)

    async def sweep(self, *, named: NamesUids) -> None:
        # of this process, not of a loop: engines on several may share the storage
        now = time.monotonic()
        is_whole = self._swept is None or now - self._swept > _SWEEP_SECONDS
        if is_whole:
            names = await self._bucket.names()
        else:
            # nobody but a save that lived then can have left something since, but for other engines
            names = sorted(self._unsettled)

        own = {lease.uid for lease in self._leases if lease.lives}

        async def sweep(name: str) -> None:
            if await sweep_name(self._bucket, name, named, max_age=self._lease_max_age, own=own):
                self._unsettled.add(name)
            else:
                self._unsettled.discard(name)

        await all_of(sweep, names, at_once=_SWEPT_AT_ONCE)
        if is_whole:
            self._swept = now

    async def check(self) -> Sequence[Finding]:
        """Whether the bucket is fit for checkpoints: what it does and lacks, found by trying. Raises nothing
        that a server may answer."""
        return await check_bucket(self._bucket)

    async def open(self, name: str) -> ObjectReader:
        key = f"{name}/{METADATA}"
        metadata: bytes | None = None
        try:
            metadata = await self._bucket.get(key)
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            if await self._bucket.head(f"{name}/{FIRST_RANK_METADATA}") is None:
                raise FileNotFoundError(
                    errno.ENOENT, "there is no checkpoint of this name", self._bucket.path_of(name)
                ) from error
        reader = ObjectReader(
            self._bucket, name, metadata, concurrency=self._concurrency, closed=self._open_readers.discard
        )
        self._open_readers.add(reader)
        return reader
