"""The coordinator's part of planning: what all ranks hold, and who writes what.

Enters: every rank's Offer. Leaves: Offers, and an Assignment per rank. Pure: no I/O. Invariant: every
element of every tensor is written exactly once, and what ranks hold in common is the same on all of them.
Ranks that offered equal bytes are looked at as one, and tensors that lie alike on all ranks likewise.
Source: torch/distributed/checkpoint/default_planner.py (what stock plans).
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count, repeat
from typing import NamedTuple, TypedDict, TypeVar

import torch

from .._geometry import Offsets
from ..formats import merged_trees
from ..info import JSON
from .local_plan import Kind, Mesh, Offer, unpack_leaves, unpack_tensors, unpack_tree

T = TypeVar("T")


class ConflictError(ValueError):
    """Ranks do not hold the same; the message names what and which ranks."""


class ReplicaGroup(TypedDict):
    """One rank's part of a group of ranks that hold the same pieces of tensors. Plain data: it travels."""

    number: int
    blocks: int
    """How many blocks of large tensors one save compares; the same on all ranks of the group."""
    meshes: list[Mesh]
    """Of the DTensors of one name that the pieces belong to, where they lie on several."""
    runs: list[tuple[int, int]]
    """(first, count) of consecutive places in the rank's Offer: the pieces in the group's order."""


class Assignment(TypedDict):
    """What one rank writes. Plain data: it travels."""

    tensors: list[int]
    """Pieces, by their place in the rank's Offer, ascending."""
    leaves: list[int]
    groups: list[tuple[int, list[int]]]
    """(group, leaves): what this rank has in common with the other ranks of the group."""
    replicas: list[ReplicaGroup]
    """The pieces of tensors that it has in common with others."""


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
    pieces: dict[int, tuple[str, Offsets, Offsets]]


class StoredPiece(NamedTuple):
    """A piece of a distributed tensor that is an item of its own."""

    leaf: str
    kind: Kind
    size: Offsets
    """Of the whole tensor."""
    shape: Offsets
    """Of the piece."""


