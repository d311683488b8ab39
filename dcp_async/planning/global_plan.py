"""What the coordinator publishes of a plan: the bytes of `.metadata`, and what all its manifests share.

Enters: AllPlans, and from each rank where its items lie. Leaves: a Publication. Pure: no I/O.
Invariant: nothing is published that some rank does not write. Tensors that lie alike on all ranks are
described once; what is left to do per rank and tensor is to note a location and to print it (docs/scale.md).
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import repeat
from typing import TypedDict, cast

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from .._geometry import Offsets
from .._names import FileKey
from ..formats import DISTCP, Format, Group, MetadataTemplate, Place, dcp_paths, structure_json
from ..info import JSON
from .all_plans import AllPlans, Signature, dtype_of
from .conflicts import ConflictError
from .local_plan import Kind
from .merging import Merge
from .public_plan import PublicPlan, PublicShare, WrittenRuns
from .self_proof import Promise, Promised, prove


# bytes of arrays, not lists: even so they are two thirds of what a rank under FSDP sends (docs/scale.md)
class ItemLocations(TypedDict):
    """Where one rank's items lie in its file. Plain data: it travels."""

    tensors: bytes
    """array("I"), by their index in the rank's LocalPlan."""
    leaves: bytes
    """array("I"), likewise; they follow the tensors."""
    offsets: bytes
    """array("Q"), of the items one by one."""
    lengths: bytes
    """array("Q")."""
    own_start: int
    """Where in the rank's image, which offsets are of, its own file begins."""
    runs: WrittenRuns
    """Which of the image lies in files that all ranks write."""


@dataclass(frozen=True, slots=True)
class Publication:
    """What the coordinator publishes with every save of one plan, but for the uid."""

    metadata: MetadataTemplate
    manifest_json: str
    ends: Mapping[FileKey, int]
    """How long each file must be at least."""


def _refuse_unsaved(names: Collection[str], groups: Sequence[Group]) -> None:
    """Raises ConflictError for a name in the tree that no rank has an item of."""
    unsaved = set(names).difference(*(group.names for group in groups))
    if unsaved:
        raise ConflictError(
            f"{min(unsaved)}: each rank's FromRank says that another one has it, so none saves it; give "
            "the same rank on all of them, and have it in the state of that one"
        )


