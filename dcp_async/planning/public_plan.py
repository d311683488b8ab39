"""Files that all ranks write together: which tensors lie in them and where, and who writes which bytes.

Enters: AllPlans, and a format that has such files; then what each rank says of its image. Leaves: a
PublicShare and a Merge per rank, and the places that are published. Pure: no I/O. Invariant: each byte of
such a file is written by one rank, and so is each block that has a checksum. A rank writes the blocks that it
holds all bytes of; those of which several ranks hold some are given out, and put together from pieces files.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from .._geometry import Offsets
from ..formats import Format, Group, Place, PublicFiles, PublicTensor
from .all_plans import AllPlans, dtype_of
from .merging import Merge, Part, dealt, make_merge, overlapping, spans_between
from .self_proof import Promise

_NOWHERE = -1
"""The file of a tensor that lies in none of them."""


class PublicShare(TypedDict):
    """What one rank is told of the public files. Plain data: it travels."""

    names: list[str]
    lengths: list[int]
    heads: list[bytes]
    """What each file begins with, for rank 0, which writes it."""
    files: bytes
    """array("i"), per piece of the rank's LocalPlan the file that the tensor lies in; -1 if in none."""
    offsets: bytes
    """array("Q"), likewise where the whole tensor begins."""


class WrittenRuns(TypedDict):
    """What one rank says of its image. Plain data: it travels."""

    whole: bytes
    """array("Q") of (file, start, stop): blocks that it writes."""
    heads: list[int]
    """Where the heads of files lie in its image."""


