"""Small tensors of a device, gathered on the device into the bytes that a file will have.

Enters: a plan, and which of its tensors lie on a device. Leaves: stretches of the file's image, put together
in a scratch on the device by one batched copy, constant bytes included, so that each travels as one
transfer: a transfer of its own costs a small tensor more than its bytes do. A scratch that was filled in
``save()`` is also the copy that ``overlap=True`` takes of small tensors. Invariant: a scratch is written
again only after what read it has arrived, and after what was queued to write it, on whatever stream.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .._geometry import contiguous_strides
from ..planning import CompiledPlan
from .device import Event, Stream
from .selection import Selection

logger = logging.getLogger(__name__)

_TENSOR_BYTES = 64 * 1024
"""Up to here a transfer costs more than its bytes (10 us at 50 GB/s are 512 KiB; a copy on the device is
needed besides)."""
_SCRATCH_BYTES = 256 << 20
"""How much of a device one scratch takes at most; the smallest tensors come first."""
_ALIGN = 64
"""What lies at a multiple of it in the image does so in the scratch."""
_KEPT_PLANS = 4
"""For how many plans packs are kept: several engines may share a stager."""

NO_PACKS: dict[torch.device, Pack] = {}

Located = Sequence[torch.device | None]
"""Per tensor of a structure, on which accelerator it lies; None in host memory. Empty: all of them there."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes [start, stop) of the image, which lie from ``offset`` on in the scratch."""

    start: int
    stop: int
    offset: int


