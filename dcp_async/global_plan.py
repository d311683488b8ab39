"""The coordinator's part of planning: who writes what, and what `.metadata` says of the whole.

Enters: every rank's Offer. Leaves: an Assignment per rank, and, once each rank has told where its items lie,
a Publication: the bytes of `.metadata` and the manifest's constant part. Pure: no I/O. Invariant: every
element of every tensor is written exactly once, and what ranks hold in common is the same on all of them.
Source: torch/distributed/checkpoint/default_planner.py (what stock plans).
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from .formats.manifest import structure_json
from .formats.metadata import MetadataTemplate, metadata_template
from .formats.structure import dcp_paths, merged_trees, tree_from_json
from .offer import Kind, Offer

Key = tuple[str, tuple[int, ...] | None]
"""An item: the name and offsets of a piece of a tensor, no offsets for anything else."""


class ConflictError(ValueError):
    """Ranks do not hold the same; the message names what and which ranks."""


class Assignment(TypedDict):
    """What one rank writes. Plain data: it travels."""

    tensors: list[int]
    """Pieces, by their place in the rank's Offer, ascending."""
    leaves: list[int]
    groups: list[tuple[int, list[int]]]
    """(group, leaves): what this rank has in common with the other ranks of the group."""


class Placement(TypedDict):
    """Where one rank's items lie in its file. Plain data: it travels."""

    keys: list[Key]
    offsets: bytes
    """array("Q"), of ``keys`` one by one."""
    lengths: bytes


@dataclass(frozen=True, slots=True)
class Publication:
    """What the coordinator publishes with every save of one plan, but for the uid."""

    metadata: MetadataTemplate
    manifest_json: str


def assign(offers: Sequence[Offer]) -> list[Assignment]:
    """Give each piece to one of the ranks that hold it, so that all write about as many bytes.

    Raises: ConflictError if ranks disagree on a tensor's size or dtype, or on the bytes of a leaf.
    """
    shared_leaves = check_offers(offers)
    assignments = [Assignment(tensors=[], leaves=[], groups=groups) for groups in shared_leaves]
    holders: dict[Key, list[tuple[int, int]]] = {}
    for rank, offer in enumerate(offers):
        shards = offer["shards"]
        for index, name in enumerate(offer["names"]):
            # a whole tensor needs no offsets to be told from a piece: pieces of another size were refused
            key = (name, shards[index][1] if index in shards else None)
            holders.setdefault(key, []).append((rank, index))
    loads = [0] * len(offers)
    shared: dict[tuple[int, ...], list[tuple[int, list[tuple[int, int]]]]] = {}
    for places in holders.values():
        rank, index = places[0]
        nbytes = _piece_bytes(offers[rank], index)
        if len(places) == 1:
            loads[rank] += nbytes
            assignments[rank]["tensors"].append(index)
        else:
            shared.setdefault(tuple(place[0] for place in places), []).append((nbytes, places))
    for ranks, pieces in shared.items():
        queue = [(loads[rank], at) for at, rank in enumerate(ranks)]
        heapq.heapify(queue)
        for nbytes, places in sorted(pieces, key=lambda piece: -piece[0]):
            load, at = queue[0]
            heapq.heapreplace(queue, (load + nbytes, at))
            rank, index = places[at]
            loads[rank] += nbytes
            assignments[rank]["tensors"].append(index)
    for assignment in assignments:
        assignment["tensors"].sort()
    written: set[str] = set()
    for offer, assignment in zip(offers, assignments, strict=True):
        # leaves are small, so the lowest rank that has one writes it
        assignment["leaves"] = [i for i, name in enumerate(offer["leaves"]) if name not in written]
        written.update(offer["leaves"])
    return assignments


def _piece_bytes(offer: Offer, index: int) -> int:
    dtype: torch.dtype = getattr(torch, offer["kinds"][offer["kind_of"][index]][0])
    return math.prod(offer["shapes"][index]) * dtype.itemsize


