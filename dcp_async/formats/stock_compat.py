"""What stock's checkpoints need before they are read like ours.

That is one Metadata of several ranks', paths that make sense, and leaves taken apart that hold what a state
has as a container.

Enters: decoded Metadata of stock's; a leaf's value and the names that are wanted of it. Leaves: one Metadata;
paths from ``planner_data``; InnerValues by DCP's names. Until torch 2.3 containers without a tensor were
leaves, and with ``flatten_state_dict=False`` all of them are. Invariants: where two ranks contradict each
other nothing is merged; only what a state has as a container is taken apart, so ``read`` gives every leaf as
it was saved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ..errors import CorruptCheckpointError
from ..trust import check_hashes
from .tree import heads_of

_MAX_INDEX = 1 << 20
"""A list longer than this is no state but an attempt to exhaust the memory."""
_MAX_DEPTH = 200
_TOLD = 5
"""So many of the missing ranks are named."""
_MAX_TEXT = 256 << 20
_MIN_TEXT = 256
"""Bounds what is taken apart by the length of its names, and by what each of them costs besides."""

ItemKey = tuple[str, torch.Size | None]
"""Name and offsets, what a MetadataIndex compares: that one's own hash is a step in Python for each look."""


def merge_ranks(by_rank: Mapping[int, Metadata]) -> Metadata:
    """What ranks that saved without collectives wrote, each for itself, as if they had spoken to each other.

    Of what several ranks have (leaves, and chunks at one place) the lowest rank's counts, as stock counts
    replicas.

    Raises: ValueError if a rank within the numbering is missing, or if two of them describe a tensor
    differently.
    """
    # what a missing rank had would be missing without a word
    if len(by_rank) != max(by_rank) + 1:  # which may be any number that a file's name has
        first = islice((rank for rank in count() if rank not in by_rank), _TOLD)
        missing = [str(rank) for rank in first if rank < max(by_rank)]
        raise ValueError(
            f"there is no metadata of rank {', '.join(missing)}, "
            f"but of {len(by_rank)} others up to {max(by_rank)}"
        )
    names: dict[str, Any] = {}
    chunks: dict[str, dict[tuple[int, ...], ChunkStorageMetadata]] = {}
    storage_data: dict[MetadataIndex, Any] = {}
    paths: dict[str, Any] = {}
    for rank, metadata in sorted(by_rank.items()):
        stored = metadata.storage_data if isinstance(metadata.storage_data, dict) else {}
        # in this order: what a lower rank said stays
        paths = usable_paths(metadata) | paths
        for name, entry in metadata.state_dict_metadata.items():
            first = names.setdefault(name, entry)
            if type(first) is not type(entry) or not _is_alike(first, entry):
                raise ValueError(f"rank {rank} describes {name} differently than a lower rank")
            if isinstance(entry, TensorStorageMetadata):
                known = chunks.setdefault(name, {})
                storage_data |= _merge_chunks(name, known, entry.chunks, stored, rank)
            elif (index := MetadataIndex(name)) in stored:
                storage_data.setdefault(index, stored[index])
    merged = {
        name: TensorStorageMetadata(entry.properties, entry.size, list(chunks[name].values()))
        if isinstance(entry, TensorStorageMetadata)
        else entry
        for name, entry in names.items()
    }
    return Metadata(state_dict_metadata=merged, planner_data=paths, storage_data=storage_data)


def _merge_chunks(
    name: str,
    known: dict[tuple[int, ...], ChunkStorageMetadata],
    chunks: Sequence[ChunkStorageMetadata],
    stored: Mapping[MetadataIndex, Any],
    rank: int,
) -> dict[MetadataIndex, Any]:
    """Add a rank's ``chunks`` to those of lower ranks, and give where the new ones lie. Raises ValueError."""
    storage_data: dict[MetadataIndex, Any] = {}
    # they become keys, and a pickle chose them
    check_hashes([tuple(chunk.offsets) for chunk in chunks])
    for chunk in chunks:
        offsets = tuple(chunk.offsets)
        earlier = known.get(offsets)
        # an empty shard may lie where another rank's rows begin
        if earlier is None or (0 in earlier.sizes and 0 not in chunk.sizes):
            known[offsets] = chunk
            index = MetadataIndex(name, chunk.offsets)
            if index in stored:
                storage_data[index] = stored[index]
        elif earlier.sizes != chunk.sizes and 0 not in chunk.sizes:
            raise ValueError(f"rank {rank} has another chunk of {name} at {offsets} than a lower rank")
    return storage_data


def _is_alike(first: Any, other: Any) -> bool:
    if not isinstance(first, TensorStorageMetadata):
        return True
    return bool(first.size == other.size and first.properties.dtype == other.properties.dtype)