@dataclass(eq=False, slots=True)
class Scratch:
    """Memory of the device in the order of the image."""

    memory: torch.Tensor
    views: list[list[torch.Tensor]]
    """Per group of the pack, where its tensors go."""
    every: list[torch.Tensor]
    """All views, in the order of the pack's tensors."""
    written: Event | None = None
    """When what was queued last to write it is done: a save that failed waits for nothing of its own."""
    _pieces: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)

    def bytes_of(self, stretches: Sequence[Stretch]) -> list[torch.Tensor]:
        """What lies there, a view for each; kept, as each save of the plan asks for the same."""
        key = stretches[0].start, stretches[-1].stop
        if key not in self._pieces:
            self._pieces[key] = [
                self.memory[piece.offset : piece.offset + piece.stop - piece.start] for piece in stretches
            ]
        return self._pieces[key]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state's small tensors of one device, gathered."""

    pack: Pack
    scratch: Scratch

    def release(self) -> None:
        """Nobody reads it any more, or what reads it is of no use."""
        self.pack.give_back(self.scratch)


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors of one dtype: a batch of one kind takes the fast path of ``_foreach_copy_``."""

    in_share: Selection
    in_structure: Selection


class Pack:
    """The small tensors of one device in one plan's image."""

    def __init__(self, plan: CompiledPlan, device: torch.device, members: Sequence[int]) -> None:
        """``members``: by their place among the tensors that this rank writes, ascending."""
        self.device = device
        self.members = list(members)
        self.in_structure = [plan.tensors[index] for index in members]
        """Its members by their index in the structure."""
        self._plan = plan
        self._stretches, self._offsets = _stretches(plan, members)
        end = self._stretches[-1].offset + self._stretches[-1].stop - self._stretches[-1].start
        self._nbytes = -(-end // _ALIGN) * _ALIGN  # it is viewed as each of its dtypes
        dtypes: defaultdict[torch.dtype, list[int]] = defaultdict(list)
        for number, index in enumerate(self.in_structure):
            dtypes[plan.structure.dtypes[index]].append(number)
        self._numbers = list(dtypes.values())
        self.selection = Selection(self.members)
        self._groups = [
            _Group(
                Selection(self.members[number] for number in numbers),
                Selection(self.in_structure[number] for number in numbers),
            )
            for numbers in self._numbers
        ]
        self._free: list[Scratch] = []
        self._lock = threading.Lock()

    def take(self, stream: Stream) -> Scratch:
        """A scratch of the caller's until it gives it back, to be written on ``stream``. Raises what the
        device does if it has no memory."""
        with self._lock:
            scratch = self._free.pop() if self._free else None
        if scratch is None:
            with torch.inference_mode(False):  # or only who is in it could write it again
                return self._make(stream)
        if scratch.written is not None:
            stream.wait_event(scratch.written)
        return scratch

    def _make(self, stream: Stream) -> Scratch:
        constants = bytearray(self._nbytes)
        memory = memoryview(constants)
        for stretch in self._stretches:
            nbytes = stretch.stop - stretch.start
            self._plan.layout.fill_constants(memory[stretch.offset : stretch.offset + nbytes], stretch.start)
        scratch = stream.empty((self._nbytes,), torch.uint8)
        stream.copy([scratch], [torch.frombuffer(constants, dtype=torch.uint8)])
        structure = self._plan.structure
        every: list[torch.Tensor] = []
        typed: dict[torch.dtype, torch.Tensor] = {}
        for index, offset in zip(self.in_structure, self._offsets, strict=True):
            dtype, shape = structure.dtypes[index], structure.shapes[index]
            if dtype not in typed:
                typed[dtype] = scratch.view(dtype)
            every.append(typed[dtype].as_strided(shape, contiguous_strides(shape), offset // dtype.itemsize))
        return Scratch(scratch, [[every[number] for number in numbers] for numbers in self._numbers], every)

    def give_back(self, scratch: Scratch) -> None:
        """What read ``scratch`` has arrived, or belongs to nobody any more."""
        with self._lock:
            self._free.append(scratch)

    def trim(self) -> None:
        """Let those scratches go that nobody has taken."""
        with self._lock:
            self._free.clear()

    def fill(self, scratch: Scratch, stream: Stream, share: Sequence[torch.Tensor]) -> None:
        """Queue on ``stream``: gather from the tensors that this rank writes."""
        self._gather(scratch, stream, [group.in_share.pick(share) for group in self._groups])

    def snapshot(self, scratch: Scratch, stream: Stream, state: Sequence[torch.Tensor]) -> None:
        """Queue on ``stream``: gather from the tensors of the whole structure."""
        self._gather(scratch, stream, [group.in_structure.pick(state) for group in self._groups])

    def _gather(self, scratch: Scratch, stream: Stream, groups: Sequence[Sequence[torch.Tensor]]) -> None:
        for views, sources in zip(scratch.views, groups, strict=True):
            stream.copy(views, sources)
        scratch.written = stream.record()

    def pieces(self, start: int, stop: int) -> list[Stretch]:
        """What of the stretches lies in the image's bytes [start, stop)."""
        return [
            Stretch(low, high, stretch.offset + low - stretch.start)
            for stretch in self._stretches
            if (low := max(stretch.start, start)) < (high := min(stretch.stop, stop))
        ]


def _stretches(plan: CompiledPlan, members: Sequence[int]) -> tuple[list[Stretch], list[int]]:
    """Runs of ``members`` that follow each other in the image, and where each member lies in the scratch."""
    layout = plan.layout
    stretches: list[Stretch] = []
    offsets: list[int] = []
    # not -1: the first member would pass for the neighbour of one before it
    before = -2
    for index in members:
        start = layout.payload_offsets[index]
        stop = start + layout.payload_bytes[index]
        # between neighbours lie constant bytes alone, and leaves lie behind all tensors
        if index == before + 1:
            last = stretches[-1]
            stretches[-1] = Stretch(last.start, stop, last.offset)
        else:
            end = stretches[-1].offset + stretches[-1].stop - stretches[-1].start if stretches else 0
            # as far behind a multiple as in the image: then each of its members is aligned as it is there
            stretches.append(Stretch(start, stop, -(-end // _ALIGN) * _ALIGN + start % _ALIGN))
        offsets.append(stretches[-1].offset + start - stretches[-1].start)
        before = index
    return stretches, offsets


@dataclass(slots=True)
class _PlanPacks:
    """Holding the plan keeps its id from being used again."""

    plan: CompiledPlan
    located: Located
    packs: dict[torch.device, Pack]


class Packs:
    """The packs of the last few plans. Made by the copying thread, looked up by callers' threads too."""

    def __init__(self) -> None:
        self._plans: OrderedDict[int, _PlanPacks] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, plan: CompiledPlan, located: Located) -> dict[torch.device, Pack]:
        """Those of ``plan`` for tensors that lie at ``located``, by index in the structure; none if they were
        not made yet."""
        with self._lock:
            kept = self._plans.get(id(plan))
            if kept is None or (kept.located is not located and kept.located != located):
                return NO_PACKS
            self._plans.move_to_end(id(plan))
            return kept.packs

    def made(self, plan: CompiledPlan, located: Located) -> dict[torch.device, Pack]:
        """As ``known``, made if need be."""
        with self._lock:
            kept = self._plans.get(id(plan))
            if kept is None or (kept.located is not located and kept.located != located):
                # a state that grew does not come back to its old plan, and a device's memory is dear
                for earlier in self._plans.values():
                    for pack in earlier.packs.values():
                        pack.trim()
                kept = self._plans[id(plan)] = _PlanPacks(plan, located, _make_packs(plan, located))
                if len(self._plans) > _KEPT_PLANS:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(id(plan))
            return kept.packs

    def give_up(self, plan: CompiledPlan, device: torch.device) -> None:
        """Nothing is packed on ``device`` any more under ``plan``."""
        with self._lock:
            kept = self._plans.get(id(plan))
            if kept is not None:
                # another mapping: views that were made for this one are no use any more
                kept.packs = {other: pack for other, pack in kept.packs.items() if other != device}

    def clear(self) -> None:
        """Let the scratches go."""
        with self._lock:
            self._plans.clear()


def _make_packs(plan: CompiledPlan, located: Located) -> dict[torch.device, Pack]:
    layout, strides = plan.layout, plan.structure.strides
    members: defaultdict[torch.device, list[int]] = defaultdict(list)
    for index, in_structure in enumerate(plan.tensors):
        device = located[in_structure]
        # row-major ones: with others in it a batch would not take the fast path
        if (
            device is not None
            and 0 < layout.payload_bytes[index] <= _TENSOR_BYTES
            and strides[in_structure] is None
        ):
            members[device].append(index)
    return {device: Pack(plan, device, _fitting(plan, all_of_it)) for device, all_of_it in members.items()}


def _fitting(plan: CompiledPlan, members: list[int]) -> list[int]:
    """Those of ``members``, smallest first, that one scratch holds."""
    sizes = plan.layout.payload_bytes
    # as an upper bound, each with the gap before it
    items = plan.layout.item_bytes
    if sum(items[index] for index in members) <= _SCRATCH_BYTES:
        return members
    room, chosen = _SCRATCH_BYTES, []
    # smallest first: a transfer of its own costs those most, for what they hold
    for index in sorted(members, key=sizes.__getitem__):
        room -= items[index] + _ALIGN
        if room < 0:
            break
        chosen.append(index)
    # ascending again, or neighbours in the image would be no stretch
    return sorted(chosen)