def _tensors_of(offer: Offer) -> Iterable[tuple[str, Kind, tuple[int, ...]]]:
    """(name, kind, global size) of each tensor that a rank knows of, pieces one by one."""
    kinds, kind_of, shapes, shards = offer["kinds"], offer["kind_of"], offer["shapes"], offer["shards"]
    sizes = [shards[index][0] if index in shards else shape for index, shape in enumerate(shapes)]
    for index, name in enumerate(offer["names"]):
        yield name, kinds[kind_of[index]], sizes[index]
    for name, index in offer["ties"]:
        yield name, kinds[kind_of[index]], sizes[index]
    yield from offer["bare"]
    for index, (kind, size) in offer["exotic"].items():
        yield offer["leaves"][index], kind, size


def _check_sizes(offers: Sequence[Offer]) -> None:
    known: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for rank, offer in enumerate(offers):
        for name, kind, size in _tensors_of(offer):
            dtype, there, first = known.setdefault(name, (kind[0], size, rank))
            if (dtype, there) != (kind[0], size):
                raise ConflictError(
                    f"{name} is {there} {dtype} on rank {first}, but {size} {kind[0]} on rank {rank}; "
                    "distributed tensors need the same global size everywhere, others other names"
                )


def check_offers(offers: Sequence[Offer]) -> list[list[tuple[int, list[int]]]]:
    """Per rank, (group, leaves) of the leaves that a group of ranks has in common.

    Raises: ConflictError if ranks disagree on a tensor's size or dtype, or on the bytes of a leaf.
    """
    _check_sizes(offers)
    check_leaves([dict(zip(offer["leaves"], offer["hashes"], strict=True)) for offer in offers])
    holders: dict[str, list[tuple[int, int]]] = {}
    for rank, offer in enumerate(offers):
        for index, name in enumerate(offer["leaves"]):
            holders.setdefault(name, []).append((rank, index))
    groups: dict[tuple[int, ...], int] = {}
    members: list[dict[int, list[int]]] = [{} for _ in offers]
    for places in holders.values():
        if len(places) > 1:
            group = groups.setdefault(tuple(rank for rank, _ in places), len(groups))
            for rank, index in places:
                members[rank].setdefault(group, []).append(index)
    return [sorted(mine.items()) for mine in members]


def check_leaves(hashes: Sequence[Mapping[str, int]]) -> None:
    """Raises ConflictError if a leaf has other bytes on another rank. ``hashes``: per rank, by name."""
    known: dict[str, tuple[int, int]] = {}
    for rank, mine in enumerate(hashes):
        for name, value in mine.items():
            first, there = known.setdefault(name, (rank, value))
            if there != value:
                raise ConflictError(
                    f"{name} differs between rank {first} and rank {rank}. If it is meant to, put it into "
                    "PerRank(...), which keeps one for each rank; if not, the ranks have drifted apart"
                )


class GlobalPlan:
    """What the coordinator knows of a plan. Holds the offers until the first publication, then only that."""

    def __init__(self, offers: Sequence[Offer], metadata: Metadata | None = None) -> None:
        """``metadata`` comes from a planner of the user's; without one it is made from the offers."""
        self._offers: Sequence[Offer] = offers
        self._metadata = metadata
        self._places: dict[MetadataIndex, tuple[int, int, int]] = {}
        self._publication: Publication | None = None

    def place(self, rank: int, placement: Placement) -> None:
        """Rank ``rank`` writes its items there."""
        offsets, lengths = array("Q", placement["offsets"]), array("Q", placement["lengths"])
        for (name, at), offset, length in zip(placement["keys"], offsets, lengths, strict=True):
            self._places[MetadataIndex(name, None if at is None else torch.Size(at))] = (rank, offset, length)

    def publication(self) -> Publication:
        """Raises ConflictError if an item has no place."""
        if self._publication is None:
            tree = merged_trees([tree_from_json(offer["tree"]) for offer in self._offers])
            made = self._metadata or _Entries(self._offers).metadata()
            metadata = Metadata(
                state_dict_metadata=made.state_dict_metadata, planner_data=dcp_paths(tree), storage_data=None
            )
            self._publication = Publication(
                metadata_template(metadata, self._all_places(metadata)),
                structure_json(tree, _strides(self._offers), _exotic(self._offers)),
            )
            self._offers, self._metadata, self._places = (), None, {}
        return self._publication

    def _all_places(self, metadata: Metadata) -> dict[MetadataIndex, tuple[int, int, int]]:
        """Where each item of ``metadata`` lies; a tie lies where what it is tied to does."""
        ties = {
            MetadataIndex(name, _offsets_of(offer, index)): MetadataIndex(
                offer["names"][index], _offsets_of(offer, index)
            )
            for offer in self._offers
            for name, index in offer["ties"]
        }
        places = {}
        for name, entry in metadata.state_dict_metadata.items():
            indices = [MetadataIndex(name)]
            if isinstance(entry, TensorStorageMetadata):
                indices = [MetadataIndex(name, chunk.offsets, at) for at, chunk in enumerate(entry.chunks)]
            for index in indices:
                place = self._places.get(index) or self._places.get(ties.get(index, index))
                if place is None:
                    raise ConflictError(f"{name}: the planner made no rank write {index}")
                places[index] = place
        return places


