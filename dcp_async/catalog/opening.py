"""Opens one checkpoint by name, and checks everything but the payload.

Enters: a Storage and a name. Leaves: Contents, or what the checkpoint is. Invariant: a checkpoint of ours
without the manifest of its `.metadata` is corrupt, never taken for one of stock's.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import anyio
import xxhash
from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import BlockingThreads, collection_paused
from .._names import names_data_file
from ..errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LoadError,
    StorageError,
    UntrustedCheckpointError,
)
from ..formats import (
    SECTOR_BYTES,
    Footer,
    FooterError,
    Manifest,
    ManifestError,
    NewerVersionError,
    decode_manifest,
    decode_metadata,
    footer_span,
    merge_ranks,
    places_of,
    read_trailer,
    transforms_of,
)
from ..info import CheckpointInfo
from ..storage import LinkError, Reader, Storage, UnreadableError
from ..trust import UntrustedGlobal
from .contents import Contents

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LONG_FOOTER_BYTES = 1 << 20
"""Of files from 8 GiB on."""

_RawMetadata = Mapping[int | None, bytes]
"""What makes a checkpoint one: `.metadata` under None, or else, under its number, that of each of stock's
ranks."""


class UnfitMetadataError(UntrustedCheckpointError):
    """`.metadata` names what no checkpoint needs, so it is none that any release wrote: whoever looks for the
    newest passes over it, with a warning, as over one that is damaged. An untrusted leaf or link is the
    user's decision, and no older checkpoint is given in its place."""


def last_number(name: str) -> int | None:
    """The step that a name tells: its last digits."""
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else None


def refused_link(name: str, error: LinkError) -> CheckpointError:
    """What to tell whoever needs a checkpoint behind a link that is not followed."""
    if error.errno == errno.ENOENT:
        return StorageError(
            f"checkpoint {name!r} can't be read: {error}", verb=error.verb, path=error.path, errno=error.errno
        )
    return UntrustedCheckpointError(f"checkpoint {name!r} is not read: {error}", checkpoint_id=name)


def _may_be_replaced(error: CheckpointError) -> bool:
    """Whether a replace under the reader's hands looks like this."""
    if isinstance(error, StorageError):
        return error.errno in (errno.ENOENT, errno.ESTALE) and not isinstance(error, LinkError)
    return True


