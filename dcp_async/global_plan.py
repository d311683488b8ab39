"""The coordinator's part of planning: who writes what, and what `.metadata` says of the whole.

Enters: every rank's Offer. Leaves: an Assignment per rank, and, once each rank has told where its items lie,
a Publication: the bytes of `.metadata` and the manifest's constant part. Pure: no I/O. Invariant: every
element of every tensor is written exactly once, and what ranks hold in common is the same on all of them.
Ranks that offered equal bytes are looked at as one, and tensors that lie alike on all ranks likewise: what is
left to do per rank and tensor is to note a place and to print it (docs/scale.md).
Source: torch/distributed/checkpoint/default_planner.py (what stock plans).
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypedDict, TypeVar

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from .formats.manifest import structure_json
from .formats.metadata import Item, MetadataTemplate, metadata_template
from .formats.structure import Tree, dcp_paths, merged_trees, tree_from_json
from .offer import Kind, Offer, unpack_leaves, unpack_tensors, unpack_tree
from .sharding import Offsets

T = TypeVar("T")


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

    tensors: bytes
    """array("I"), by their place in the rank's Offer."""
    leaves: bytes
    """array("I"), likewise; they follow the tensors."""
    offsets: bytes
    """array("Q"), of the items one by one."""
    lengths: bytes
    """array("Q")."""


@dataclass(frozen=True, slots=True)
class Publication:
    """What the coordinator publishes with every save of one plan, but for the uid."""

    metadata: MetadataTemplate
    manifest_json: str


@dataclass(slots=True)
class _Part:
    """Tensors as a group of ranks offered them."""

    ranks: list[int]
    names: list[str]
    form_of: array[int]
    forms: list[tuple[Kind, Offsets]]
    strides: dict[int, tuple[int, ...]]
    ties: list[tuple[str, int]]
    bare: list[tuple[str, Kind, Offsets]]


@dataclass(slots=True)
class _LeafPart:
    """Leaves as a group of ranks offered them."""

    ranks: list[int]
    names: list[str]
    exotic: dict[int, tuple[Kind, Offsets]]


Signature = tuple[tuple[int, int], ...]
"""Every (part, form) of a tensor: tensors of one signature lie alike on all ranks."""
Holder = tuple[int, int]
"""(rank, which entry of the signature)."""
Pieces = dict[tuple[Offsets, Offsets], list[Holder]]
"""(offsets, shape) -> the ranks that hold this piece."""


def _grouped(raws: Iterable[bytes], unpack: Callable[[bytes], T]) -> list[tuple[list[int], T]]:
    """(ranks, what they sent) of ranks that sent equal bytes, the lowest rank's first."""
    ranks: dict[bytes, list[int]] = {}
    for rank, raw in enumerate(raws):
        ranks.setdefault(raw, []).append(rank)
    return [(mine, unpack(raw)) for raw, mine in ranks.items()]