Places = Sequence[tuple[int, int]]
"""(part, index there) of pieces."""
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

    def __init__(self, offers: Sequence[Offer], suspects: list[str] | None = None) -> None:
        """Names of leaves of which ranks offered other bytes are added to ``suspects``.

        Raises ConflictError if ranks disagree on a tensor's size or dtype or, without ``suspects``, on the
        bytes of a leaf, or if a tensor's pieces do not make it up."""
        self.boxes = [offer["boxes"] for offer in offers]
        self.meshes = [offer["meshes"] for offer in offers]
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
            _LeafPart(ranks, each["names"], each["exotic"], each["pieces"])
            for ranks, each in _grouped((offer["leaves"] for offer in offers), unpack_leaves)
        ]
        self._pieces: dict[Signature, Pieces] = {}
        self._trees = _grouped((offer["tree"] for offer in offers), unpack_tree)
        self._check_sizes()
        self._check_leaves([offer["hashes"] for offer in offers], suspects)
        self._check_coverage()

    @property
    def num_ranks(self) -> int:
        return len(self.boxes)

    def tree(self) -> JSON:
        """Of all ranks."""
        return merged_trees([tree for _, tree in self._trees])

    def names(self) -> set[str]:
        """Of all that some rank holds."""
        found = {
            leaves.pieces[index][0] if index in leaves.pieces else name
            for leaves in self.leaves
            for index, name in enumerate(leaves.names)
        }
        return found | self.held.keys()

    @cached_property
    def pieces_by_name(self) -> dict[str, dict[Offsets, StoredPiece]]:
        """Distributed tensors whose pieces are items of their own -> offsets -> the piece there."""
        found: dict[str, dict[Offsets, StoredPiece]] = {}
        for leaves in self.leaves:
            for index, (name, size, offsets) in leaves.pieces.items():
                kind, shape = leaves.exotic[index]
                found.setdefault(name, {}).setdefault(
                    offsets, StoredPiece(leaves.names[index], kind, size, shape)
                )
        return found

    @cached_property
    def places(self) -> dict[str, Places]:
        """Name -> its own pieces."""
        return _by_name([part.names for part in self.parts])

    @cached_property
    def held(self) -> dict[str, Places]:
        """The same with ties: what a tensor is tied to counts as a piece of it too, after its own."""
        found = self.places
        tied: dict[str, list[tuple[int, int]]] = {}
        for number, part in enumerate(self.parts):
            for name, index in part.ties:
                tied.setdefault(name, []).append((number, index))
        return found | {name: (*found.get(name, ()), *mine) for name, mine in tied.items()} if tied else found

    @cached_property
    def alike(self) -> dict[Signature, list[str]]:
        """Signature -> names of the tensors that have it, ties aside."""
        return self._signed(self.places)

    @cached_property
    def signed(self) -> dict[Signature, list[str]]:
        """The same with ties."""
        return self.alike if self.held is self.places else self._signed(self.held)

    def _signed(self, places: Mapping[str, Places]) -> dict[Signature, list[str]]:
        forms = [part.form_of for part in self.parts]
        found: dict[Signature, list[str]] = {}
        for name, mine in places.items():
            if len(mine) == 1:  # most of them, where there are many
                ((part, index),) = mine
                signature: Signature = ((part, forms[part][index]),)
            else:
                signature = tuple((part, forms[part][index]) for part, index in mine)
            found.setdefault(signature, []).append(name)
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
            first = known.get(name) or known.setdefault(name, held(name) or mine)
            if first[:2] != mine[:2]:
                raise ConflictError(
                    f"{name} is {first[1]} {first[0]} on rank {first[2]}, but {mine[1]} {mine[0]} on rank "
                    f"{mine[2]}; distributed tensors need the same global size everywhere, others other names"
                )

        def described(part: int, form: int) -> tuple[str, Offsets, int]:
            kind, size = self.parts[part].forms[form]
            return kind[0], size, self.parts[part].ranks[0]

        def held(name: str) -> tuple[str, Offsets, int] | None:
            if name not in self.held:
                return None
            part, index = self.held[name][0]
            return described(part, self.parts[part].form_of[index])

        for signature, names in self.signed.items():
            for entry in signature[1:]:
                check(names[0], described(*entry))
        for part in self.parts:
            for name, kind, size in part.bare:
                check(name, (kind[0], size, part.ranks[0]))
        bare = set(known)
        for leaves in self.leaves:
            rank = leaves.ranks[0]
            for index, name in enumerate(leaves.names):
                if index in leaves.pieces and leaves.pieces[index][0] not in self.held:
                    whole, size, _ = leaves.pieces[index]
                    check(whole, (leaves.exotic[index][0][0], size, rank))
                    continue
                name = leaves.pieces[index][0] if index in leaves.pieces else name
                if name in self.held or name in bare:
                    there = (held(name) or known[name])[2]
                    raise ConflictError(
                        f"{name} is a tensor on rank {there} and something else on rank {rank}; give it "
                        "another name, or put it into PerRank(...)"
                    )
                if index in leaves.exotic:
                    kind, size = leaves.exotic[index]
                    check(name, (kind[0], size, rank))

    def _check_leaves(self, hashes: Sequence[bytes], suspects: list[str] | None) -> None:
        def distinct() -> Iterator[tuple[int, Mapping[str, int]]]:
            for leaves in self.leaves:
                first = {hashes[rank]: rank for rank in reversed(leaves.ranks)}
                for raw, rank in first.items():
                    yield rank, dict(zip(leaves.names, array("Q", raw), strict=True))

        if suspects is None:
            _compare(sorted(distinct(), key=lambda mine: mine[0]))
        else:
            suspects += differing_leaves(mine for _, mine in distinct())

    def _check_coverage(self) -> None:
        known = self.held.keys() | self.pieces_by_name.keys()
        missing = {name: size for part in self.parts for name, _, size in part.bare if name not in known}
        for name, stored in self.pieces_by_name.items():
            boxes: Pieces = {(offsets, piece.shape): [] for offsets, piece in stored.items()}
            _check_covered(name, next(iter(stored.values())).size, boxes, list)
        for signature, names in self.signed.items():
            _check_covered(names[0], self.kind(signature)[1], self.pieces(signature), self._on(signature))
        for name, size in missing.items():
            _check_covered(name, size, {}, list)

    def _on(self, signature: Signature) -> Callable[[], list[Mesh]]:
        """Finds the meshes that its pieces lie on."""

        def find() -> list[Mesh]:
            found = {
                self.meshes[rank][signature[entry][1]]
                for holders in self.pieces(signature).values()
                for rank, entry in holders
            }
            return sorted(mesh for mesh in found if mesh is not None)

        return find


