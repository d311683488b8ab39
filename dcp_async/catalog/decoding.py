"""What makes a checkpoint one, read and decoded: `.metadata`, the manifest that belongs to it.

Enters: a reader of one state of a checkpoint. Leaves: Metadata and Manifest, or an error of the tree.
Invariant: a checkpoint of ours without the manifest of its `.metadata` is corrupt, never taken for one of
stock's.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

import xxhash
from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import BlockingThreads, collection_paused
from .._names import names_file_of_ours
from ..errors import CorruptCheckpointError, LoadError, StorageError, UntrustedCheckpointError
from ..formats import (
    Manifest,
    ManifestError,
    NewerVersionError,
    decode_manifest,
    decode_metadata,
    merge_ranks,
)
from ..storage import Reader
from ..trust import UntrustedGlobal

RawMetadata = Mapping[int | None, bytes]
"""What makes a checkpoint one: `.metadata` under None, or else, under its number, that of each of stock's
ranks."""


class UnfitMetadataError(UntrustedCheckpointError):
    """`.metadata` names what no checkpoint needs, so it is none that any release wrote: whoever looks for the
    newest passes over it, with a warning, as over one that is damaged. An untrusted leaf or link is the
    user's decision, and no older checkpoint is given in its place."""


async def read_raw(reader: Reader) -> RawMetadata:
    """Raises StorageError if there is neither `.metadata` nor that of ranks."""
    try:
        return {None: await reader.metadata()}
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        # only where there is no `.metadata`: beside one they mean nothing
        by_rank = await reader.rank_metadata()
        if not by_rank:
            raise
        return dict(by_rank.items())


def digest_of(raw: RawMetadata) -> str:
    """Tells whether `.metadata` has been replaced."""
    return xxhash.xxh3_64_hexdigest(b"".join(raw.values()))


async def manifest_of(name: str, reader: Reader, seen: RawMetadata) -> Manifest | None:
    """The manifest that belongs to `.metadata`; None if stock wrote it."""
    return (await manifest_and_bytes(name, reader, seen))[0]


async def manifest_and_bytes(name: str, reader: Reader, seen: RawMetadata) -> tuple[Manifest | None, bytes]:
    """As ``manifest_of``, and what it was decoded from."""
    # only stock's ranks write metadata of their own, and no manifest
    if None not in seen:
        return None, b""
    raw = seen[None]
    digest = xxhash.xxh3_64_hexdigest(raw)
    problems: list[str] = []
    for content in await reader.manifest():
        try:
            manifest = _decoded_manifest(content)
        except NewerVersionError as error:
            raise LoadError(
                f"checkpoint {name!r} was written by a newer dcp_async: {error}; update to load it",
                checkpoint_id=name,
            ) from error
        except ManifestError as error:
            # no verdict yet: a replace that was killed leaves two, and the other may be the one
            problems.append(f"a manifest is damaged: {error}")
            continue
        if manifest.metadata_digest == digest:
            return manifest, content
        problems.append("the manifest belongs to another .metadata")
    # taken for one of stock's, it would be read without a checksum
    if names_file_of_ours(raw):
        raise CorruptCheckpointError(
            f"checkpoint {name!r}: .metadata and manifest do not belong together "
            f"({'; '.join(problems) or 'there is no manifest'}); load an older checkpoint",
            checkpoint_id=name,
        )
    return None, b""


async def decoded(name: str, raw: RawMetadata, threads: BlockingThreads) -> Metadata:
    """DCP's Metadata. Raises UnfitMetadataError, CorruptCheckpointError."""
    try:
        # not on the loop: that of many tensors takes a second, for which no other verb could go on
        return await threads.run(_decode_raw, raw)
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


def _decoded_manifest(raw: bytes) -> Manifest:
    with collection_paused():  # that of many tensors is as many objects
        return decode_manifest(raw)


def _decode_raw(raw: RawMetadata) -> Metadata:
    with collection_paused():
        if None in raw:
            return decode_metadata(raw[None])
        return merge_ranks(
            {rank: decode_metadata(content) for rank, content in raw.items() if rank is not None}
        )
