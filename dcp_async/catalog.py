"""Which checkpoints exist, which are whole, and what one of them holds.

Enters: a Storage. Leaves: CheckpointInfo of committed checkpoints, and opened Contents. Invariant: a
checkpoint of ours without the manifest of its `.metadata` is corrupt, never taken for one of stock's.
"""

from __future__ import annotations

import errno
import re
from array import array
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import xxhash
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from ._concurrency import BlockingThreads
from .errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LoadError,
    StorageError,
    UntrustedCheckpointError,
)
from .formats.distcp import Footer, FooterError, footer_span
from .formats.manifest import Manifest, ManifestError, NewerVersionError, decode_manifest
from .formats.stock_metadata import merge_ranks, usable_paths
from .formats.stock_pickle import decode_metadata
from .formats.structure import Tree, leaf_names, structure_from_paths, tree_from_json
from .garbage import collection_paused
from .response import CheckpointInfo, CheckpointRef
from .storage.base import Reader, Storage, StoredCheckpoint
from .trust import UntrustedGlobal
from .unfolding import Part

_OUR_NAME = re.compile(r"step-\d{8,}")
_OUR_FILE = re.compile(rb"__\d+_\d+-[0-9a-f]{16}\.distcp")

_RawMetadata = Mapping[int | None, bytes]
"""What makes a checkpoint one: `.metadata` under None, or else, under its number, that of each of stock's
ranks."""


@dataclass(slots=True, kw_only=True)
class Contents:
    """An opened checkpoint. Owns its reader; ``close()`` releases it."""

    info: CheckpointInfo
    reader: Reader
    metadata: Metadata
    digest: str
    """Of the bytes of `.metadata`: tells whether two ranks see the same checkpoint."""
    manifest: Manifest | None
    """None if stock wrote it."""
    places: dict[MetadataIndex, tuple[str, int, int]]
    """Item -> (file, offset, length)."""
    transforms: dict[MetadataIndex, tuple[str, ...]]
    """Item -> descriptors of torch's stream extensions that wrote it; most have none."""
    exotic: frozenset[str]
    """Tensors that were stored by ``torch.save``; stock's, where there is no manifest, are not told apart."""
    strides: Mapping[str, tuple[int, ...]]
    """Of tensors that were not row-major; of stock's none are known."""
    parts: dict[str, dict[str, Part]] = field(default_factory=dict)
    """Leaf -> name -> what was found inside of it, for a state that has a container there."""
    digests: dict[str, array[int]] = field(default_factory=dict)
    image_bytes: dict[str, int] = field(default_factory=dict)
    """Length of each file without its footer."""

    @property
    def names(self) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
        """Every name that was saved, in the order in which it was; those of parts in place of their leaf."""
        if not self.parts:
            return self.metadata.state_dict_metadata
        names: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, meta in self.metadata.state_dict_metadata.items():
            if name in self.parts:
                names |= {inner: part.meta for inner, part in self.parts[name].items()}
            else:
                names[name] = meta
        return names

    def part(self, name: str) -> Part | None:
        """What lay inside of a leaf under ``name``."""
        return next((inner[name] for inner in self.parts.values() if name in inner), None)

    @property
    def structure(self) -> Tree:
        """The tree that was saved; of stock's checkpoints, as far as ``planner_data`` tells (its keys are all
        str, and nothing tells the strides that a tensor had: they come back row-major, as stock gives
        them)."""
        if self.manifest is not None:
            try:
                tree = tree_from_json(self.manifest.structure)
                if set(leaf_names(tree)) != self.names.keys():
                    raise ValueError("its leaves are not the names in .metadata")
                return tree
            except ValueError as error:
                name = self.info.checkpoint_id
                raise CorruptCheckpointError(
                    f"checkpoint {name!r}: its manifest has a tree that makes no sense: {error}",
                    checkpoint_id=name,
                ) from error
        inside = {name: part.path for parts in self.parts.values() for name, part in parts.items()}
        return structure_from_paths({**usable_paths(self.metadata), **inside}, list(self.names))

    @property
    def is_merged(self) -> bool:
        """Whether each rank wrote metadata of its own, so that nothing says how many there were."""
        return self.manifest is None and self.info.world_size is not None

    async def close(self) -> None:
        await self.reader.close()