class Offers:
    """What all ranks offered, decoded, and checked against each other."""

    def __init__(self, offers: Sequence[Offer]) -> None:
        """Raises ConflictError if ranks disagree on a tensor's size or dtype or on the bytes of a leaf, or if
        a tensor's pieces do not make it up."""
        self.boxes = [offer["boxes"] for offer in offers]
        self.parts = [
            _Part(
                ranks,
                each["names"],
                array("I", each["form_of"]),
                each["forms"],
                each["strides"],
                each["ties"],
                each["bare"],
            )
            for ranks, each in _grouped((offer["tensors"] for offer in offers), unpack_tensors)
        ]
        self.leaves = [
            _LeafPart(ranks, each["names"], each["exotic"])
            for ranks, each in _grouped((offer["leaves"] for offer in offers), unpack_leaves)
        ]
        self._pieces: dict[Signature, Pieces] = {}
        self._trees = _grouped((offer["tree"] for offer in offers), unpack_tree)
        self._check_sizes()
        self._check_leaves([offer["hashes"] for offer in offers])
        self._check_coverage()

    @property
    def num_ranks(self) -> int:
        return len(self.boxes)

    def tree(self) -> Tree:
        """Of all ranks."""
        return merged_trees([tree_from_json(tree) for _, tree in self._trees])

    def names(self) -> set[str]:
        """Of all that some rank holds."""
        found = {name for leaves in self.leaves for name in leaves.names}
        return found | self.places.keys() | self.ties.keys()

    @cached_property
    def places(self) -> dict[str, list[tuple[int, int]]]:
        """Name -> (part, index) of its pieces."""
        return _by_name(
            (name, (number, index))
            for number, part in enumerate(self.parts)
            for index, name in enumerate(part.names)
        )

    @cached_property
    def ties(self) -> dict[str, list[tuple[int, int]]]:
        """Name -> (part, index) of pieces of another name that are its own as well."""
        return _by_name(
            (name, (number, index)) for number, part in enumerate(self.parts) for name, index in part.ties
        )

    @cached_property
    def alike(self) -> dict[Signature, list[str]]:
        """Signature -> names of the tensors that have it, ties aside."""
        return self._signed(self.places)

    def signed(self) -> dict[Signature, list[str]]:
        """The same with ties, for which their pieces of either kind count."""
        if not self.ties:
            return self.alike
        pieces = {name: self.places.get(name, []) + tied for name, tied in self.ties.items()}
        return self._signed(self.places | pieces)

    def _signed(self, places: Mapping[str, Sequence[tuple[int, int]]]) -> dict[Signature, list[str]]:
        forms = [part.form_of for part in self.parts]
        found: dict[Signature, list[str]] = {}
        for name, mine in places.items():
            found.setdefault(tuple((part, forms[part][index]) for part, index in mine), []).append(name)
        return found

    def pieces(self, signature: Signature) -> Pieces:
        """Who holds which piece of the tensors of ``signature``."""
        found = self._pieces.get(signature)
        if found is None:
            found = self._pieces[signature] = {}
            for entry, (part, form) in enumerate(signature):
                for rank in self.parts[part].ranks:
                    found.setdefault(self.boxes[rank][form], []).append((rank, entry))
        return found

    def kind(self, signature: Signature) -> tuple[Kind, Offsets]:
        """(kind, global size) of its tensors."""
        part, form = signature[0]
        return self.parts[part].forms[form]

    def _check_sizes(self) -> None:
        known: dict[str, tuple[str, Offsets, int]] = {}

        def check(name: str, mine: tuple[str, Offsets, int]) -> None:
            first = known.setdefault(name, mine)
            if first[:2] != mine[:2]:
                raise ConflictError(
                    f"{name} is {first[1]} {first[0]} on rank {first[2]}, but {mine[1]} {mine[0]} on rank "
                    f"{mine[2]}; distributed tensors need the same global size everywhere, others other names"
                )

        for part in self.parts:
            rank = part.ranks[0]
            forms = [(kind[0], size, rank) for kind, size in part.forms]
            for name, form in zip(part.names, part.form_of, strict=True):
                check(name, forms[form])
            for name, index in part.ties:
                check(name, forms[part.form_of[index]])
            for name, kind, size in part.bare:
                check(name, (kind[0], size, rank))
        whole = set(known)
        for leaves in self.leaves:
            rank = leaves.ranks[0]
            for index, name in enumerate(leaves.names):
                if name in whole:
                    there = known[name][2]
                    raise ConflictError(
                        f"{name} is a tensor on rank {there} and something else on rank {rank}; give it "
                        "another name, or put it into PerRank(...)"
                    )
                if index in leaves.exotic:
                    kind, size = leaves.exotic[index]
                    check(name, (kind[0], size, rank))

    def _check_leaves(self, hashes: Sequence[bytes]) -> None:
        def distinct() -> Iterator[tuple[int, Mapping[str, int]]]:
            for leaves in self.leaves:
                first = {hashes[rank]: rank for rank in reversed(leaves.ranks)}
                for raw, rank in first.items():
                    yield rank, dict(zip(leaves.names, array("Q", raw), strict=True))

        _compare(sorted(distinct(), key=lambda mine: mine[0]))

    def _check_coverage(self) -> None:
        held = self.signed()
        known = self.places.keys() | self.ties.keys()
        missing = {name: size for part in self.parts for name, _, size in part.bare if name not in known}
        for signature, names in held.items():
            _check_covered(names[0], self.kind(signature)[1], self.pieces(signature))
        for name, size in missing.items():
            _check_covered(name, size, {})


def _check_covered(name: str, size: Offsets, pieces: Pieces) -> None:
    covered, whole = sum(math.prod(shape) for _, shape in pieces), math.prod(size)
    if covered != whole:
        raise ConflictError(
            f"{name}: the ranks hold {covered} of its {whole} elements; "
            "pieces must cover a tensor exactly once"
        )


