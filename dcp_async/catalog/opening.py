"""Opens one checkpoint by name, and checks everything but the payload.

Enters: a Storage and a name. Leaves: Contents, or what the checkpoint is. Invariant: what is told of a
checkpoint is told of one state of it, however often saves replace it meanwhile.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import anyio
from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import BlockingThreads, collection_paused
from .._names import last_number
from ..errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LoadError,
    StorageError,
    UntrustedCheckpointError,
)
from ..formats import ItemKey, ManifestError, ManifestGist, decode_gist, locations_of, transforms_of
from ..info import CheckpointInfo, VerifyReport
from ..storage import LinkError, ReadableStorage, Reader, UnreadableError
from .contents import Contents
from .decoding import RawMetadata, decoded, digest_of, manifest_of, read_raw
from .described import info_of
from .file_checks import check_files, open_files
from .verification import Progress, Verification

logger = logging.getLogger(__name__)

T = TypeVar("T")


def refused_link(name: str, error: LinkError) -> CheckpointError:
    """What to tell whoever needs a checkpoint behind a link that is not followed."""
    if error.errno == errno.ENOENT:  # it leads nowhere, as to a disk that is not mounted: no matter of trust
        return StorageError(
            f"checkpoint {name!r} can't be read: {error}", verb=error.verb, path=error.path, errno=error.errno
        )
    return UntrustedCheckpointError(f"checkpoint {name!r} is not read: {error}", checkpoint_id=name)


def _may_be_replaced(error: CheckpointError) -> bool:
    """Whether a replace under the reader's hands looks like this."""
    if isinstance(error, StorageError):
        # ESTALE is how NFS says that an open file was removed on another host
        return error.errno in (errno.ENOENT, errno.ESTALE) and not isinstance(error, LinkError)
    # the manifest of one save beside the `.metadata` of another looks corrupt
    return True


def _verdict(name: str, error: CheckpointError) -> CheckpointError:
    """What is told of a checkpoint that nobody has replaced."""
    unreadable = isinstance(error, UnreadableError)
    if isinstance(error, LinkError) or not isinstance(error, StorageError):
        return error
    # gone, or out of the root: neither is mended by another look
    if not unreadable and error.errno not in (errno.ENOENT, errno.EPERM):
        return error  # a medium that is away for a moment must not cost a run its newest checkpoint
    return CorruptCheckpointError(
        f"checkpoint {name!r} can't be read: {error}; load an older one or restore the file",
        checkpoint_id=name,
    )