def _check_covered(name: str, size: Offsets, pieces: Pieces, meshes: Callable[[], list[Mesh]]) -> None:
    for offsets, shape in pieces:
        if not len(offsets) == len(shape) == len(size):
            raise ConflictError(f"{name}: the piece of {shape} at {offsets} has other dimensions than {size}")
        if any(low < 0 or low + n > extent for low, n, extent in zip(offsets, shape, size, strict=True)):
            raise ConflictError(f"{name}: the piece of {shape} at {offsets} lies outside of its {size}")
    covered, whole = sum(math.prod(shape) for _, shape in pieces), math.prod(size)
    if covered > whole and len(on := meshes()) > 1:
        raise ConflictError(two_meshes(name, on))
    if covered != whole:
        raise ConflictError(
            f"{name}: the ranks hold {covered} of its {whole} elements; "
            "pieces must cover a tensor exactly once"
        )
    if len(pieces) > 1 and (twice := _overlapping(list(pieces))) is not None:
        raise ConflictError(
            f"{name}: the pieces at {twice[0]} and {twice[1]} overlap; "
            "pieces must cover a tensor exactly once"
        )


def _overlapping(pieces: list[tuple[Offsets, Offsets]]) -> tuple[Offsets, Offsets] | None:
    """The places of two (offsets, shape) that have an element in common, if there are any.

    A sweep along the dimension in which they differ most: shards of rows, columns or a mesh meet few others.
    """
    pieces = [(offsets, shape) for offsets, shape in pieces if 0 not in shape]
    if len(pieces) < 2 or not pieces[0][0]:
        return None
    along = max(range(len(pieces[0][0])), key=lambda dim: len({offsets[dim] for offsets, _ in pieces}))
    open_: list[tuple[Offsets, Offsets]] = []
    for offsets, shape in sorted(pieces, key=lambda piece: piece[0][along]):
        open_ = [each for each in open_ if each[0][along] + each[1][along] > offsets[along]]
        for other, extents in open_:
            if all(
                a < b + m and b < a + n for a, n, b, m in zip(offsets, shape, other, extents, strict=True)
            ):
                return other, offsets
        open_.append((offsets, shape))
    return None


def two_meshes(name: str, meshes: Sequence[Mesh]) -> str:
    """That tensors of one name, one on each of ``meshes``, are not the same."""
    each = " and on that of ".join(f"ranks {', '.join(map(str, mesh))}" for mesh in meshes)
    return (
        f"{name} lies on the device mesh of {each}, and each holds all of it: these are different tensors of "
        "one name. Give them different names, those of the layers of the whole model for one, or put them "
        "into PerRank(...)"
    )


def _by_name(names: Sequence[Sequence[str]]) -> dict[str, Places]:
    """Name -> (which of the sequences, index there) of each place where it stands."""
    found: dict[str, Places] = {}
    for number, mine in enumerate(names):
        found.update(zip(mine, zip(zip(repeat(number), count())), strict=False))
    if len(found) < sum(map(len, names)):
        several = {name for name, times in Counter(chain.from_iterable(names)).items() if times > 1}
        places: dict[str, list[tuple[int, int]]] = {name: [] for name in several}
        for number, mine in enumerate(names):
            for index, name in enumerate(mine):
                if name in several:
                    places[name].append((number, index))
        found.update((name, tuple(each)) for name, each in places.items())
    return found


def assign(offers: Offers) -> list[Assignment]:
    """Give each piece to one of the ranks that hold it, so that all write about as many bytes."""
    assignments = [
        Assignment(tensors=[], leaves=[], groups=groups, replicas=[]) for groups in shared_leaves(offers)
    ]
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
    shared: dict[tuple[int, ...], list[tuple[int, list[Holder], list[list[int]]]]] = {}
    for signature, names in offers.alike.items():
        # entry of the signature -> the index of each of the tensors there
        places = [offers.places[name] for name in names]
        indices = [[each[entry][1] for each in places] for entry in range(len(signature))]
        itemsize = dtype_of(offers.kind(signature)[0]).itemsize
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
    holders = _by_name([leaves.names for leaves in offers.leaves])
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


def dtype_of(kind: Kind) -> torch.dtype:
    found = getattr(torch, kind[0])
    assert isinstance(found, torch.dtype)
    return found


def differing_leaves(hashes: Iterable[Mapping[str, int]]) -> list[str]:
    """Names whose hashes differ; each of ``hashes`` is by name."""
    known: dict[str, int] = {}
    found: dict[str, None] = {}
    for mine in hashes:
        for name, value in mine.items():
            if known.setdefault(name, value) != value:
                found[name] = None
    return list(found)


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