def usable_paths(metadata: Metadata) -> dict[str, tuple[str | int, ...]]:
    """Name -> path of the names whose path in ``planner_data`` is one.

    Custom planners keep there what they like, or nothing; such names then stand at the top, unsplit.
    """
    usable: dict[str, tuple[str | int, ...]] = {}
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
            usable[name] = tuple(path)
    # a path through the end of another would make one name a leaf and a container
    ends = set(usable.values()) | {(name,) for name in metadata.state_dict_metadata if name not in usable}
    return {
        name: path
        for name, path in usable.items()
        if not any(path[:length] in ends for length in range(1, len(path)))
    }


def transforms_of(name: str, metadata: Metadata) -> dict[ItemKey, tuple[str, ...]]:
    """Item -> descriptors of the stream extensions that wrote it. Raises CorruptCheckpointError."""
    transforms: dict[ItemKey, tuple[str, ...]] = {}
    for index, place in metadata.storage_data.items():
        descriptors = getattr(place, "transform_descriptors", None)  # torch before 2.6 knew none
        if descriptors:
            if not isinstance(descriptors, (list, tuple)) or not all(isinstance(d, str) for d in descriptors):
                raise CorruptCheckpointError(
                    f"checkpoint {name!r}: .metadata does not say properly how {index!r} was written",
                    checkpoint_id=name,
                )
            transforms[index.fqn, index.offset] = tuple(descriptors)
    return transforms


def locations_of(name: str, metadata: Metadata) -> dict[ItemKey, tuple[str, int, int]]:
    """Item -> (file, offset, length). Raises CorruptCheckpointError."""
    storage_data = metadata.storage_data
    if not isinstance(storage_data, dict):
        raise CorruptCheckpointError(
            f"checkpoint {name!r}: .metadata does not say where its items lie", checkpoint_id=name
        )
    locations: dict[ItemKey, tuple[str, int, int]] = {}
    for index, info in storage_data.items():
        path, offset, length = (getattr(info, field, None) for field in ("relative_path", "offset", "length"))
        # here, where the item can be named: later they are numbers in a system call
        numbers = isinstance(offset, int) and isinstance(length, int) and offset >= 0 and length >= 0
        if not isinstance(index, MetadataIndex) or not isinstance(path, str) or "\0" in path or not numbers:
            raise CorruptCheckpointError(
                f"checkpoint {name!r}: .metadata does not say properly where {index!r} lies",
                checkpoint_id=name,
            )
        locations[index.fqn, index.offset] = (path, cast(int, offset), cast(int, length))
    return locations


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerValue:
    """What lay inside of a leaf."""

    path: tuple[str | int, ...]
    """As ``planner_data`` would have it: keys as text, indices of lists as numbers."""
    value: Any

    @property
    def meta(self) -> TensorStorageMetadata | BytesStorageMetadata:
        """As `.metadata` would describe it."""
        if not isinstance(self.value, torch.Tensor):
            return BytesStorageMetadata()
        properties = TensorProperties(dtype=self.value.dtype, layout=self.value.layout)
        return TensorStorageMetadata(properties=properties, size=self.value.size(), chunks=[])


def folded(leaves: Iterable[str], wanted: Collection[str]) -> list[str]:
    """Those of ``leaves`` that lie above names that are ``wanted``."""
    above = {head for name in wanted for head in heads_of(name)}
    return [leaf for leaf in leaves if leaf in above and leaf not in wanted]


def take_apart(
    value: Any, name: str, path: tuple[str | int, ...], wanted: Collection[str]
) -> Iterator[tuple[str, InnerValue]]:
    """(name, InnerValue) of each value inside; mappings and lists are gone into unless they are ``wanted``
    themselves.

    Raises: ValueError for what goes in circles, has two values of one name, or grows without end, as
    containers do that hold one another many times.
    """
    names_met: set[str] = set()
    room = _MAX_TEXT
    above: list[Iterator[tuple[str | int, Any]]] = [iter(((path[-1], value),))]
    names = [""]
    paths = [path[:-1]]
    while above:
        try:
            entry = next(above[-1], None)
        except RecursionError:
            raise ValueError(f"{name} has a key that is nested too deep") from None
        if entry is None:
            above.pop()
            names.pop()
            paths.pop()
            continue
        key, child = entry
        below = f"{names[-1]}.{key}" if len(above) > 1 else name
        # by text: containers that hold one another many times are few objects with endless names
        room -= len(below) + _MIN_TEXT
        if room < 0 or len(above) > _MAX_DEPTH:
            raise ValueError(f"{name} holds containers without end")
        if below in wanted or not isinstance(child, (Mapping, list)):
            if below in names_met:
                raise ValueError(f"{name} holds two values of the name {below}")
            names_met.add(below)
            yield below, InnerValue(path=(*paths[-1], key), value=child)
            continue
        above.append(
            enumerate(child)
            if isinstance(child, list)
            else ((str(key), inner) for key, inner in child.items())
        )
        names.append(below)
        paths.append((*paths[-1], key))