class Opener:
    """Opens the checkpoints of a storage. Owns nothing.

    A checkpoint may be replaced while it is opened. Whatever is missing then, or does not belong to the
    `.metadata` that was read, is no verdict: if `.metadata` is another one by now, opening starts again. All
    files are opened before it ends, and stay readable.
    """

    def __init__(
        self,
        storage: ReadableStorage,
        threads: BlockingThreads,
        metadata_of: Callable[[str], Awaitable[Metadata]],
        *,
        timeout: float,
    ) -> None:
        """
        Args:
            metadata_of: serves ``CheckpointInfo.metadata()``, which may be awaited on any loop.
            timeout: seconds after which a checkpoint that is replaced again and again is given up.
        """
        self._storage = storage
        self._threads = threads
        self._metadata_of = metadata_of
        self._timeout = timeout

    async def open(self, name: str) -> Contents:
        """Open ``name`` and all its files, and check everything but the payload.

        Raises: CheckpointNotFoundError, CorruptCheckpointError, UntrustedCheckpointError, of which
            UnfitMetadataError is a kind.
        """
        try:
            return await self._look(name, self._contents, keep=True)
        except LinkError as error:
            raise refused_link(name, error) from error

    async def metadata(self, name: str) -> Metadata:
        """DCP's Metadata of ``name``. Raises: as ``open``."""
        try:
            return await self._look(name, lambda name, _, raw: decoded(name, raw, self._threads))
        except LinkError as error:
            raise refused_link(name, error) from error

    async def describe(self, name: str) -> CheckpointInfo:
        """What ``name`` is, all its files there and of their lengths.

        Raises: as ``open``, but for LinkError: whoever looks for the newest must know.
        """
        return await self._look(name, self._describe)

    async def verify(
        self, name: str, *, io_concurrency: int, progress: Progress | None = None
    ) -> VerifyReport:
        """Read all of ``name`` and tell what is damaged, of one state of it.

        Raises: CheckpointNotFoundError; CorruptCheckpointError if `.metadata` can't be read at all;
            StorageError if the medium can't be asked; UntrustedCheckpointError, LoadError as ``open``.
        """

        async def look(name: str, reader: Reader, raw: RawMetadata) -> VerifyReport:
            verification = Verification(
                name,
                reader,
                self._threads,
                io_concurrency=io_concurrency,
                timeout=self._timeout,
                progress=progress,
            )
            report = await verification.run(raw)
            # files that a replace has taken away look damaged: as an error, it makes _look begin again
            if report.damage and await self._was_replaced(name, digest_of(raw)):
                raise CorruptCheckpointError(f"checkpoint {name!r} was replaced", checkpoint_id=name)
            return report

        try:
            return await self._look(name, look)
        except LinkError as error:
            raise refused_link(name, error) from error

    async def is_current(self, contents: Contents) -> bool:
        """Whether ``contents`` are of the checkpoint that is there now."""
        name = contents.info.checkpoint_id
        try:
            return not await self._was_replaced(name, contents.digest)
        except LinkError as error:
            raise refused_link(name, error) from error

    async def gist(self, name: str) -> ManifestGist | None:
        """What the manifest of ``name`` tells, to put it in order; None if stock wrote it.

        Raises: as ``describe``; StorageError.
        """
        gists = await self._gists(name)
        if len(gists) == 1:
            return gists[0]
        # by none or several a replace shows, under way or killed: the one that belongs to .metadata counts
        manifest = await self._look(name, manifest_of)
        return None if manifest is None else ManifestGist(manifest.step, manifest.time, manifest.notes)

    async def _gists(self, name: str) -> list[ManifestGist]:
        """What the manifests say that lie there, if all of them are whole."""
        reader = await self._enter(name)
        try:
            # these alone, and no look at `.metadata`: this is done for every checkpoint under the root
            return [decode_gist(raw) for raw in await reader.manifest()]
        except ManifestError:
            return []
        except StorageError as error:
            raise _verdict(name, error) from error
        finally:
            await reader.close()

    async def _look(
        self, name: str, look: Callable[[str, Reader, RawMetadata], Awaitable[T]], *, keep: bool = False
    ) -> T:
        """What ``look`` finds in one state of ``name``, from `.metadata` to the files. ``keep``: the reader
        stays open if it succeeds."""
        deadline = anyio.current_time() + self._timeout
        while True:
            seen: RawMetadata | None = None
            reader = await self._enter(name)
            try:
                seen = await read_raw(reader)
                value = await look(name, reader, seen)
            except (CorruptCheckpointError, StorageError) as error:
                await reader.close()
                known = None if seen is None else digest_of(seen)
                if not _may_be_replaced(error) or not await self._was_replaced(name, known):
                    raise _verdict(name, error) from error
                logger.debug("checkpoint %r was replaced while it was opened: %s", name, error)
            except BaseException:
                await reader.close()
                raise
            else:
                if not keep:
                    await reader.close()
                return value
            # after the look, so that there is at least one, however short the timeout
            if anyio.current_time() > deadline:
                raise LoadError(
                    f"checkpoint {name!r} was replaced again and again for {self._timeout:g} s, each time "
                    "before it was open; save it less often, or load another one",
                    checkpoint_id=name,
                )

    async def _enter(self, name: str) -> Reader:
        try:
            return await self._storage.open(name)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(
                f"checkpoint {name!r} is not committed", checkpoint_id=name
            ) from error
        except StorageError as error:
            raise _verdict(name, error) from error

    async def _was_replaced(self, name: str, digest: str | None) -> bool:
        """Whether ``name`` has a `.metadata` of another ``digest`` (None: it could not be read), or is
        gone."""
        try:
            # a new one: what a reader has opened before it shows whatever lies there by now
            reader = await self._storage.open(name)
        except FileNotFoundError:
            return True  # removed: for whoever looks again, as good as replaced
        try:
            return digest_of(await read_raw(reader)) != digest
        except StorageError as error:
            if _may_be_replaced(error):  # gone for the second time: that is how it is
                return digest is not None
            raise _verdict(name, error) from error
        finally:
            await reader.close()

    async def _describe(self, name: str, reader: Reader, raw: RawMetadata) -> CheckpointInfo:
        manifest = await manifest_of(name, reader, raw)
        if manifest is None:
            locations = locations_of(name, await decoded(name, raw, self._threads))
            return await self._stock_info(name, reader, raw, locations)
        await open_files(name, reader, manifest)
        return info_of(name, manifest, self._metadata_of)

    async def _contents(self, name: str, reader: Reader, raw: RawMetadata) -> Contents:
        manifest = await manifest_of(name, reader, raw)
        # what is open can't be taken away any more; decoding may take a second
        sizes = await open_files(name, reader, manifest) if manifest is not None else {}
        metadata = await decoded(name, raw, self._threads)
        with collection_paused():
            locations = locations_of(name, metadata)
            transforms = transforms_of(name, metadata)
        if manifest is not None:
            info = info_of(name, manifest, self._metadata_of)
        else:
            info = await self._stock_info(name, reader, raw, locations)
        listed = manifest.files if manifest is not None else ()
        digests, image_bytes = await check_files(name, reader, manifest, locations.values(), sizes)
        return Contents(
            info=info,
            reader=reader,
            metadata=metadata,
            digest=digest_of(raw),
            manifest=manifest,
            locations=locations,
            transforms=transforms,
            exotic=frozenset(manifest.exotic if manifest else ()),
            strides=manifest.strides if manifest else {},
            digests=digests,
            image_bytes=image_bytes,
            bare=frozenset(file.name for file in listed if file.public_name),
        )

    async def _stock_info(
        self,
        name: str,
        reader: Reader,
        raw: RawMetadata,
        locations: Mapping[ItemKey, tuple[str, int, int]],
    ) -> CheckpointInfo:
        """What stock's metadata and its files tell; without the latter it is not whole."""
        files = {file for file, _, _ in locations.values()}
        # stock writes no time down: that of its `.metadata` is all there is
        modified = {stored.name: stored.modified for stored in await self._storage.list()}
        # this opens them too, and raises for one that is not there
        sizes = [await reader.size(file) for file in files]
        return CheckpointInfo(
            checkpoint_id=name,
            step=last_number(name),
            time=modified.get(name, 0.0),
            nbytes=sum(sizes),
            num_files=len(files),
            world_size=None if None in raw else len(raw),
            torch_version=None,
            producer="stock",
            _metadata=self._metadata_of,
        )