def _offsets_of(offer: Offer, index: int) -> torch.Size:
    if index in offer["shards"]:
        return torch.Size(offer["shards"][index][1])
    return torch.Size([0] * len(offer["shapes"][index]))


def _strides(offers: Sequence[Offer]) -> dict[str, tuple[int, ...]]:
    return {
        offer["names"][index]: tuple(stride) for offer in offers for index, stride in offer["strides"].items()
    }


def _exotic(offers: Sequence[Offer]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(offer["leaves"][index] for offer in offers for index in offer["exotic"]))


class _Entries:
    """DCP's Metadata of all that is offered. Objects that are equal are shared, so pickle stores each
    once."""

    def __init__(self, offers: Sequence[Offer]) -> None:
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._properties: dict[Kind, TensorProperties] = {}
        self._sizes: dict[tuple[int, ...], torch.Size] = {}
        self._chunks: dict[tuple[Any, Any], ChunkStorageMetadata] = {}
        self._seen: set[tuple[str, tuple[int, ...]]] = set()
        for offer in offers:
            self._add(offer)
        for name, entry in self._entries.items():
            if isinstance(entry, TensorStorageMetadata):
                covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
                if covered != math.prod(entry.size):
                    raise ConflictError(
                        f"{name}: the ranks hold {covered} of its {math.prod(entry.size)} elements; "
                        "pieces must cover a tensor exactly once"
                    )

    def metadata(self) -> Metadata:
        return Metadata(state_dict_metadata=self._entries)

    def _add(self, offer: Offer) -> None:
        kinds, kind_of, shapes, shards = offer["kinds"], offer["kind_of"], offer["shapes"], offer["shards"]
        pieces = [*enumerate(offer["names"]), *((index, name) for name, index in offer["ties"])]
        for index, name in pieces:
            size, offsets = shards.get(index) or (shapes[index], (0,) * len(shapes[index]))
            self._add_piece(name, kinds[kind_of[index]], size, offsets, shapes[index])
        for name, kind, size in offer["bare"]:
            self._entry(name, kind, size)
        opaque = BytesStorageMetadata()
        for index, name in enumerate(offer["leaves"]):
            if index in offer["exotic"]:
                kind, size = offer["exotic"][index]
                self._add_piece(name, kind, size, (0,) * len(size), size)
            else:
                self._entries.setdefault(name, opaque)

    def _entry(self, name: str, kind: Kind, size: tuple[int, ...]) -> TensorStorageMetadata:
        entry = self._entries.get(name)
        if entry is None:
            properties = self._properties.get(kind)
            if properties is None:
                properties = self._properties[kind] = TensorProperties(
                    dtype=getattr(torch, kind[0]), layout=getattr(torch, kind[1]), requires_grad=kind[2]
                )
            entry = self._entries[name] = TensorStorageMetadata(properties, self._size(size), [])
        if not isinstance(entry, TensorStorageMetadata):
            raise ConflictError(f"{name} is a tensor on one rank and something else on another")
        return entry

    def _size(self, size: tuple[int, ...]) -> torch.Size:
        return self._sizes.setdefault(size, torch.Size(size))

    def _add_piece(
        self, name: str, kind: Kind, size: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]
    ) -> None:
        entry = self._entry(name, kind, size)
        if (name, offsets) not in self._seen:
            self._seen.add((name, offsets))
            chunk = self._chunks.get((offsets, shape))
            if chunk is None:
                chunk = self._chunks[offsets, shape] = ChunkStorageMetadata(
                    offsets=self._size(offsets), sizes=self._size(shape)
                )
            entry.chunks.append(chunk)
