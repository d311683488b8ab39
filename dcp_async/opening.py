"""Opens one checkpoint by name, and checks everything but the payload.

Enters: a Storage and a name. Leaves: Contents, or what the checkpoint is. Invariant: a checkpoint of ours
without the manifest of its `.metadata` is corrupt, never taken for one of stock's.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Awaitable, Callable, Mapping

import xxhash
from torch.distributed.checkpoint.metadata import Metadata

from ._concurrency import BlockingThreads
from .contents import Contents, places_of, transforms_of
from .errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LoadError,
    StorageError,
    UntrustedCheckpointError,
)
from .formats.distcp import Footer, FooterError, footer_span
from .formats.manifest import Manifest, ManifestError, NewerVersionError, decode_manifest
from .formats.stock_metadata import merge_ranks
from .formats.stock_pickle import decode_metadata
from .garbage import collection_paused
from .response import CheckpointInfo
from .storage.base import Reader, Storage
from .trust import UntrustedGlobal

_OUR_FILE = re.compile(rb"__\d+_\d+-[0-9a-f]{16}\.distcp")

_RawMetadata = Mapping[int | None, bytes]
"""What makes a checkpoint one: `.metadata` under None, or else, under its number, that of each of stock's
ranks."""


def last_number(name: str) -> int | None:
    """The step that a name tells: its last digits."""
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else None


class Opener:
    """Opens the checkpoints of a storage. Owns nothing."""

    def __init__(
        self, storage: Storage, threads: BlockingThreads, metadata_of: Callable[[str], Awaitable[Metadata]]
    ) -> None:
        """``metadata_of`` serves ``CheckpointInfo.metadata()``, which may be awaited on any loop."""
        self._storage = storage
        self._threads = threads
        self._metadata_of = metadata_of

    async def open(self, name: str) -> Contents:
        """Open ``name`` and all its files, and check everything but the payload.

        Raises: CheckpointNotFoundError, CorruptCheckpointError, UntrustedCheckpointError.
        """
        try:
            reader = await self._storage.open(name)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(
                f"checkpoint {name!r} is not committed", checkpoint_id=name
            ) from error
        try:
            raw, manifest = await self._consistent(name, reader)
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
                    digest=xxhash.xxh3_64_hexdigest(b"".join(raw.values())),
                    manifest=manifest,
                    places=places_of(name, metadata),
                    transforms=transforms_of(name, metadata),
                    exotic=frozenset(manifest.exotic if manifest else ()),
                    strides=manifest.strides if manifest else {},
                )
            await self._check_files(contents)
        except StorageError as error:
            await reader.close()
            if error.errno not in (errno.ENOENT, errno.EPERM):
                raise  # a medium that is away for a moment must not cost a run its newest checkpoint
            raise CorruptCheckpointError(
                f"checkpoint {name!r} can't be read: {error}; load an older one or restore the file",
                checkpoint_id=name,
            ) from error
        except BaseException:
            await reader.close()
            raise
        return contents

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

    async def _consistent(self, name: str, reader: Reader) -> tuple[_RawMetadata, Manifest | None]:
        """`.metadata` and its manifest; read again if a replace came in between."""
        raw = await self._raw(reader)
        while True:
            if None not in raw:
                return raw, None
            try:
                return raw, await self._manifest_of(name, reader, raw[None])
            except CorruptCheckpointError:
                again = await self._raw(reader)
                if again == raw:
                    raise
                raw = again

    async def _manifest_of(self, name: str, reader: Reader, raw: bytes) -> Manifest | None:
        digest = xxhash.xxh3_64_hexdigest(raw)
        problems: list[str] = []
        for content in await reader.manifest():
            try:
                manifest = decode_manifest(content)
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
        if _OUR_FILE.search(raw):
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
            raise UntrustedCheckpointError(
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
        sizes = []
        for file in files:
            try:
                sizes.append(await reader.size(file))
            except StorageError as error:
                if error.errno != errno.ENOENT:
                    raise
                raise CorruptCheckpointError(f"checkpoint {name!r}: {error}", checkpoint_id=name) from error
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

    async def _check_files(self, contents: Contents) -> None:
        """Open every file, check its size, and fetch the block checksums of ours."""
        name = contents.info.checkpoint_id
        ends: dict[str, int] = {}
        for file, offset, length in contents.places.values():
            ends[file] = max(ends.get(file, 0), offset + length)
        entries = {entry.name: entry for entry in contents.manifest.files} if contents.manifest else {}
        for file, end in ends.items():
            nbytes = await contents.reader.size(file)
            entry = entries.get(file)
            if nbytes < end or (entry is not None and nbytes != entry.nbytes):
                raise CorruptCheckpointError(
                    f"checkpoint {name!r}: {file} has {nbytes} bytes instead of "
                    f"{entry.nbytes if entry else end}; it was cut off. Load an older checkpoint",
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
            raw = bytearray(footer_span(nbytes))
            await contents.reader.read_into(file, [(nbytes - len(raw), memoryview(raw))])
            try:
                footer = Footer.decode(bytes(raw), nbytes)
                if footer.digest != entry.digest:
                    raise FooterError("the footer's table is not the one that the manifest names")
            except FooterError as error:
                raise CorruptCheckpointError(
                    f"checkpoint {name!r}: {file}: {error}; load an older checkpoint", checkpoint_id=name
                ) from error
            contents.digests[file] = footer.digests
            contents.image_bytes[file] = footer.image_bytes

    async def any_manifest(self, name: str) -> Manifest | None:
        try:
            reader = await self._storage.open(name)
            try:
                found = [decode_manifest(raw) for raw in await reader.manifest()]
                if (
                    len(found) > 1
                ):  # a replace was killed or is under way: the one that belongs to .metadata counts
                    digest = xxhash.xxh3_64_hexdigest((await self._raw(reader)).get(None, b""))
                    found = [manifest for manifest in found if manifest.metadata_digest == digest]
            finally:
                await reader.close()
        except (FileNotFoundError, ManifestError):
            return None  # whoever opens this checkpoint is told why; here it is only put in order
        return max(found, key=lambda manifest: manifest.time, default=None)

    async def info(self, name: str) -> CheckpointInfo | None:
        """What ``name`` is; None if its `.metadata` and manifest do not belong together."""
        try:
            reader = await self._storage.open(name)
        except FileNotFoundError:
            return None  # removed meanwhile
        try:
            raw, manifest = await self._consistent(name, reader)
            if manifest is None:
                return await self._stock_info(name, reader, raw, await self._decode(name, raw))
            for file in manifest.files:
                if await reader.size(file.name) != file.nbytes:
                    return None
            return self._info(name, manifest)
        except LoadError:
            return None
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            return None
        finally:
            await reader.close()

    async def metadata(self, name: str) -> Metadata:
        """DCP's Metadata of ``name``."""
        try:
            reader = await self._storage.open(name)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(
                f"checkpoint {name!r} is not committed", checkpoint_id=name
            ) from error
        try:
            return await self._decode(name, await self._raw(reader))
        finally:
            await reader.close()


def _decode_raw(raw: _RawMetadata) -> Metadata:
    with collection_paused():
        if None in raw:
            return decode_metadata(raw[None])
        return merge_ranks(
            {rank: decode_metadata(content) for rank, content in raw.items() if rank is not None}
        )
