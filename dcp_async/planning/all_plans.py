"""Every rank's local plan, decoded and checked against each other: what all ranks hold.

Enters: every rank's LocalPlan. Leaves: AllPlans, which tells who holds which piece of what. Pure: no I/O.
Invariant: what ranks hold in common is the same on all of them. Ranks that sent equal bytes are looked at as
one cohort, and tensors that lie alike on all ranks likewise: thousands of ranks of one layout cost as much as
one.
Source: torch/distributed/checkpoint/default_planner.py (what stock plans).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count, repeat
from typing import NamedTuple, TypeVar

import torch

from .._geometry import Offsets
from ..formats import merged_trees
from ..info import JSON
from .conflicts import Box, ConflictError, check_covered, check_leaves, differing_leaves
from .local_plan import Kind, LocalPlan, Mesh, unpack_leaves, unpack_tensors, unpack_tree

T = TypeVar("T")


@dataclass(slots=True)
class TensorCohort:
    """Ranks that told the same of their tensors, and what they told (see ``local_plan.Tensors``)."""

    ranks: list[int]
    names: list[str]
    form_of: array[int]
    forms: list[tuple[Kind, Offsets]]
    strides: dict[int, tuple[int, ...]]
    ties: list[tuple[str, int]]
    bare: list[tuple[str, Kind, Offsets]]


@dataclass(slots=True)
class LeafCohort:
    """Ranks that told the same of their leaves, and what they told (see ``local_plan.Leaves``)."""

    ranks: list[int]
    names: list[str]
    exotic: dict[int, tuple[Kind, Offsets]]
    pieces: dict[int, tuple[str, Offsets, Offsets]]


class StoredPiece(NamedTuple):
    """A piece of a distributed tensor that is an item of its own."""

    leaf: str
    kind: Kind
    size: Offsets
    """The whole tensor's."""
    shape: Offsets
    """The piece's."""


PieceRefs = Sequence[tuple[int, int]]
"""(cohort, index in its lists) of pieces."""
Signature = tuple[tuple[int, int], ...]
"""Every (cohort, form) of a tensor: tensors of one signature lie alike on all ranks."""
Holder = tuple[int, int]
"""(rank, which entry of the signature)."""
Pieces = dict[Box, list[Holder]]
"""Box -> the ranks that hold this piece."""


def _grouped(raws: Iterable[bytes], unpack: Callable[[bytes], T]) -> list[tuple[list[int], T]]:
    """(ranks, what they sent) of ranks that sent equal bytes, the lowest rank's first."""
    ranks: dict[bytes, list[int]] = {}
    for rank, raw in enumerate(raws):
        ranks.setdefault(raw, []).append(rank)
    return [(mine, unpack(raw)) for raw, mine in ranks.items()]


