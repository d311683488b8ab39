"""One rank's files of one save, as objects of a bucket.

Enters: parts of file images, then the metadata. Leaves: a checkpoint, or nothing. Invariant: what `.metadata`
names is there, whole and of the length that was written, before `.metadata` is.
"""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Mapping, Set

import anyio

from ..._names import FIRST_RANK_METADATA, METADATA, manifest_file
from ...errors import StorageError
from .bucket import Bucket, all_of
from .lease import Lease, is_committed, sweep_name
from .upload import Upload

logger = logging.getLogger(__name__)

# besides obstore's own, and each with a look at what the one before has done
_PUBLISH_ATTEMPTS = 3


class ObjectTransaction:
    """One rank's files of one save. Owns their uploads and the lease."""

    def __init__(
        self,
        bucket: Bucket,
        name: str,
        files: Mapping[str, int | None],
        *,
        uid: str,
        lease: Lease | None,
        lease_max_age: float,
        part_bytes: int,
        concurrency: int,
    ) -> None:
        """``lease``: the leading rank's, taken; None on the others."""
        self._bucket = bucket
        self._name = name
        self._uid = uid
        self._lease = lease
        self._lease_max_age = lease_max_age
        self._uploads = {
            file: Upload(bucket, f"{name}/{file}", nbytes, part_bytes=part_bytes, at_once=concurrency)
            for file, nbytes in files.items()
        }
        self._sealed: dict[str, int] = {}
        # what is about to be published: file -> length
        self._expected: Mapping[str, int] = {}
        self._handed_over = False
        self._published = False
        # a request to publish got no answer: it may be carried out whenever
        self._is_unsure = False

    def __repr__(self) -> str:
        state = "published" if self._published else "open"
        return f"<ObjectTransaction {self._name} {self._uid} {state}>"

    async def put(self, file: str, offset: int, buffer: memoryview) -> None:
        await self._uploads[file].put(offset, buffer)

    async def seal(self, file: str) -> None:
        self._sealed[file] = await self._uploads[file].finish()
        del self._uploads[file]

    async def verify(self, files: Mapping[str, int]) -> None:
        self._expected = files
        await self._check()

    async def _check(self) -> None:
        """Raises: StorageError unless all that is about to be published is there."""

        async def check(file: str) -> None:
            key, nbytes = f"{self._name}/{file}", self._expected[file]
            entry = await self._bucket.head(key)
            if entry is None or entry.nbytes != nbytes or self._sealed.get(file, nbytes) != nbytes:
                has = "is gone" if entry is None else f"has {entry.nbytes} bytes instead of {nbytes}"
                raise self._bucket.refusal(
                    "verify",
                    key,
                    errno.ESTALE,
                    f"it {has}: the save was taken for dead and swept (did this process stand still for "
                    "long?), or somebody removed its files; save again",
                )

        await all_of(check, list(self._expected))
        if self._lease is not None and await self._bucket.head(self._lease.key) is None:
            raise self._bucket.refusal(
                "verify", self._lease.key, errno.ESTALE, "it is gone: the save was taken for dead; save again"
            )

    def hand_over(self) -> None:
        self._handed_over = self._lease is None

    # -- publishing

    async def commit(self, metadata: bytes, manifest: bytes, *, replace: bool) -> None:
        lease = self._lease
        assert lease is not None, "only the rank that leads commits"
        # before `.metadata`: whoever reads that one looks for it
        await self._bucket.put(f"{self._name}/{manifest_file(self._uid)}", manifest)
        if lease.was_idle:  # since the check others may have swept
            await self._check()
        if replace:
            await self._replace(metadata)
        else:
            await self._create(metadata)
        self._published = True
        try:
            await lease.release()
            if replace:
                await self._sweep_older(metadata)
        except StorageError as error:  # the checkpoint is there; the next save sweeps again
            logger.warning("could not remove what is left of older saves: %s", error)

    async def _replace(self, metadata: bytes) -> None:
        try:
            await self._bucket.put(f"{self._name}/{METADATA}", metadata)
        except BaseException:
            self._is_unsure = True
            raise

    async def _create(self, metadata: bytes) -> None:
        """Publish a fresh name. Raises: FileExistsError; StorageError."""
        key = f"{self._name}/{METADATA}"
        # stock's ranks may have been here meanwhile, and a server without preconditions does not look itself
        if await is_committed(self._bucket, self._name) is not None:
            raise self._taken(key)
        pause = 0.5
        for attempt in range(1, _PUBLISH_ATTEMPTS + 1):
            self._is_unsure = True
            try:
                # what is there may be ours, by a request whose answer got lost
                published = (
                    await self._bucket.create(key, metadata) or await self._bucket.get(key) == metadata
                )
            except StorageError as error:
                self._is_unsure = error.errno != errno.EACCES
                if not self._is_unsure or attempt == _PUBLISH_ATTEMPTS:
                    raise
            else:
                self._is_unsure = False
                if not published:
                    raise self._taken(key)
                return
            await anyio.sleep(pause * random.uniform(0.5, 1.0))
            pause *= 4

    def _taken(self, key: str) -> FileExistsError:
        return FileExistsError(
            errno.EEXIST, "a checkpoint of this name is committed", self._bucket.path_of(key)
        )

    async def _sweep_older(self, metadata: bytes) -> None:
        """Remove what was replaced."""

        def named(published: bytes, uids: Set[str]) -> Set[str]:
            if published == metadata:
                return uids & {self._uid}
            # another replace has published since; what else its `.metadata` names is for others to say
            return uids if self._uid.encode() in published else uids - {self._uid}

        await sweep_name(self._bucket, self._name, named, max_age=self._lease_max_age)
        # rank 0's of a checkpoint of stock's that was replaced must not come to life when `.metadata` goes
        await self._bucket.delete([f"{self._name}/{FIRST_RANK_METADATA}"])

    # -- undoing

    async def abort(self) -> None:
        ended = await all_of(Upload.stop, list(self._uploads.values()))
        if self._published:
            return
        if not all(ended):
            await self._bucket.abort_uploads(self._name, self._uid)
        if self._is_unsure:
            if self._lease is not None:
                self._lease.stop()
            logger.warning(
                "%s: whether it was published is not known, so nothing of it is removed; a later save sweeps "
                "what no .metadata names",
                self._bucket.path_of(self._name),
            )
            return
        if self._lease is None:
            if not self._handed_over:
                own = [*self._uploads, *self._sealed]
                await self._bucket.delete(f"{self._name}/{file}" for file in own)
            return
        # what ranks that died have left too
        entries = await self._bucket.entries(self._name)
        mine = [entry.key for entry in entries if self._uid in entry.name]
        await self._bucket.delete(key for key in mine if key != self._lease.key)
        await self._lease.release()
