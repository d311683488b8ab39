"""What stock's Metadata needs before it is read like ours: one of many, and paths that make sense.

Enters: decoded Metadata of stock's. Leaves: one Metadata; paths from ``planner_data``. Pure. Invariant: where
two ranks contradict each other nothing is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, islice
from typing import Any, cast

from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from ..errors import CorruptCheckpointError
from ..trust import check_hashes

_MAX_INDEX = 1 << 20
"""A list longer than this is no state but an attempt to exhaust the memory."""
_MAX_DEPTH = 200
_TOLD = 5
"""So many of the missing ranks are named."""


def merge_ranks(by_rank: Mapping[int, Metadata]) -> Metadata:
    """What ranks that saved without collectives wrote, each for itself, as if they had spoken to each other.

    Of what several ranks have (leaves, and chunks at one place) the lowest rank's counts, as stock counts
    replicas.

    Raises: ValueError if a rank within the numbering is missing, or if two of them describe a tensor
    differently.
    """
    if len(by_rank) != max(by_rank) + 1:  # which may be any number that a file's name has
        first = islice((rank for rank in count() if rank not in by_rank), _TOLD)
        missing = [str(rank) for rank in first if rank < max(by_rank)]
        raise ValueError(
            f"there is no metadata of rank {', '.join(missing)}, "
            f"but of {len(by_rank)} others up to {max(by_rank)}"
        )
    names: dict[str, Any] = {}
    chunks: dict[str, dict[tuple[int, ...], ChunkStorageMetadata]] = {}
    places: dict[MetadataIndex, Any] = {}
    paths: dict[str, Any] = {}
    for rank, metadata in sorted(by_rank.items()):
        stored = metadata.storage_data if isinstance(metadata.storage_data, dict) else {}
        paths = usable_paths(metadata) | paths
        for name, entry in metadata.state_dict_metadata.items():
            first = names.setdefault(name, entry)
            if type(first) is not type(entry) or not _is_alike(first, entry):
                raise ValueError(f"rank {rank} describes {name} differently than a lower rank")
            if not isinstance(entry, TensorStorageMetadata):
                index = MetadataIndex(name)
                if index in stored:
                    places.setdefault(index, stored[index])
                continue
            check_hashes([tuple(chunk.offsets) for chunk in entry.chunks])
            known = chunks.setdefault(name, {})
            for chunk in entry.chunks:
                at = tuple(chunk.offsets)
                earlier = known.get(at)
                # an empty shard may lie where another rank's rows begin
                if earlier is None or (0 in earlier.sizes and 0 not in chunk.sizes):
                    known[at] = chunk
                    index = MetadataIndex(name, chunk.offsets)
                    if index in stored:
                        places[index] = stored[index]
                elif earlier.sizes != chunk.sizes and 0 not in chunk.sizes:
                    raise ValueError(f"rank {rank} has another chunk of {name} at {at} than a lower rank")
    merged = {
        name: TensorStorageMetadata(entry.properties, entry.size, list(chunks[name].values()))
        if isinstance(entry, TensorStorageMetadata)
        else entry
        for name, entry in names.items()
    }
    return Metadata(state_dict_metadata=merged, planner_data=paths, storage_data=places)


def _is_alike(first: Any, other: Any) -> bool:
    if not isinstance(first, TensorStorageMetadata):
        return True
    return bool(first.size == other.size and first.properties.dtype == other.properties.dtype)


def usable_paths(metadata: Metadata) -> dict[str, tuple[str | int, ...]]:
    """Name -> path of the names whose path in ``planner_data`` is one.

    Custom planners keep there what they like, or nothing; such names then stand at the top, unsplit.
    """
    found: dict[str, tuple[str | int, ...]] = {}
    entries = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    for name, path in entries.items():
        if (
            name in metadata.state_dict_metadata
            and isinstance(path, (tuple, list))
            and 0 < len(path) <= _MAX_DEPTH
            and all(type(key) is str or (type(key) is int and 0 <= key < _MAX_INDEX) for key in path)
            # first by length: one long text under many names would take long to join
            and len(path) - 1 + sum(len(key) if type(key) is str else len(str(key)) for key in path)
            == len(name)
            and ".".join(map(str, path)) == name
        ):
            found[name] = tuple(path)
    ends = set(found.values()) | {(name,) for name in metadata.state_dict_metadata if name not in found}
    return {
        name: path
        for name, path in found.items()
        if not any(path[:length] in ends for length in range(1, len(path)))
    }


def transforms_of(name: str, metadata: Metadata) -> dict[MetadataIndex, tuple[str, ...]]:
    """Item -> descriptors of the stream extensions that wrote it. Raises CorruptCheckpointError."""
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


def places_of(name: str, metadata: Metadata) -> dict[MetadataIndex, tuple[str, int, int]]:
    """Item -> (file, offset, length). Raises CorruptCheckpointError."""
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