def _digits(name: str) -> int | None:
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else None


class Catalog:
    """Reads what lies in a storage. Owns nothing."""

    def __init__(
        self, storage: Storage, threads: BlockingThreads, metadata_of: Callable[[str], Awaitable[Metadata]]
    ) -> None:
        """``metadata_of`` serves ``CheckpointInfo.metadata()``, which may be awaited on any loop."""
        self._storage = storage
        self._threads = threads
        self._metadata_of = metadata_of

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
            manifest = await self._any_manifest(stored.name)
            if manifest is not None:
                return manifest.step is not None, manifest.step, stored.modified
        # a foreign directory with digits in its name is no step: only ours count before they are committed
        step = _digits(stored.name) if stored.committed or _OUR_NAME.fullmatch(stored.name) else None
        return step is not None, step, stored.modified

    async def _any_manifest(self, name: str) -> Manifest | None:
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

    async def names(self) -> list[str]:
        """Committed checkpoints, ascending: by step, those without one first, by time."""
        keyed = [
            (await self._key(stored), stored.name)
            for stored in await self._storage.list()
            if stored.committed
        ]
        keyed.sort(key=lambda entry: (entry[0][0], entry[0][1] or 0, entry[0][2]))
        return [name for _, name in keyed]

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

    def info_from(self, plain: dict[str, Any]) -> CheckpointInfo:
        """What another rank told of a checkpoint, see ``CheckpointInfo._plain``."""
        return CheckpointInfo(**plain, _metadata=self._metadata_of)

    async def latest(self) -> CheckpointInfo | None:
        """The newest whole checkpoint."""
        for name in reversed(await self.names()):
            if (info := await self.info(name)) is not None:
                return info
        return None

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
                    places=_places(name, metadata),
                    transforms=_transforms(name, metadata),
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
        files = {place[0] for place in _places(name, metadata).values()}
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
            step=_digits(name),
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


def _decode_raw(raw: _RawMetadata) -> Metadata:
    with collection_paused():
        if None in raw:
            return decode_metadata(raw[None])
        return merge_ranks(
            {rank: decode_metadata(content) for rank, content in raw.items() if rank is not None}
        )


def _transforms(name: str, metadata: Metadata) -> dict[MetadataIndex, tuple[str, ...]]:
    found: dict[MetadataIndex, tuple[str, ...]] = {}
    for index, place in metadata.storage_data.items():
        descriptors = getattr(place, "transform_descriptors", None)  # torch before 2.6 knew none
        if descriptors:
            if not isinstance(descriptors, (list, tuple)) or not all(isinstance(d, str) for d in descriptors):
                raise CorruptCheckpointError(
                    f"checkpoint {name!r}: .metadata does not say properly how {index!r} was written",
                    checkpoint_id=name,
                )
            found[index] = tuple(descriptors)
    return found


def _places(name: str, metadata: Metadata) -> dict[MetadataIndex, tuple[str, int, int]]:
    storage_data = metadata.storage_data
    if not isinstance(storage_data, dict):
        raise CorruptCheckpointError(
            f"checkpoint {name!r}: .metadata does not say where its items lie", checkpoint_id=name
        )
    places: dict[MetadataIndex, tuple[str, int, int]] = {}
    for index, place in storage_data.items():
        path, offset, length = (getattr(place, part, None) for part in ("relative_path", "offset", "length"))
        numbers = isinstance(offset, int) and isinstance(length, int) and offset >= 0 and length >= 0
        if not isinstance(index, MetadataIndex) or not isinstance(path, str) or "\0" in path or not numbers:
            raise CorruptCheckpointError(
                f"checkpoint {name!r}: .metadata does not say properly where {index!r} lies",
                checkpoint_id=name,
            )
        places[index] = (path, cast(int, offset), cast(int, length))
    return places