class AllPlans:
    """What all ranks hold. Made of their local plans, which are not kept."""

    def __init__(self, local_plans: Sequence[LocalPlan], suspects: list[str] | None = None) -> None:
        """Names of leaves of which ranks have other bytes are added to ``suspects``.

        Raises ConflictError if ranks disagree on a tensor's size or dtype or, without ``suspects``, on the
        bytes of a leaf, or if a tensor's pieces do not make it up."""
        self.boxes = [plan["boxes"] for plan in local_plans]
        self.meshes = [plan["meshes"] for plan in local_plans]
        self.tensor_cohorts = [
            TensorCohort(
                ranks,
                tensors["names"],
                array("I", tensors["form_of"]),
                tensors["forms"],
                tensors["strides"],
                tensors["ties"],
                tensors["bare"],
            )
            for ranks, tensors in _grouped((plan["tensors"] for plan in local_plans), unpack_tensors)
        ]
        self.leaf_cohorts = [
            LeafCohort(ranks, leaves["names"], leaves["exotic"], leaves["pieces"])
            for ranks, leaves in _grouped((plan["leaves"] for plan in local_plans), unpack_leaves)
        ]
        self._pieces: dict[Signature, Pieces] = {}
        self._trees = _grouped((plan["tree"] for plan in local_plans), unpack_tree)
        # sizes first: coverage takes it that all pieces of a name agree on the size of the whole
        self._check_sizes()
        self._check_leaves([plan["hashes"] for plan in local_plans], suspects)
        self._check_coverage()

    @property
    def num_ranks(self) -> int:
        return len(self.boxes)

    def tree(self) -> JSON:
        """The tree of all ranks together."""
        return merged_trees([tree for _, tree in self._trees])

    def names(self) -> set[str]:
        """Names of all that some rank holds."""
        # a piece that is an item of its own counts under the name of its whole tensor, as planners and
        # `.metadata` name it
        of_leaves = {
            leaves.pieces[index][0] if index in leaves.pieces else name
            for leaves in self.leaf_cohorts
            for index, name in enumerate(leaves.names)
        }
        return of_leaves | self.held.keys()

    @cached_property
    def pieces_by_name(self) -> dict[str, dict[Offsets, StoredPiece]]:
        """Distributed tensors whose pieces are items of their own -> offsets -> its piece."""
        pieces: dict[str, dict[Offsets, StoredPiece]] = {}
        for leaves in self.leaf_cohorts:
            for index, (name, size, offsets) in leaves.pieces.items():
                kind, shape = leaves.exotic[index]
                pieces.setdefault(name, {}).setdefault(
                    offsets, StoredPiece(leaves.names[index], kind, size, shape)
                )
        return pieces

    @cached_property
    def own(self) -> dict[str, PieceRefs]:
        """Name -> its own pieces."""
        return by_name([cohort.names for cohort in self.tensor_cohorts])

    @cached_property
    def held(self) -> dict[str, PieceRefs]:
        """Name -> its pieces, with ties: what a tensor is tied to counts as one too, after its own."""
        own = self.own
        tied: dict[str, list[tuple[int, int]]] = {}
        for number, cohort in enumerate(self.tensor_cohorts):
            for name, index in cohort.ties:
                tied.setdefault(name, []).append((number, index))
        # own pieces first: they count more than those of what a name is tied to
        return own | {name: (*own.get(name, ()), *refs) for name, refs in tied.items()} if tied else own

    @cached_property
    def own_by_signature(self) -> dict[Signature, list[str]]:
        """Signature -> names of the tensors that have it, ties aside."""
        return self._by_signature(self.own)

    @cached_property
    def held_by_signature(self) -> dict[Signature, list[str]]:
        """Signature -> names of the tensors that have it, ties counted in."""
        return self.own_by_signature if self.held is self.own else self._by_signature(self.held)

    def _by_signature(self, refs_by_name: Mapping[str, PieceRefs]) -> dict[Signature, list[str]]:
        forms = [cohort.form_of for cohort in self.tensor_cohorts]
        alike: dict[Signature, list[str]] = {}
        for name, refs in refs_by_name.items():
            if len(refs) == 1:  # most of them, where there are many
                ((cohort, index),) = refs
                signature: Signature = ((cohort, forms[cohort][index]),)
            else:
                signature = tuple((cohort, forms[cohort][index]) for cohort, index in refs)
            alike.setdefault(signature, []).append(name)
        return alike

    def pieces(self, signature: Signature) -> Pieces:
        """Who holds which piece of the tensors of ``signature``."""
        # made once: coverage, assignment, replicas and publication ask for the same ones
        pieces = self._pieces.get(signature)
        if pieces is None:
            pieces = self._pieces[signature] = {}
            for entry, (cohort, form) in enumerate(signature):
                for rank in self.tensor_cohorts[cohort].ranks:
                    pieces.setdefault(self.boxes[rank][form], []).append((rank, entry))
        return pieces

    def kind(self, signature: Signature) -> tuple[Kind, Offsets]:
        """(kind, global size) of its tensors."""
        cohort, form = signature[0]
        return self.tensor_cohorts[cohort].forms[form]

    def _check_sizes(self) -> None:
        """Whether each name has one size, dtype and nature (tensor or not) on all ranks."""
        known: dict[str, tuple[str, Offsets, int]] = {}

        def check(name: str, mine: tuple[str, Offsets, int]) -> None:
            first = known.get(name) or known.setdefault(name, held(name) or mine)
            if first[:2] != mine[:2]:
                raise ConflictError(
                    f"{name} is {first[1]} {first[0]} on rank {first[2]}, but {mine[1]} {mine[0]} on rank "
                    f"{mine[2]}; distributed tensors need the same global size everywhere, others other names"
                )

        def described(cohort: int, form: int) -> tuple[str, Offsets, int]:
            kind, size = self.tensor_cohorts[cohort].forms[form]
            return kind[0], size, self.tensor_cohorts[cohort].ranks[0]

        def held(name: str) -> tuple[str, Offsets, int] | None:
            if name not in self.held:
                return None
            cohort, index = self.held[name][0]
            return described(cohort, self.tensor_cohorts[cohort].form_of[index])

        for signature, names in self.held_by_signature.items():
            for entry in signature[1:]:
                # the first name speaks for all: tensors of one signature lie alike on all ranks
                check(names[0], described(*entry))
        for cohort in self.tensor_cohorts:
            for name, kind, size in cohort.bare:
                check(name, (kind[0], size, cohort.ranks[0]))
        bare = set(known)
        for leaves in self.leaf_cohorts:
            rank = leaves.ranks[0]
            for index, name in enumerate(leaves.names):
                if index in leaves.pieces and leaves.pieces[index][0] not in self.held:
                    whole, size, _ = leaves.pieces[index]
                    check(whole, (leaves.exotic[index][0][0], size, rank))
                    continue
                name = leaves.pieces[index][0] if index in leaves.pieces else name
                if name in self.held or name in bare:
                    holder = (held(name) or known[name])[2]
                    raise ConflictError(
                        f"{name} is a tensor on rank {holder} and something else on rank {rank}; give it "
                        "another name, or put it into PerRank(...)"
                    )
                if index in leaves.exotic:
                    kind, size = leaves.exotic[index]
                    check(name, (kind[0], size, rank))

    def _check_leaves(self, hashes: Sequence[bytes], suspects: list[str] | None) -> None:
        def distinct() -> Iterator[tuple[int, Mapping[str, int]]]:
            for leaves in self.leaf_cohorts:
                # reversed, so that of ranks with equal hashes the lowest is the one that is named
                first = {hashes[rank]: rank for rank in reversed(leaves.ranks)}
                for raw, rank in first.items():  # ranks of equal hashes need one look
                    yield rank, dict(zip(leaves.names, array("Q", raw), strict=True))

        if suspects is None:
            # by rank, not by cohort: the error names the lowest two that differ
            check_leaves(sorted(distinct(), key=lambda mine: mine[0]))
        else:
            suspects += differing_leaves(mine for _, mine in distinct())

    def _check_coverage(self) -> None:
        known = self.held.keys() | self.pieces_by_name.keys()
        missing = {
            name: size for cohort in self.tensor_cohorts for name, _, size in cohort.bare if name not in known
        }
        for name, stored in self.pieces_by_name.items():
            boxes: Pieces = {(offsets, piece.shape): [] for offsets, piece in stored.items()}
            check_covered(name, next(iter(stored.values())).size, boxes, list)
        for signature, names in self.held_by_signature.items():
            check_covered(
                names[0], self.kind(signature)[1], self.pieces(signature), self._meshes_of(signature)
            )
        for name, size in missing.items():
            # no rank holds any of it, so it passes only if it has no elements
            check_covered(name, size, {}, list)

    def _meshes_of(self, signature: Signature) -> Callable[[], list[Mesh]]:
        """A function that finds the meshes that its pieces lie on: only a message asks, so none is looked for
        before."""

        def find() -> list[Mesh]:
            meshes = {
                self.meshes[rank][signature[entry][1]]
                for holders in self.pieces(signature).values()
                for rank, entry in holders
            }
            return sorted(mesh for mesh in meshes if mesh is not None)

        return find


def by_name(names: Sequence[Sequence[str]]) -> dict[str, PieceRefs]:
    """Name -> (which of the sequences, index in it) of each of its occurrences."""
    refs: dict[str, PieceRefs] = {}
    # in C as if no name occurred twice, then again for those that do
    for number, sequence in enumerate(names):
        # zip in zip: what is stored is a sequence of one pair, and none of it is made in Python
        refs.update(zip(sequence, zip(zip(repeat(number), count())), strict=False))
    if len(refs) < sum(map(len, names)):
        several = {name for name, times in Counter(chain.from_iterable(names)).items() if times > 1}
        repeated: dict[str, list[tuple[int, int]]] = {name: [] for name in several}
        for number, sequence in enumerate(names):
            for index, name in enumerate(sequence):
                if name in several:
                    repeated[name].append((number, index))
        refs.update((name, tuple(occurrences)) for name, occurrences in repeated.items())
    return refs


def dtype_of(kind: Kind) -> torch.dtype:
    """The dtype that ``kind`` names."""
    dtype = getattr(torch, kind[0])
    assert isinstance(dtype, torch.dtype)
    return dtype
