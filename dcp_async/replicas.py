"""Whether what several ranks hold alike is alike: one rank writes it, all have their bytes compared.

Enters: a captured state, before anybody may change it, and the groups of a plan. Leaves: a Sample, whose
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
from operator import itemgetter
from typing import Literal

import torch
import xxhash

from .device import Event
from .formats.zip_item import contiguous_strides
from .gather import Gather, RefusedError
from .global_plan import ConflictError, ReplicaGroup, two_meshes
from .mutation import versions_of
from .offer import Mesh
from .planner import CompiledPlan
from .remote import name_ranks
from .replica_groups import pieces_of
from .replica_turns import Turn
from .staging import MutatedTensors, Stager, flat_slices
from .state import Captured, Structure

Mode = Literal["check", "sample", "trust"]
Kind = Literal["small", "blocks", "whole"]

_SMALL_BYTES = 64 << 10
_BLOCK_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 20
"""What is read at a time where the bytes are not kept; it stays in a core's cache."""
_ALIGN = 16
"""Of a piece in a buffer: the largest itemsize."""
_KEPT_PLANS = 2

Digest = tuple[int, Kind, int]
"""(group, what of it, digest). Plain data: it travels."""
Details = list[tuple[int, Kind, list[str], bytes, list[Mesh]]]
"""(group, what of it, the name of each piece, array("Q") of their digests, the group's meshes). Plain data:
it travels."""

Piece = tuple[int, int, int]
"""(place in the structure, first byte, number of bytes) of a run of a piece's elements."""


@dataclass(slots=True)
class _Region:
    """What is compared of one group."""

    group: int
    kind: Kind
    pieces: list[Piece]