def _verdict(name: str, error: CheckpointError) -> CheckpointError:
    """What is told of a checkpoint that nobody has replaced."""
    unreadable = isinstance(error, UnreadableError)
    if isinstance(error, LinkError) or not isinstance(error, StorageError):
        return error
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
        storage: Storage,
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
            return await self._look(name, lambda name, _, raw: self._decode(name, raw))
        except LinkError as error:
            raise refused_link(name, error) from error

    async def describe(self, name: str) -> CheckpointInfo:
        """What ``name`` is, all its files there and of their lengths.

        Raises: as ``open``, but for LinkError: whoever looks for the newest must know.
        """
        return await self._look(name, self._describe)

    async def is_current(self, contents: Contents) -> bool:
        """Whether ``contents`` are of the checkpoint that is there now."""
        name = contents.info.checkpoint_id
        try:
            return not await self._was_replaced(name, contents.digest)
        except LinkError as error:
            raise refused_link(name, error) from error

    async def manifest(self, name: str) -> Manifest | None:
        """The manifest of ``name``, to put it in order; None if stock wrote it. Raises: as ``describe``;
        StorageError."""
        if len(found := await self._manifests(name)) == 1:
            return found[0]
        # by none or several a replace shows, under way or killed: the one that belongs to .metadata counts
        return await self._look(name, self._manifest_of)

    async def _manifests(self, name: str) -> list[Manifest]:
        reader = await self._enter(name)
        try:
            return [_manifest(raw) for raw in await reader.manifest()]
        except ManifestError:
            return []
        except StorageError as error:
            raise _verdict(name, error) from error
        finally:
            await reader.close()

    async def _look(
        self, name: str, look: Callable[[str, Reader, _RawMetadata], Awaitable[T]], *, keep: bool = False
    ) -> T:
        """What ``look`` finds in one state of ``name``, from `.metadata` to the files. ``keep``: the reader
        stays open if it succeeds."""
        deadline = anyio.current_time() + self._timeout
        while True:
            seen: _RawMetadata | None = None
            reader = await self._enter(name)
            try:
                seen = await self._raw(reader)
                value = await look(name, reader, seen)
            except (CorruptCheckpointError, StorageError) as error:
                await reader.close()
                known = None if seen is None else _digest(seen)
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
            reader = await self._storage.open(name)
        except FileNotFoundError:
            return True
        try:
            return _digest(await self._raw(reader)) != digest
        except StorageError as error:
            if _may_be_replaced(error):  # gone for the second time: that is how it is
                return digest is not None
            raise _verdict(name, error) from error
        finally:
            await reader.close()

    @staticmethod
    async def _raw(reader: Reader) -> _RawMetadata:
        try:
            return {None: await reader.metadata()}
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            by_rank = await reader.rank_metadata()
            if not by_rank:
                raise
            return dict(by_rank.items())

    async def _describe(self, name: str, reader: Reader, raw: _RawMetadata) -> CheckpointInfo:
        manifest = await self._manifest_of(name, reader, raw)
        if manifest is None:
            return await self._stock_info(name, reader, raw, await self._decode(name, raw))
        await self._open_files(name, reader, manifest)
        return self._info(name, manifest)

    async def _contents(self, name: str, reader: Reader, raw: _RawMetadata) -> Contents:
        manifest = await self._manifest_of(name, reader, raw)
        # what is open can't be taken away any more; decoding may take a second
        sizes = await self._open_files(name, reader, manifest) if manifest is not None else {}
        metadata = await self._decode(name, raw)
        info = (
            self._info(name, manifest)
            if manifest is not None
            else await self._stock_info(name, reader, raw, metadata)
        )
        with collection_paused():
            contents = Contents(
                info=info,
                reader=reader,
                metadata=metadata,
                digest=_digest(raw),
                manifest=manifest,
                places=places_of(name, metadata),
                transforms=transforms_of(name, metadata),
                exotic=frozenset(manifest.exotic if manifest else ()),
                strides=manifest.strides if manifest else {},
            )
        await self._check_files(contents, sizes)
        return contents

    async def _open_files(self, name: str, reader: Reader, manifest: Manifest) -> dict[str, int]:
        """File -> length, of all that the manifest names, open from here on. Raises CorruptCheckpointError
        for one that has another length."""
        sizes: dict[str, int] = {}
        for entry in manifest.files:
            nbytes = sizes[entry.name] = await reader.size(entry.name)
            if nbytes != entry.nbytes:
                raise CorruptCheckpointError(
                    f"checkpoint {name!r}: {entry.name} has {nbytes} bytes instead of {entry.nbytes}; it was "
                    "cut off. Load an older checkpoint",
                    checkpoint_id=name,
                )
        return sizes

    async def _manifest_of(self, name: str, reader: Reader, seen: _RawMetadata) -> Manifest | None:
        """The manifest that belongs to `.metadata`; None if stock wrote it."""
        if None not in seen:
            return None
        raw = seen[None]
        digest = xxhash.xxh3_64_hexdigest(raw)
        problems: list[str] = []
        for content in await reader.manifest():
            try:
                manifest = _manifest(content)
            except NewerVersionError as error:
                raise LoadError(
                    f"checkpoint {name!r} was written by a newer dcp_async: {error}; update to load it",
                    checkpoint_id=name,
                ) from error
            except ManifestError as error:
                problems.append(f"a manifest is damaged: {error}")
                continue
            if manifest.metadata_digest == digest:
                return manifest
            problems.append("the manifest belongs to another .metadata")
        if names_data_file(raw):
            raise CorruptCheckpointError(
                f"checkpoint {name!r}: .metadata and manifest do not belong together "
                f"({'; '.join(problems) or 'there is no manifest'}); load an older checkpoint",
                checkpoint_id=name,
            )
        return None

    async def _decode(self, name: str, raw: _RawMetadata) -> Metadata:
        try:
            return await self._threads.run(_decode_raw, raw)
        except UntrustedGlobal as error:
            raise UnfitMetadataError(
                f"checkpoint {name!r}: .metadata names {error.name}, which no checkpoint needs; nothing "
                "of it was run. If you trust its writer, load it with stock torch and save it again",
                checkpoint_id=name,
            ) from error
        except ValueError as error:
            raise CorruptCheckpointError(
                f"checkpoint {name!r}: .metadata is damaged ({error}); load an older checkpoint",
                checkpoint_id=name,
            ) from error

    def _info(self, name: str, manifest: Manifest) -> CheckpointInfo:
        return CheckpointInfo(
            checkpoint_id=name,
            step=manifest.step,
            time=manifest.time,
            nbytes=sum(file.nbytes for file in manifest.files),
            num_files=len(manifest.files),
            world_size=manifest.world_size,
            torch_version=manifest.torch_version,
            producer="dcp_async",
            notes=manifest.notes,
            _metadata=self._metadata_of,
        )

    async def _stock_info(
        self, name: str, reader: Reader, raw: _RawMetadata, metadata: Metadata
    ) -> CheckpointInfo:
        """Of stock's: what its metadata and its files tell; without the latter it is not whole."""
        files = {place[0] for place in places_of(name, metadata).values()}
        modified = {stored.name: stored.modified for stored in await self._storage.list()}
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

    async def _check_files(self, contents: Contents, sizes: Mapping[str, int]) -> None:
        """Open every file that is not yet (``sizes``), check its size, and fetch the block checksums of
        ours."""
        name = contents.info.checkpoint_id
        ends: dict[str, int] = {}
        for file, offset, length in contents.places.values():
            ends[file] = max(ends.get(file, 0), offset + length)
        entries = {entry.name: entry for entry in contents.manifest.files} if contents.manifest else {}
        for file, end in ends.items():
            nbytes = sizes[file] if file in sizes else await contents.reader.size(file)
            entry = entries.get(file)
            if nbytes < end:
                raise CorruptCheckpointError(
                    f"checkpoint {name!r}: {file} has {nbytes} bytes instead of {end}; it was cut off. "
                    "Load an older checkpoint",
                    checkpoint_id=name,
                )
            contents.image_bytes[file] = nbytes
            if entry is None and contents.manifest is not None and "/" not in file:
                raise CorruptCheckpointError(
                    f"checkpoint {name!r}: .metadata names {file}, the manifest does not; "
                    "load an older checkpoint",
                    checkpoint_id=name,
                )
            if entry is None:
                continue
            try:
                footer = await _read_footer(contents.reader, file, nbytes)
                if footer.digest != entry.digest:
                    raise FooterError("the footer's table is not the one that the manifest names")
            except FooterError as error:
                raise CorruptCheckpointError(
                    f"checkpoint {name!r}: {file}: {error}; load an older checkpoint", checkpoint_id=name
                ) from error
            contents.digests[file] = footer.digests
            contents.image_bytes[file] = footer.image_bytes


async def _read_footer(reader: Reader, file: str, nbytes: int) -> Footer:
    """Raises FooterError."""
    span = footer_span(nbytes)
    if span > _LONG_FOOTER_BYTES:  # a file may only pretend to be so long
        last = bytearray(SECTOR_BYTES)
        await reader.read_into(file, [(nbytes - len(last), memoryview(last))])
        read_trailer(bytes(last), nbytes)
    try:
        raw = bytearray(span)
    except (MemoryError, OverflowError) as error:
        raise FooterError(f"its footer would take {span} bytes") from error
    await reader.read_into(file, [(nbytes - len(raw), memoryview(raw))])
    return Footer.decode(bytes(raw), nbytes)


def _digest(raw: _RawMetadata) -> str:
    return xxhash.xxh3_64_hexdigest(b"".join(raw.values()))


def _manifest(raw: bytes) -> Manifest:
    with collection_paused():  # that of many tensors is as many objects
        return decode_manifest(raw)


def _decode_raw(raw: _RawMetadata) -> Metadata:
    with collection_paused():
        if None in raw:
            return decode_metadata(raw[None])
        return merge_ranks(
            {rank: decode_metadata(content) for rank, content in raw.items() if rank is not None}
        )