def _by_name(places: Iterable[tuple[str, tuple[int, int]]]) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for name, place in places:
        found.setdefault(name, []).append(place)
    return found


def assign(offers: Offers) -> list[Assignment]:
    """Give each piece to one of the ranks that hold it, so that all write about as many bytes."""
    assignments = [Assignment(tensors=[], leaves=[], groups=groups) for groups in shared_leaves(offers)]
    _assign_tensors(offers, [assignment["tensors"] for assignment in assignments])
    written: set[str] = set()
    for leaves in offers.leaves:
        # leaves are small, so the lowest rank that has one writes it
        mine = assignments[leaves.ranks[0]]["leaves"]
        mine += [index for index, name in enumerate(leaves.names) if name not in written]
        written.update(leaves.names)
    return assignments


def _assign_tensors(offers: Offers, assigned: Sequence[list[int]]) -> None:
    loads = [0] * len(assigned)
    shared: dict[tuple[int, ...], list[tuple[int, list[Holder], list[tuple[int, ...]]]]] = {}
    for signature, names in offers.alike.items():
        # entry of the signature -> the index of each of the tensors there
        indices = list(zip(*([index for _, index in offers.places[name]] for name in names), strict=True))
        itemsize = _dtype(offers.kind(signature)[0]).itemsize
        for (_, shape), holders in offers.pieces(signature).items():
            nbytes = math.prod(shape) * itemsize
            if len(holders) == 1:
                rank, entry = holders[0]
                loads[rank] += nbytes * len(names)
                assigned[rank].extend(indices[entry])
            else:
                ranks = tuple(rank for rank, _ in holders)
                shared.setdefault(ranks, []).append((nbytes, holders, indices))
    for ranks, pieces in shared.items():
        queue = [(loads[rank], at) for at, rank in enumerate(ranks)]
        heapq.heapify(queue)
        for nbytes, holders, indices in sorted(pieces, key=lambda piece: -piece[0]):
            for tensor in range(len(indices[0])):
                load, at = queue[0]
                heapq.heapreplace(queue, (load + nbytes, at))
                rank, entry = holders[at]
                loads[rank] += nbytes
                assigned[rank].append(indices[entry][tensor])
    for mine in assigned:
        mine.sort()


def shared_leaves(offers: Offers) -> list[list[tuple[int, list[int]]]]:
    """Per rank, (group, leaves) of the leaves that a group of ranks has in common."""
    holders = _by_name(
        (name, (number, index))
        for number, leaves in enumerate(offers.leaves)
        for index, name in enumerate(leaves.names)
    )
    groups: dict[tuple[int, ...], int] = {}
    members: list[dict[int, list[int]]] = [{} for _ in offers.leaves]
    for places in holders.values():
        if sum(len(offers.leaves[number].ranks) for number, _ in places) > 1:
            group = groups.setdefault(tuple(number for number, _ in places), len(groups))
            for number, index in places:
                members[number].setdefault(group, []).append(index)
    found: list[list[tuple[int, list[int]]]] = [[] for _ in range(offers.num_ranks)]
    for leaves, mine in zip(offers.leaves, members, strict=True):
        common = sorted(mine.items())
        for rank in leaves.ranks:
            found[rank] = common
    return found


def check_leaves(hashes: Sequence[Mapping[str, int]]) -> None:
    """Raises ConflictError if a leaf has other bytes on another rank. ``hashes``: per rank, by name."""
    _compare(enumerate(hashes))


def _compare(hashes: Iterable[tuple[int, Mapping[str, int]]]) -> None:
    known: dict[str, tuple[int, int]] = {}
    for rank, mine in hashes:
        for name, value in mine.items():
            first, there = known.setdefault(name, (rank, value))
            if there != value:
                raise ConflictError(
                    f"{name} differs between rank {first} and rank {rank}. If it is meant to, put it into "
                    "PerRank(...), which keeps one for each rank; if not, the ranks have drifted apart"
                )