class _Buffer:
    """Pieces one behind the other; whatever reads them is made once, and fits each state of the structure."""

    def __init__(
        self, structure: Structure, pieces: Sequence[Piece], memory: bytearray | None = None
    ) -> None:
        """``memory`` is used if it is given and they fit in; what was there is overwritten."""
        self.starts = [0, *accumulate(_aligned(nbytes) for *_, nbytes in pieces)]
        self.pieces = pieces
        if memory is None or len(memory) < self.starts[-1]:
            memory = bytearray(self.starts[-1])
        self.bytes = memory
        for start, stop, (*_, nbytes) in zip(self.starts, self.starts[1:], pieces, strict=False):
            if start + nbytes != stop:
                memory[start + nbytes : stop] = bytes(stop - start - nbytes)
        self._structure = structure
        self._memory = torch.frombuffer(self.bytes, dtype=torch.uint8)
        self._flat: dict[torch.dtype, torch.Tensor] = {}
        self._gathered: list[int] = []
        self._rest: list[int] | None = None
        """Which of the pieces torch copies; None before anything was read."""
        self._gather: Gather | None = None
        self._aimed: list[int] | None = None

    def fill(self, captured: Captured, stager: Stager, events: dict[torch.device, Event]) -> None:
        """Read all pieces."""
        gathers = stager.gathers and captured.pointers is not None and not events
        if self._rest is None or (self._gather is not None and not gathers):
            self._divide(gathers=gathers)
        try:
            self._copy_gathered(captured)
        except RefusedError as error:
            stager.gather_no_more(error)
            self._divide(gathers=False)
        self._copy_rest(captured, stager, events)

    def _divide(self, *, gathers: bool) -> None:
        """Decide who copies what."""
        strides = self._structure.strides
        self._gathered, self._rest, run_starts = [], [], []
        for at, (index, *_) in enumerate(self.pieces):
            if not gathers or strides[index] is not None:
                self._rest.append(at)
                continue
            if not self._gathered or self._gathered[-1] != at - 1:
                run_starts.append(len(self._gathered))
            self._gathered.append(at)
        self._gather = self._aimed = None
        if self._gathered:
            base = self._memory.data_ptr()
            targets = [base + self.starts[at] for at in self._gathered]
            lengths = [self.pieces[at][2] for at in self._gathered]
            self._gather = Gather(targets, lengths, run_starts)

    def _copy_gathered(self, captured: Captured) -> None:
        if self._gather is None:
            return
        pointers = captured.pointers
        assert pointers is not None
        if pointers is not self._aimed:
            chosen = [self.pieces[at] for at in self._gathered]
            found = _picked(pointers, [index for index, *_ in chosen])
            if any(low for _, low, _ in chosen):
                found = [pointer + low for pointer, (_, low, _) in zip(found, chosen, strict=True)]
            self._gather.aim(found)
            self._aimed = pointers
        self._gather.copy(0, self._gather.num_calls)

    def _copy_rest(self, captured: Captured, stager: Stager, events: dict[torch.device, Event]) -> None:
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for at in self._rest or ():
            for target, source in self._boxes(captured, at):
                targets.append(target)
                sources.append(source)
        if targets:
            stager.copy_tensors(events, targets, sources)

    def _boxes(self, captured: Captured, at: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(target, source) of a piece."""
        index, low, nbytes = self.pieces[at]
        dtype, shape = self._structure.dtypes[index], self._structure.shapes[index]
        if dtype not in self._flat:
            self._flat[dtype] = self._memory.view(dtype)
        flat, size = self._flat[dtype], dtype.itemsize
        base = self.starts[at] // size
        source = captured.tensors[index].detach()
        if nbytes == shape.numel() * size:
            yield flat.as_strided(shape, contiguous_strides(shape), base), source
            return
        first = low // size
        for box, begin, end in flat_slices(shape, first, first + nbytes // size):
            part = source[box]
            yield flat[base + begin - first : base + end - first].view(part.shape), part

    def piece(self, at: int) -> memoryview:
        """The bytes of a piece."""
        start = self.starts[at]
        return memoryview(self.bytes)[start : start + self.pieces[at][2]]

    def span(self, first: int, stop: int) -> memoryview:
        """The bytes of pieces [first, stop), and the zeros between them."""
        return memoryview(self.bytes)[self.starts[first] : self.starts[stop]]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _picked(values: list[int], places: list[int]) -> Sequence[int]:
    if len(places) == 1:
        return [values[places[0]]]
    found: Sequence[int] = itemgetter(*places)(values)
    return found


@dataclass(slots=True)
class _Found:
    """What was read of a region: its bytes, as pieces from ``first`` on of ``buffer``, or their digests."""

    region: _Region
    buffer: _Buffer | None = None
    first: int = 0
    digests: array[int] = field(default_factory=lambda: array("Q"))
    digest: int = 0

    def told(self) -> Digest:
        region, buffer = self.region, self.buffer
        if buffer is not None:
            span = buffer.span(self.first, self.first + len(region.pieces))
            self.digest = xxhash.xxh3_64_intdigest(span)
        return region.group, region.kind, self.digest

    def each(self) -> bytes:
        """A digest per piece."""
        if self.buffer is None:
            return self.digests.tobytes()
        pieces = range(self.first, self.first + len(self.region.pieces))
        return array("Q", map(xxhash.xxh3_64_intdigest, map(self.buffer.piece, pieces))).tobytes()


class Sample:
    """What one save read of this rank's replicas. Holds memory until ``release``."""

    def __init__(
        self, kept: _Kept, found: Sequence[_Found], small: _Buffer | None, blocks: _Buffer | None
    ) -> None:
        self._kept, self._found, self._small, self._blocks = kept, found, small, blocks

    def digests(self) -> list[Digest]:
        """A digest per group and kind; takes CPU."""
        return [each.told() for each in self._found]

    def details(self, wanted: Iterable[tuple[int, Kind]]) -> Details:
        """A digest per piece of these groups."""
        plan, chosen = self._kept.plan, set(wanted)
        names = plan.structure.tensor_names
        meshes = {group["number"]: group["meshes"] for group in plan.replicas}
        return [
            (
                each.region.group,
                each.region.kind,
                [names[index] for index, *_ in each.region.pieces],
                each.each(),
                meshes[each.region.group],
            )
            for each in self._found
            if (each.region.group, each.region.kind) in chosen
        ]

    def release(self) -> None:
        """Another save may have the side buffers."""
        if self._small is not None:
            self._kept.free.append(self._small)
        if self._blocks is not None:
            self._kept.memory.append(self._blocks.bytes)
        self._small, self._blocks, self._found = None, None, []


class _Kept:
    """What is compared in the saves of one plan."""

    def __init__(self, plan: CompiledPlan, mode: Mode) -> None:
        self.plan = plan
        self.free: list[_Buffer] = []
        """Side buffers that no save is using."""
        self.memory: list[bytearray] = []
        """The same for blocks, which are others in each save."""
        self.small: list[_Region] = []
        self.whole: list[_Region] = []
        """Until the plan is proven."""
        self.always: list[_Region] = []
        """What nothing but its bytes tells from another layer of the same name: equal at first, as zeros are,
        is not equal for good."""
        self._turning: list[tuple[ReplicaGroup, list[tuple[int, int]], list[int]]] = []
        """(group, (place, bytes) of its larger pieces, how many blocks come before each)"""
        structure = plan.structure
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

    def blocks(self, turn: int) -> list[_Region]:
        """The blocks of larger tensors whose turn it is: spread evenly, and all of them once in a round."""
        regions = []
        for group, large, before in self._turning:
            total = before[-1]
            stride = -(-total // group["blocks"])
            pieces = []
            for block in range(turn % stride, total, stride):
                at = bisect_right(before, block) - 1
                index, nbytes = large[at]
                low = (block - before[at]) * _BLOCK_BYTES
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

    def take(
        self, plan: CompiledPlan, captured: Captured, events: dict[torch.device, Event], turn: Turn
    ) -> Sample | None:
        """Read the replicas in ``captured``, in the stager's thread; None if there is nothing to compare.

        ``turn`` must be alike on all ranks. Raises: MutatedTensors.
        """
        if not plan.replicas:
            return None
        kept = self._kept.get(id(plan))
        if kept is None:
            kept = self._kept[id(plan)] = _Kept(plan, self._mode)
            if len(self._kept) > _KEPT_PLANS:
                self._kept.popitem(last=False)
        found: list[_Found] = []
        small: _Buffer | None = None
        blocks: _Buffer | None = None
        structure = plan.structure
        reader = _Reader(captured, self._stager, events)
        is_proven = turn["is_proven"]
        regions = kept.blocks(turn["number"]) if is_proven or self._mode == "sample" else []
        if not self._stager.pool.has_budget:
            if kept.small:
                small = kept.free.pop() if kept.free else _Buffer(structure, _all_pieces(kept.small))
                found += reader.filled(small, kept.small)
            if regions:
                memory = kept.memory.pop() if kept.memory else None
                blocks = _Buffer(structure, _all_pieces(regions), memory)
                found += reader.filled(blocks, regions)
        else:
            found += map(reader.streamed, [*kept.small, *regions])
        found += map(reader.streamed, kept.always if is_proven else [*kept.always, *kept.whole])
        sample = Sample(kept, found, small, blocks)
        try:
            self._check_versions(captured, plan, found)
        except MutatedTensors:
            sample.release()
            raise
        return sample

    def _check_versions(self, captured: Captured, plan: CompiledPlan, found: Iterable[_Found]) -> None:
        """With ``overlap=True``: what was changed meanwhile must not pass for a difference between ranks."""
        expected = captured.versions
        if expected is None:
            return
        places = sorted({index for each in found for index, *_ in each.region.pieces})
        now = versions_of([captured.tensors[index] for index in places])
        moved = [index for index, version in zip(places, now, strict=True) if version != expected[index]]
        moved += captured.watch.moved(places)
        if moved:
            raise MutatedTensors([plan.structure.tensor_names[index] for index in moved])


def _all_pieces(regions: Iterable[_Region]) -> list[Piece]:
    return [piece for region in regions for piece in region.pieces]


class _Reader:
    """Reads pieces of one captured state."""

    def __init__(self, captured: Captured, stager: Stager, events: dict[torch.device, Event]) -> None:
        self._captured, self._stager, self._events = captured, stager, events
        self._scratch = bytearray(_CHUNK_BYTES)

    def filled(self, buffer: _Buffer, regions: Sequence[_Region]) -> Iterator[_Found]:
        """Of all ``regions`` at once, to be hashed later."""
        buffer.fill(self._captured, self._stager, self._events)
        first = 0
        for region in regions:
            yield _Found(region, buffer, first)
            first += len(region.pieces)

    def streamed(self, region: _Region) -> _Found:
        """Of one region, hashed chunk by chunk: its bytes are not kept."""
        found = _Found(region)
        whole = xxhash.xxh3_64()
        is_whole = region.kind == "whole"
        for piece in region.pieces:
            one = xxhash.xxh3_64()
            for chunk in _chunks(piece):
                buffer = _Buffer(self._captured.structure, [chunk], self._scratch)
                buffer.fill(self._captured, self._stager, self._events)
                one.update(buffer.piece(0))
                if not is_whole:  # what ``filled`` would give
                    whole.update(buffer.span(0, 1))
            found.digests.append(one.intdigest())
        found.digest = xxhash.xxh3_64_intdigest(found.digests.tobytes()) if is_whole else whole.intdigest()
        return found


def _chunks(piece: Piece) -> Iterator[Piece]:
    index, low, nbytes = piece
    for start in range(low, low + nbytes, _CHUNK_BYTES):
        yield index, start, min(_CHUNK_BYTES, low + nbytes - start)


# The coordinator's part.


def differing(told: Sequence[Sequence[Digest]]) -> list[tuple[int, Kind]]:
    """The groups in which ranks hold different bytes. ``told``: per rank, what its sample says."""
    known: dict[tuple[int, Kind], int] = {}
    found: dict[tuple[int, Kind], None] = {}
    for mine in told:
        for group, kind, digest in mine:
            if known.setdefault((group, kind), digest) != digest:
                found[group, kind] = None
    return list(found)


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
        for name, *each in zip(_own_names(names[key]), *by_rank.values(), strict=True):
            if len(set(each)) > 1 and name not in differ:
                differ[name] = (
                    two_meshes(name, meshes[key])
                    if meshes[key]
                    else _told(name, dict(zip(ranks, each, strict=True)))
                )
    first, *more = differ or {"a tensor": "a tensor differs between ranks"}
    text = differ.get(first, first)
    if more:
        text += f". So do {len(more)} more: {', '.join(more[:5])}{' ...' if len(more) > 5 else ''}"
    return ConflictError(text)


def _own_names(names: Sequence[Sequence[str]]) -> list[str]:
    """Per piece of a group its name, given each rank's: a rank where it is tied to another tensor calls it as
    it calls that."""
    counts = [Counter(mine) for mine in names]
    return [
        next((name for name, of in zip(each, counts, strict=True) if of[name] == 1), each[0])
        for each in zip(*names, strict=True)
    ]


def _told(name: str, digests: Mapping[int, int]) -> str:
    holders: dict[int, list[int]] = {}
    for rank, digest in sorted(digests.items()):
        holders.setdefault(digest, []).append(rank)
    (first, *_), (other, *_), *_ = holders.values()
    each = ""
    if len(digests) > 2:
        told = [name_ranks(ranks) for ranks in holders.values()]
        each = f" ({'; '.join(told[:4])}{'; ...' if len(told) > 4 else ''} hold the same each)"
    return (
        f"{name} differs between rank {first} and rank {other}{each}. If it is meant to, put it into "
        "PerRank(...), which keeps one for each rank, or give it another name on each; if not, the ranks "
        "have drifted apart: broadcast it, or save what one rank holds with Coordination(replicas='trust')"
    )
