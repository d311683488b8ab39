"""Whether what several ranks hold alike is alike: one rank writes it, all have their bytes compared.

Enters: a prepared state, before anybody may change it, and the groups of a plan. Leaves: a Sample, whose
digests travel with the message that a save's commit sends anyway. Invariant: what is compared is what is
saved, the elements in row-major order, so strides do not matter and the payload of a NaN does; and a plan's
tensors cost no step of Python each, but for what ``whole`` reads once.

Tensors of up to 64 KiB are compared in every save: they are copied into a side buffer, which is hashed when
the caller has its state back. Larger ones are read as a whole by the first save of a plan, and by the later
ones in blocks that take turns. Those of several meshes are read as a whole by every save, whatever the mode.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import xxhash

from ..coordination import name_ranks
from ..planning import CompiledPlan, ConflictError, Mesh, ReplicaGroup, Turn, pieces_of, two_meshes
from ..staging import MutatedTensors, Piece, Prepared, Selection, SideBuffer, Stager

Mode = Literal["check", "sample", "trust"]
Kind = Literal["small", "blocks", "whole"]

_SMALL_BYTES = 64 << 10
_BLOCK_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 20
"""What is read at a time where the bytes are not kept; it stays in a core's cache."""
_KEPT_PLANS = 2

Digest = tuple[int, Kind, int]
"""(group, what of it, digest). Plain data: it travels."""
Details = list[tuple[int, Kind, list[str], bytes, list[Mesh]]]
"""(group, what of it, the name of each piece, array("Q") of their digests, the group's meshes). Plain data:
it travels."""


@dataclass(slots=True)
class _Region:
    """What is compared of one group."""

    group: int
    kind: Kind
    pieces: list[Piece]


@dataclass(slots=True)
class _Read:
    """What was read of a region: its bytes, as pieces from ``first`` on of ``buffer``, or their digests."""

    region: _Region
    buffer: SideBuffer | None = None
    first: int = 0
    digests: array[int] = field(default_factory=lambda: array("Q"))
    digest: int = 0

    def summary(self) -> Digest:
        region, buffer = self.region, self.buffer
        if buffer is not None:
            span = buffer.span(self.first, self.first + len(region.pieces))
            self.digest = xxhash.xxh3_64_intdigest(span)
        return region.group, region.kind, self.digest

    def by_piece(self) -> bytes:
        """A digest per piece."""
        if self.buffer is None:
            return self.digests.tobytes()
        pieces = range(self.first, self.first + len(self.region.pieces))
        return array("Q", map(xxhash.xxh3_64_intdigest, map(self.buffer.piece, pieces))).tobytes()


class Sample:
    """What one save read of this rank's replicas. Holds memory until ``release``."""

    def __init__(
        self, kept: _Kept, regions: Sequence[_Read], small: SideBuffer | None, blocks: SideBuffer | None
    ) -> None:
        self._kept, self._regions, self._small, self._blocks = kept, regions, small, blocks

    def digests(self) -> list[Digest]:
        """A digest per group and kind; takes CPU."""
        return [read.summary() for read in self._regions]

    def details(self, wanted: Iterable[tuple[int, Kind]]) -> Details:
        """A digest per piece of these groups."""
        plan, chosen = self._kept.plan, set(wanted)
        names = plan.structure.tensor_names
        meshes = {group["number"]: group["meshes"] for group in plan.replicas}
        return [
            (
                read.region.group,
                read.region.kind,
                [names[index] for index, *_ in read.region.pieces],
                read.by_piece(),
                meshes[read.region.group],
            )
            for read in self._regions
            if (read.region.group, read.region.kind) in chosen
        ]

    def release(self) -> None:
        """Another save may have the side buffers."""
        if self._small is not None:
            self._kept.free.append(self._small)
        if self._blocks is not None:
            self._kept.memory.append(self._blocks.bytes)
        self._small, self._blocks, self._regions = None, None, []