class GlobalPlan:
    """What the coordinator knows of a plan. Holds what all ranks hold until the first publication,
    then only that."""

    def __init__(
        self,
        all_plans: AllPlans,
        metadata: Metadata | None = None,
        *,
        tree: JSON = None,
        planner_data: object = None,
    ) -> None:
        """
        Args:
            metadata: comes from a planner; without one it is made from ``all_plans``.
            tree: the containers that the names lie in; None for those that the ranks told of.
            planner_data: what a planner keeps in `.metadata`; None for the names' paths.
        """
        self._all_plans: AllPlans | None = all_plans
        self._metadata = metadata
        self._tree = tree
        self._planner_data = planner_data
        # ranks of one cohort number their pieces alike, so what is written is noted per cohort
        self._tensor_cohort_of = {
            rank: number for number, cohort in enumerate(all_plans.tensor_cohorts) for rank in cohort.ranks
        }
        self._leaf_cohort_of = {rank: leaves for leaves in all_plans.leaf_cohorts for rank in leaves.ranks}
        self._written: list[dict[int, list[Place]]] = [{} for _ in all_plans.tensor_cohorts]
        """Per cohort: index of a piece -> where it lies, one of each rank that writes it."""
        self._leaves: dict[str, Place] = {}
        self._public: PublicPlan | None = None
        """The files that all ranks write; None if there are none."""
        self._own_starts: dict[int, int] = {}
        self._runs: dict[int, WrittenRuns] = {}
        self._publication: Publication | None = None

    def public_shares(self, format: Format) -> Sequence[PublicShare | None]:
        """What each rank is told of the files that all write. Before any of them tells where its items lie.

        Raises: ValueError if the format can't write what the ranks hold.
        """
        assert self._all_plans is not None
        if not format.shares_files:  # of most engines: no object is made per tensor
            return [None] * self._all_plans.num_ranks
        public = PublicPlan(self._all_plans, format)
        if public.files is not None:
            self._public = public
        return public.shares()

    def merges(self) -> Sequence[Merge | None]:
        """What each rank puts together of the files that all write, once all were located."""
        assert self._all_plans is not None
        ranks = range(self._all_plans.num_ranks)
        if self._public is None:
            return [None] * len(ranks)
        merges = self._public.merges([self._runs[rank] for rank in ranks], self._written)
        return merges if merges is not None else [None] * len(ranks)

    def locate(self, rank: int, locations: ItemLocations) -> None:
        """Rank ``rank`` writes its items at ``locations``."""
        tensors, leaves = array("I", locations["tensors"]), array("I", locations["leaves"])
        offsets, lengths = array("Q", locations["offsets"]), array("Q", locations["lengths"])
        places = list(zip(repeat(rank), offsets, lengths))
        written = self._written[self._tensor_cohort_of[rank]]
        if self._public is not None:
            self._own_starts[rank], self._runs[rank] = locations["own_start"], locations["runs"]
        # not strict: the places of the leaves come behind
        for index, place in zip(tensors, places, strict=False):
            written.setdefault(index, []).append(place)
        names = self._leaf_cohort_of[rank].names
        self._leaves.update(zip((names[index] for index in leaves), places[len(tensors) :], strict=True))

    def publication(self, format: Format = DISTCP) -> Publication:
        """What is published, made once. For one thread at a time: it takes a while, and lets go of the rest.

        ``format`` is that of the plan, which laid the files out.

        Raises: ConflictError if an item has no place; ProofError if what would be published does not read
        back as it was planned.
        """
        if self._publication is None:
            self._publication = self._publish(format)
            # what all ranks hold may be larger than what is published of it
            self._all_plans, self._metadata, self._written, self._leaves = None, None, [], {}
            self._tensor_cohort_of, self._leaf_cohort_of, self._public = {}, {}, None
            self._own_starts, self._runs = {}, {}
        return self._publication

    def _publish(self, format: Format) -> Publication:
        assert self._all_plans is not None
        all_plans = self._all_plans
        tree = self._tree if self._tree is not None else all_plans.tree()
        # without a planner of the user's no object per item is needed: ten times faster (docs/adr/0007)
        groups = (
            self._alike(all_plans) if self._metadata is None else self._planned(all_plans, self._metadata)
        )
        paths, public = dcp_paths(tree), self._public
        if self._metadata is None:
            _refuse_unsaved(paths, groups)
        if public is not None:
            groups = [replace(group, places=self._in_files(group.places)) for group in groups]
            groups = list(public.groups(groups))
        strides, exotic = _strides(all_plans), _exotic(all_plans)
        template = format.index(groups, paths, planner_data=self._planner_data)
        constant = structure_json(tree, strides, exotic)
        # from what ranks told, not from ``groups``: a proof of these would not see what went wrong in making
        # them
        promises = self._promised(all_plans)
        if public is not None:
            in_files = (replace(promise, rows=self._in_files(promise.rows)) for promise in promises)
            promises = public.promises(in_files)
        promised = Promised(promises, tree, strides, exotic)
        return Publication(template, constant, prove(template, constant, promised))

    def _in_files(self, rows: Iterable[Sequence[Place | None]]) -> list[list[Place]]:
        """What lies at places of images, at places of ranks' own files."""
        return [[_in_own_file(place, self._own_starts) for place in row] for row in rows]

    def _alike(self, all_plans: AllPlans) -> list[Group]:
        """What the default planner would say. Objects that are equal are shared, so each is stored once."""
        made = _Entries()
        groups = []
        for signature, names in all_plans.held_by_signature.items():
            kind, size = all_plans.kind(signature)
            boxes = list(all_plans.pieces(signature))
            rows = self._rows(all_plans, signature, names)
            whole = map(_whole, names, repeat([offsets for offsets, _ in boxes]), rows)
            # one entry for all names of a signature: equal objects are pickled once (docs/adr/0007)
            groups.append(Group(made.tensor(kind, size, boxes), names, whole))
        for name, stored in all_plans.pieces_by_name.items():
            kind, size = next(iter(stored.values()))[1:3]
            boxes = [(offsets, piece.shape) for offsets, piece in stored.items()]
            places = [self._leaf(piece.leaf) for piece in stored.values()]
            groups.append(Group(made.tensor(kind, size, boxes), [name], [places]))
        # what is bare on one rank may be held on another, and a leaf on several: each is described once
        known = set(all_plans.held) | all_plans.pieces_by_name.keys()
        for cohort in all_plans.tensor_cohorts:
            for name, kind, size in cohort.bare:
                if name not in known:
                    known.add(name)
                    groups.append(Group(made.tensor(kind, size, []), [name], [()]))
        # one for all leaves, since an object that recurs is pickled once
        opaque = BytesStorageMetadata()
        for leaves in all_plans.leaf_cohorts:
            for index, name in enumerate(leaves.names):
                if name not in known and index not in leaves.pieces:
                    known.add(name)
                    entry: STORAGE_TYPES = opaque
                    if index in leaves.exotic:
                        kind, size = leaves.exotic[index]
                        entry = made.tensor(kind, size, [((0,) * len(size), size)])
                    groups.append(Group(entry, [name], [[self._leaf(name)]]))
        return groups

    def _planned(self, all_plans: AllPlans, metadata: Metadata) -> list[Group]:
        """What a planner of the user's said."""
        groups = []
        signature_of = {
            name: signature for signature, names in all_plans.held_by_signature.items() for name in names
        }
        for name, entry in metadata.state_dict_metadata.items():
            places: Sequence[Place]
            if name in signature_of and isinstance(entry, TensorStorageMetadata):
                signature = signature_of[name]
                row = next(self._rows(all_plans, signature, [name]))
                boxes = all_plans.pieces(signature)
                # by offsets: a planner lists chunks in an order of its own
                place_at = {offsets: place for (offsets, _), place in zip(boxes, row, strict=True)}
                chunks = [tuple(chunk.offsets) for chunk in entry.chunks]
                places = _whole(name, chunks, [place_at.get(offsets) for offsets in chunks])
            elif isinstance(entry, TensorStorageMetadata) and name in all_plans.pieces_by_name:
                stored = all_plans.pieces_by_name[name]
                places = [self._leaf(stored[tuple(chunk.offsets)].leaf) for chunk in entry.chunks]
            elif isinstance(entry, TensorStorageMetadata) and not entry.chunks:
                places = ()
            else:
                places = [self._leaf(name)]
            groups.append(Group(entry, [name], [places]))
        return groups

    def _rows(
        self, all_plans: AllPlans, signature: Signature, names: Sequence[str]
    ) -> Iterator[list[Place | None]]:
        """Where each piece of each of ``names``, all of ``signature``, lies."""
        pieces = all_plans.pieces(signature)
        numbers: list[dict[FileKey, int]] = [{} for _ in signature]
        for number, holders in enumerate(pieces.values()):
            for rank, entry in holders:
                numbers[entry][rank] = number
        # its own pieces last, since they count more than those of what it is tied to
        entries = list(enumerate(numbers))[::-1]
        for name in names:
            row: list[Place | None] = [None] * len(pieces)
            refs = all_plans.held[name]
            for entry, number_of in entries:
                cohort, index = refs[entry]
                for place in self._written[cohort].get(index, ()):
                    row[number_of[place[0]]] = place
            yield row

    def _promised(self, all_plans: AllPlans) -> Iterator[Promise]:
        """What the ranks offered and where they write it, past what is encoded and past any planner."""
        for signature, names in all_plans.held_by_signature.items():
            kind, size = all_plans.kind(signature)
            rows = self._rows(all_plans, signature, names)
            yield Promise(names, size, dtype_of(kind), list(all_plans.pieces(signature)), rows)
        for cohort in all_plans.tensor_cohorts:
            for name, kind, size in cohort.bare:
                if name not in all_plans.held and name not in all_plans.pieces_by_name:
                    yield Promise([name], size, dtype_of(kind), [], [()])
        for name, stored in all_plans.pieces_by_name.items():
            first = next(iter(stored.values()))
            boxes = [(offsets, piece.shape) for offsets, piece in stored.items()]
            row = [self._leaf(piece.leaf) for piece in stored.values()]
            yield Promise([name], first.size, dtype_of(first.kind), boxes, [row])
        known: set[str] = set()
        for leaves in all_plans.leaf_cohorts:
            for index, name in enumerate(leaves.names):
                if name not in known and index not in leaves.pieces:
                    known.add(name)
                    places = [[self._leaf(name)]]
                    if index in leaves.exotic:
                        kind, size = leaves.exotic[index]
                        yield Promise([name], size, dtype_of(kind), [((0,) * len(size), size)], places)
                    else:
                        yield Promise([name], None, None, [(None, ())], places)

    def _leaf(self, name: str) -> Place:
        if name not in self._leaves:
            raise ConflictError(f"{name}: the planner made no rank write it")
        return self._leaves[name]