class PublicPlan:
    """What the coordinator knows of the public files of a plan."""

    def __init__(self, all_plans: AllPlans, format: Format) -> None:
        """Raises: ValueError if the format can't write what all ranks hold."""
        self._all_plans = all_plans
        names = _names(all_plans)
        self._names = list(names)
        self._parts: list[tuple[Offsets, int]] = []
        """(shape, length of an element), per name."""
        tensors: list[PublicTensor] = []
        for name, ties in names.items():
            # the first rank speaks for all: that they agree on dtype and size was checked
            cohort, index = all_plans.own[name][0]
            kind, size = all_plans.tensor_cohorts[cohort].forms[
                all_plans.tensor_cohorts[cohort].form_of[index]
            ]
            tensors.append(PublicTensor(names=(name, *ties), dtype=dtype_of(kind), shape=size))
        self.files: PublicFiles | None = format.public_files(tensors)
        self._tensors = tensors
        self._place: dict[str, Place] = {}
        for number, (file, offset) in self.files.places.items() if self.files else ():
            tensor = tensors[number]
            nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
            self._place.update((name, (("blob", file), offset, nbytes)) for name in tensor.names)

    def shares(self) -> list[PublicShare | None]:
        """What each rank is told; None if there are no such files."""
        files = self.files
        if files is None:
            return [None] * self._all_plans.num_ranks
        by_rank: dict[int, PublicShare] = {}
        number_of = {name: number for number, name in enumerate(self._names)}
        # per cohort: thousands of ranks of one layout cost as much as one
        for cohort in self._all_plans.tensor_cohorts:
            places = [files.places.get(number_of.get(name, _NOWHERE), (_NOWHERE, 0)) for name in cohort.names]
            file_of, offsets = (
                array("i", [place[0] for place in places]),
                array("Q", [place[1] for place in places]),
            )
            for rank in cohort.ranks:
                by_rank[rank] = PublicShare(
                    names=files.names,
                    lengths=files.lengths,
                    heads=files.heads if rank == 0 else [],
                    files=file_of.tobytes(),
                    offsets=offsets.tobytes(),
                )
        return [by_rank[rank] for rank in range(self._all_plans.num_ranks)]

    def merges(
        self, told: Sequence[WrittenRuns], written: Sequence[Mapping[int, Sequence[Place]]]
    ) -> list[Merge] | None:
        """What each rank puts together; None if there is nothing to put together.

        Args:
            told: of each rank.
            written: per cohort, index of a piece -> where it lies in the images of those that write it.
        Raises: ConflictError if two ranks would write one block.
        """
        files = self.files
        if files is None:
            return None
        whole: list[list[tuple[int, int]]] = [[] for _ in files.lengths]
        for runs in told:
            numbers = iter(array("Q", runs["whole"]))
            for file, start, stop in zip(numbers, numbers, numbers, strict=True):
                whole[file].append((start, stop))
        spans = [
            span
            for file, taken in enumerate(whole)
            for span in spans_between(file, files.lengths[file], taken)
        ]
        if not spans:  # one rank, or shards that end where blocks do: no exchange more
            return None
        # ascending in their files: ``overlapping`` goes over them with the spans, once
        parts = sorted(self._all_parts(told[0]["heads"], written), key=lambda part: part[:2])
        return [make_merge(mine, overlapping(parts, mine)) for mine in dealt(spans, len(told))]

    def _all_parts(
        self, heads: Sequence[int], written: Sequence[Mapping[int, Sequence[Place]]]
    ) -> Iterator[Part]:
        all_plans, files = self._all_plans, self.files
        assert files is not None
        for file, (head, offset) in enumerate(zip(files.heads, heads, strict=True)):
            yield Part(file, 0, (len(head),), 1, [(0, offset, (0,), (len(head),))])
        for number, (file, start) in files.places.items():
            tensor = self._tensors[number]
            pieces = []
            for cohort, index in all_plans.own[self._names[number]]:
                form = all_plans.tensor_cohorts[cohort].form_of[index]
                for rank, offset, nbytes in written[cohort].get(index, ()):
                    assert isinstance(rank, int)
                    if nbytes:  # an empty box meets nothing
                        pieces.append((rank, offset, *all_plans.boxes[rank][form]))
            yield Part(file, start, tensor.shape, tensor.dtype.itemsize, pieces)

    def groups(self, groups: Iterable[Group]) -> Iterator[Group]:
        """``groups`` with public tensors in one chunk each, which is how readers find them."""
        for group in groups:
            rows = dict(zip(group.names, group.places, strict=True))
            # whole, however ranks hold it: a load by other ranks cuts it anyway, and `.metadata` stays small
            public = [name for name in rows if name in self._place]
            if public:
                entry = group.entry
                assert isinstance(entry, TensorStorageMetadata)
                chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(entry.size)), sizes=entry.size)
                whole = TensorStorageMetadata(entry.properties, entry.size, [chunk])
                yield Group(whole, public, [[self._place[name]] for name in public])
            if others := [name for name in rows if name not in self._place]:
                yield Group(group.entry, others, [rows[name] for name in others])

    def promises(self, promises: Iterable[Promise]) -> Iterator[Promise]:
        """``promises``, likewise."""
        for promise in promises:
            rows = dict(zip(promise.names, promise.rows, strict=True))
            if public := [name for name in rows if name in self._place]:
                assert promise.size is not None
                boxes = [((0,) * len(promise.size), promise.size)]
                places = [[self._place[name]] for name in public]
                yield Promise(public, promise.size, promise.dtype, boxes, places)
            if others := [name for name in rows if name not in self._place]:
                yield Promise(
                    others, promise.size, promise.dtype, promise.boxes, [rows[name] for name in others]
                )


def _names(all_plans: AllPlans) -> dict[str, list[str]]:
    """Name of each tensor that may be public -> further names of its bytes."""
    # in the order in which ranks speak; a format has an order of its own
    names: dict[str, list[str]] = {name: [] for name in all_plans.own}
    target_of: dict[str, str] = {}
    refused: set[str] = set()
    for cohort in all_plans.tensor_cohorts:
        for tie, index in cohort.ties:
            target = cohort.names[index]
            if tie in names or target_of.setdefault(tie, target) != target:
                # bytes of its own on one rank, another tensor's on the next: no file has a word for that
                refused |= {tie, target, target_of.get(tie, target)}
    for tie, target in target_of.items():
        names[target].append(tie)
    return {name: ties for name, ties in names.items() if name not in refused and not refused & set(ties)}