class _Kept:
    """What is compared in the saves of one plan."""

    def __init__(self, plan: CompiledPlan, mode: Mode) -> None:
        self.plan = plan
        self.free: list[SideBuffer] = []
        """Side buffers that no save is using."""
        self.memory: list[bytearray] = []
        """Memory for blocks, which are others in each save."""
        self.small: list[_Region] = []
        self.whole: list[_Region] = []
        """What is read as a whole until the plan is proven."""
        self.always: list[_Region] = []
        """What nothing but its bytes tells from another layer of the same name: equal at first, as zeros are,
        is not equal for good."""
        self._turning: list[tuple[ReplicaGroup, list[tuple[int, int]], list[int]]] = []
        """(group, (index, bytes) of its larger pieces, how many blocks come before each)"""
        structure = plan.structure
        # "sample" deals out blocks of all tensors, "trust" reads those of several meshes alone: to neither is
        # one small
        least = _SMALL_BYTES if mode == "check" else 0
        for group in plan.replicas:
            sizes = [
                (index, structure.shapes[index].numel() * structure.dtypes[index].itemsize)
                for index in pieces_of(group)
            ]
            small = [(index, 0, nbytes) for index, nbytes in sizes if nbytes <= least]
            large = [(index, nbytes) for index, nbytes in sizes if nbytes > least]
            if small:
                self.small.append(_Region(group["number"], "small", small))
            whole = _Region(group["number"], "whole", [(index, 0, nbytes) for index, nbytes in large])
            if large and group["meshes"]:
                self.always.append(whole)
            elif large and mode != "trust":
                counts = [-(-nbytes // _BLOCK_BYTES) for _, nbytes in large]
                self._turning.append((group, large, [0, *accumulate(counts)]))
                if mode == "check":
                    self.whole.append(whole)

        # made once: it is asked in every save
        self.small_tensors = Selection(index for index, *_ in _all_pieces(self.small))

    def blocks(self, turn: int) -> list[_Region]:
        """The blocks of larger tensors whose turn it is: spread evenly, and all of them once in a round."""
        regions = []
        for group, large, before in self._turning:
            total = before[-1]
            # rounded up, so that a save compares the group's number of blocks at most
            stride = -(-total // group["blocks"])
            pieces = []
            for block in range(turn % stride, total, stride):
                # numbered through all tensors of the group: each byte has its turn as often as any other
                position = bisect_right(before, block) - 1
                index, nbytes = large[position]
                low = (block - before[position]) * _BLOCK_BYTES
                pieces.append((index, low, min(_BLOCK_BYTES, nbytes - low)))
            regions.append(_Region(group["number"], "blocks", pieces))
        return regions


class ReplicaCheck:
    """Reads what ranks have to compare. Owned by an engine; side buffers live as long as their plan is in
    use."""

    def __init__(self, mode: Mode, stager: Stager) -> None:
        self._mode = mode
        self._stager = stager
        self._kept: OrderedDict[int, _Kept] = OrderedDict()

    def take(self, plan: CompiledPlan, prepared: Prepared, turn: Turn) -> Sample | None:
        """Read the replicas in ``prepared``, in the stager's thread; None if there is nothing to compare.

        ``turn`` must be alike on all ranks. Raises: MutatedTensors.
        """
        if not plan.replicas:
            return None
        kept = self._kept.get(id(plan))  # an id that is not used again: what is kept holds its plan
        if kept is None:
            kept = self._kept[id(plan)] = _Kept(plan, self._mode)
            if len(self._kept) > _KEPT_PLANS:
                # a sample in use holds what it needs of it
                self._kept.popitem(last=False)
        reads: list[_Read] = []
        small: SideBuffer | None = None
        blocks: SideBuffer | None = None
        structure = plan.structure
        reader = _Reader(prepared, self._stager)
        is_proven = turn["is_proven"]
        # until a plan is proven "check" reads large tensors whole: their blocks would be read twice
        regions = kept.blocks(turn["number"]) if is_proven or self._mode == "sample" else []
        # with side buffers a later save costs no step of Python per tensor; under a budget there is no memory
        # for them, so bytes are hashed as they are read
        if not self._stager.pool.has_budget:
            if kept.small:
                small = kept.free.pop() if kept.free else SideBuffer(structure, _all_pieces(kept.small))
                reads += reader.filled(small, kept.small)
            if regions:
                memory = kept.memory.pop() if kept.memory else None
                blocks = SideBuffer(structure, _all_pieces(regions), memory)
                reads += reader.filled(blocks, regions)
        else:
            reads += map(reader.streamed, [*kept.small, *regions])
        # large ones that are read once, or whatever it costs, are not worth a buffer
        reads += map(reader.streamed, kept.always if is_proven else [*kept.always, *kept.whole])
        sample = Sample(kept, reads, small, blocks)
        try:
            _refuse_changed(prepared, kept, reads)
        except MutatedTensors:
            sample.release()
            raise
        return sample


def _refuse_changed(prepared: Prepared, kept: _Kept, reads: Sequence[_Read]) -> None:
    """What a trainer that goes on has changed must not pass for a difference between ranks."""
    if prepared.watch is None:
        return
    large = _all_pieces([read.region for read in reads if read.region.kind != "small"])
    unseen = prepared.changed_unseen()
    changed: set[int] = set()
    for selection in (kept.small_tensors, Selection(index for index, *_ in large)):
        changed |= prepared.changed(selection) | unseen.intersection(selection.indices)
    prepared.refuse(changed)


def _all_pieces(regions: Iterable[_Region]) -> list[Piece]:
    return [piece for region in regions for piece in region.pieces]


class _Reader:
    """Reads pieces of one prepared state."""

    def __init__(self, prepared: Prepared, stager: Stager) -> None:
        self._prepared, self._stager = prepared, stager
        self._scratch = bytearray(_CHUNK_BYTES)

    def filled(self, buffer: SideBuffer, regions: Sequence[_Region]) -> Iterator[_Read]:
        """All ``regions`` at once, to be hashed later."""
        buffer.fill(self._prepared, self._stager)
        first = 0
        for region in regions:
            yield _Read(region, buffer, first)
            first += len(region.pieces)

    def streamed(self, region: _Region) -> _Read:
        """One region, hashed chunk by chunk: its bytes are not kept."""
        read = _Read(region)
        whole = xxhash.xxh3_64()
        is_whole = region.kind == "whole"
        for piece in region.pieces:
            one = xxhash.xxh3_64()
            for chunk in _chunks(piece):
                buffer = SideBuffer(self._prepared.captured.structure, [chunk], self._scratch)
                buffer.fill(self._prepared, self._stager)
                one.update(buffer.piece(0))
                if not is_whole:  # what ``filled`` would give
                    whole.update(buffer.span(0, 1))
            # a digest per piece: if ranks differ it has to be told which one, and the bytes are gone by then
            read.digests.append(one.intdigest())
        read.digest = xxhash.xxh3_64_intdigest(read.digests.tobytes()) if is_whole else whole.intdigest()
        return read


def _chunks(piece: Piece) -> Iterator[Piece]:
    index, low, nbytes = piece
    for start in range(low, low + nbytes, _CHUNK_BYTES):
        yield index, start, min(_CHUNK_BYTES, low + nbytes - start)


# The coordinator's side.


def differing(told: Sequence[Sequence[Digest]]) -> list[tuple[int, Kind]]:
    """The groups in which ranks hold different bytes. ``told``: per rank, what its sample says."""
    known: dict[tuple[int, Kind], int] = {}
    differ: dict[tuple[int, Kind], None] = {}  # a dict for its order
    for digests in told:
        for group, kind, digest in digests:
            if known.setdefault((group, kind), digest) != digest:
                differ[group, kind] = None
    return list(differ)


def explain(details: Sequence[Details]) -> ConflictError:
    """What to say of groups that differ. ``details``: per rank."""
    names: dict[tuple[int, Kind], list[list[str]]] = {}
    meshes: dict[tuple[int, Kind], list[Mesh]] = {}
    digests: dict[tuple[int, Kind], dict[int, array[int]]] = {}
    for rank, mine in enumerate(details):
        for group, kind, pieces, raw, lies_on in mine:
            key = group, kind
            names.setdefault(key, []).append(pieces)
            meshes.setdefault(key, lies_on)
            digests.setdefault(key, {})[rank] = array("Q", raw)
    differ: dict[str, str] = {}
    for key, by_rank in digests.items():
        ranks = list(by_rank)
        for name, *held in zip(_own_names(names[key]), *by_rank.values(), strict=True):
            if len(set(held)) > 1 and name not in differ:
                differ[name] = (
                    two_meshes(name, meshes[key])
                    if meshes[key]
                    else _description(name, dict(zip(ranks, held, strict=True)))
                )
    first, *more = differ or {"a tensor": "a tensor differs between ranks"}
    text = differ.get(first, first)
    if more:
        text += f". So do {len(more)} more: {', '.join(more[:5])}{' ...' if len(more) > 5 else ''}"
    return ConflictError(text)


def _own_names(names: Sequence[Sequence[str]]) -> list[str]:
    """Per piece of a group its name, given each rank's: a rank where it is tied to another tensor calls it as
    it calls that."""
    counts = [Counter(by_rank) for by_rank in names]
    return [
        next((name for name, count in zip(aliases, counts, strict=True) if count[name] == 1), aliases[0])
        for aliases in zip(*names, strict=True)
    ]


def _description(name: str, digests: Mapping[int, int]) -> str:
    holders: dict[int, list[int]] = {}
    for rank, digest in sorted(digests.items()):
        holders.setdefault(digest, []).append(rank)
    (first, *_), (other, *_), *_ = holders.values()
    groups = ""
    if len(digests) > 2:
        alike = [name_ranks(ranks) for ranks in holders.values()]
        groups = f" ({'; '.join(alike[:4])}{'; ...' if len(alike) > 4 else ''} hold the same each)"
    return (
        f"{name} differs between rank {first} and rank {other}{groups}. If it is meant to, put it into "
        "PerRank(...), which keeps one for each rank, or give it another name on each; if not, the ranks "
        "have drifted apart: broadcast it, or save what one rank holds with Coordination(replicas='trust')"
    )