def _in_own_file(place: Place | None, starts: Mapping[int, int]) -> Place:
    assert place is not None  # or it would have been missed before
    rank, offset, length = place
    assert isinstance(rank, int)
    return rank, offset - starts[rank], length


def _whole(name: str, offsets: Sequence[Offsets], places: list[Place | None]) -> list[Place]:
    """``places``, of chunks at ``offsets``. Raises ConflictError if one is missing."""
    if None in places:
        missing = offsets[places.index(None)]
        raise ConflictError(f"{name}: the planner made no rank write it at {tuple(missing)}")
    return cast(list[Place], places)


def _strides(all_plans: AllPlans) -> dict[str, tuple[int, ...]]:
    return {
        cohort.names[index]: tuple(stride)
        for cohort in all_plans.tensor_cohorts
        for index, stride in cohort.strides.items()
    }


def _exotic(all_plans: AllPlans) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(
            leaves.pieces[index][0] if index in leaves.pieces else leaves.names[index]
            for leaves in all_plans.leaf_cohorts
            for index in leaves.exotic
        )
    )


class _Entries:
    """Makes what `.metadata` says of a tensor."""

    def __init__(self) -> None:
        # of this publication alone: caches of the functions would outlive it, and grow with each
        self._properties = cache(_properties)
        self._size = cache(torch.Size)
        self._chunk = cache(self._make_chunk)

    def tensor(self, kind: Kind, size: Offsets, boxes: Sequence[tuple[Offsets, Offsets]]) -> STORAGE_TYPES:
        """``boxes``: (offsets, shape) of its chunks."""
        return TensorStorageMetadata(
            self._properties(kind), self._size(size), [self._chunk(*box) for box in boxes]
        )

    def _make_chunk(self, offsets: Offsets, shape: Offsets) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=self._size(offsets), sizes=self._size(shape))


def _properties(kind: Kind) -> TensorProperties:
    return TensorProperties(dtype=dtype_of(kind), layout=getattr(torch, kind[1]), requires_grad=kind[2])