class GlobalPlan:
    """What the coordinator knows of a plan. Holds the offers until the first publication, then only that."""

    def __init__(self, offers: Offers, metadata: Metadata | None = None) -> None:
        """``metadata`` comes from a planner of the user's; without one it is made from the offers."""
        self._offers: Offers | None = offers
        self._metadata = metadata
        self._parts = {rank: part for part in offers.parts for rank in part.ranks}
        self._leaf_parts = {rank: leaves for leaves in offers.leaves for rank in leaves.ranks}
        self._places: dict[str, dict[Offsets | None, tuple[int, int, int]]] = {}
        self._publication: Publication | None = None

    def place(self, rank: int, placement: Placement) -> None:
        """Rank ``rank`` writes its items there."""
        assert self._offers is not None
        part, leaves = self._parts[rank], self._leaf_parts[rank]
        at = [offsets for offsets, _ in self._offers.boxes[rank]]
        keys: list[tuple[str, Offsets | None]] = [
            (part.names[index], at[part.form_of[index]]) for index in array("I", placement["tensors"])
        ]
        for index in array("I", placement["leaves"]):
            size = leaves.exotic[index][1] if index in leaves.exotic else None
            keys.append((leaves.names[index], None if size is None else (0,) * len(size)))
        offsets, lengths = array("Q", placement["offsets"]), array("Q", placement["lengths"])
        for (name, where), offset, length in zip(keys, offsets, lengths, strict=True):
            self._places.setdefault(name, {})[where] = (rank, offset, length)

    def publication(self) -> Publication:
        """Raises ConflictError if an item has no place."""
        if self._publication is None:
            assert self._offers is not None
            offers, tree = self._offers, self._offers.tree()
            entries = self._metadata.state_dict_metadata if self._metadata else _entries(offers)
            metadata = Metadata(state_dict_metadata=entries, planner_data=dcp_paths(tree))
            self._publication = Publication(
                metadata_template(metadata, self._items(offers, metadata)),
                structure_json(tree, _strides(offers), _exotic(offers)),
            )
            self._offers, self._metadata, self._places = None, None, {}
            self._parts, self._leaf_parts = {}, {}
        return self._publication

    def _items(self, offers: Offers, metadata: Metadata) -> Iterator[Item]:
        """Each item of ``metadata`` and where it lies; a tie lies where what it is tied to does."""
        for name, entry in metadata.state_dict_metadata.items():
            places = self._places.get(name, {})
            if isinstance(entry, TensorStorageMetadata):
                for number, chunk in enumerate(entry.chunks):
                    place = places.get(chunk.offsets) or self._tied(offers, name, chunk.offsets)
                    yield name, chunk.offsets, number, *place
            else:
                yield name, None, None, *(places.get(None) or self._tied(offers, name, None))

    def _tied(self, offers: Offers, name: str, offsets: Offsets | None) -> tuple[int, int, int]:
        for part, index in offers.ties.get(name, ()):
            place = self._places.get(offers.parts[part].names[index], {}).get(offsets)
            if place is not None:
                return place
        where = "" if offsets is None else f" at {tuple(offsets)}"
        raise ConflictError(f"{name}: the planner made no rank write it{where}")


def _strides(offers: Offers) -> dict[str, tuple[int, ...]]:
    return {
        part.names[index]: tuple(stride) for part in offers.parts for index, stride in part.strides.items()
    }


def _exotic(offers: Offers) -> tuple[str, ...]:
    return tuple(dict.fromkeys(leaves.names[index] for leaves in offers.leaves for index in leaves.exotic))


def _dtype(kind: Kind) -> torch.dtype:
    found = getattr(torch, kind[0])
    assert isinstance(found, torch.dtype)
    return found


def _entries(offers: Offers) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    """What `.metadata` says of each name. Objects that are equal are shared, so pickle stores each once."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    size_of = cache(torch.Size)

    @cache
    def properties(kind: Kind) -> TensorProperties:
        return TensorProperties(dtype=_dtype(kind), layout=getattr(torch, kind[1]), requires_grad=kind[2])

    @cache
    def chunk(offsets: Offsets, shape: Offsets) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=size_of(offsets), sizes=size_of(shape))

    for signature, names in offers.signed().items():
        kind, size = offers.kind(signature)
        chunks = [chunk(*box) for box in offers.pieces(signature)]
        for name in names:
            entries[name] = TensorStorageMetadata(properties(kind), size_of(size), list(chunks))
    for part in offers.parts:
        for name, kind, size in part.bare:
            if name not in entries:
                entries[name] = TensorStorageMetadata(properties(kind), size_of(size), [])
    opaque = BytesStorageMetadata()
    for leaves in offers.leaves:
        for index, name in enumerate(leaves.names):
            if index in leaves.exotic:
                kind, size = leaves.exotic[index]
                whole = [chunk((0,) * len(size), size)]
                entries.setdefault(name, TensorStorageMetadata(properties(kind), size_of(size), whole))
            else:
                entries.setdefault(name, opaque)
    return entries
