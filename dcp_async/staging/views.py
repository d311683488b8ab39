"""Where the tensors of a run of parts go in the pool; made once per plan, run and place in the pool.

Enters: a plan, a range of its image, a lease, where the tensors lie. Leaves: BatchViews, destination views
and source lists. Making views costs more than copying small tensors, so they are kept with the slots that
they lie in.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .._geometry import contiguous_strides
from ..planning import CompiledPlan
from .memory import Arena, Lease
from .packing import Located, Pack, Stretch
from .selection import Selection
from .vectored_copy import VectoredCopy

_VECTORED_BYTES = 64 * 1024
"""Up to here a tensor is copied by the kernel, many by one call."""
_KEPT_PLANS = 4
"""For how many plans views are kept: several engines may share a stager."""

_Key = tuple[int, int, int, bool]
"""(first part, first slot, number of slots, whether the kernel copies)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchViews:
    """Where the tensors of a run of parts go."""

    whole: Selection
    """Tensors in host memory."""
    targets: list[torch.Tensor]
    """One per tensor of ``whole``."""
    cut: Selection
    """Tensors that reach over the run's ends, wherever they lie."""
    small: Selection
    """Tensors that ``vectored`` copies."""
    vectored: VectoredCopy | None
    away: Mapping[torch.device, DeviceViews]

    @property
    def selections(self) -> list[Selection]:
        """All of them."""
        return [self.whole, self.cut, self.small, *(views.whole for views in self.away.values())]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceViews:
    """Where the tensors of a run go that lie on one accelerator."""

    whole: Selection
    """Tensors that travel one by one."""
    targets: list[torch.Tensor]
    """One per tensor of ``whole``."""
    stretches: Sequence[Stretch]
    """What travels out of the scratch of a pack."""
    stretch_targets: list[torch.Tensor]
    """One per stretch, its bytes."""


@dataclass(slots=True)
class _PlanViews:
    """The views of one plan. Holding the plan keeps its id from being used again."""

    plan: CompiledPlan
    placement: Placement
    batches: dict[_Key, BatchViews] = field(default_factory=dict)


class ViewCache:
    """The views of the last few plans, for as long as the memory that they lie in. For the copying thread
    alone."""

    def __init__(self, *, keeps: bool) -> None:
        """``keeps``: whether to keep any. A small budget deals slots out in ever new combinations, and views
        of those would only pile up."""
        self._keeps = keeps
        # weakly: a view keeps memory mapped, and memory that left the pool has to go
        self._arenas: weakref.WeakKeyDictionary[Arena, OrderedDict[int, _PlanViews]]
        self._arenas = weakref.WeakKeyDictionary()

    def views(
        self, plan: CompiledPlan, first: int, stop: int, lease: Lease, placement: Placement, *, vectored: bool
    ) -> BatchViews:
        """Where the tensors go that lie in ``plan``'s image between the start of part ``first`` and byte
        ``stop``. ``vectored``: whether the kernel copies small ones."""
        plans = self._arenas.setdefault(lease.arena, OrderedDict())
        known = plans.get(id(plan))
        key = (first, lease.first, lease.count, vectored)
        if known is not None and not known.placement.is_as(placement):
            del plans[id(plan)]
            known = None
        if known is not None and key in known.batches:
            # used again: the plan that goes first is the one that no save has asked for the longest
            plans.move_to_end(id(plan))
            return known.batches[key]
        start = first * lease.slot_bytes
        sorting = _Sorting(plan, start, stop, lease, placement, _VECTORED_BYTES if vectored else 0)
        views = sorting.views()
        if self._keeps:
            known = plans.setdefault(id(plan), _PlanViews(plan, placement))
            known.batches[key] = views
            if len(plans) > _KEPT_PLANS:
                plans.popitem(last=False)
        return views

    def clear(self) -> None:
        """Drop them all."""
        self._arenas.clear()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a state's tensors lie, and which of them are packed there."""

    located: Located
    packs: Mapping[torch.device, Pack]

    def is_as(self, other: Placement) -> bool:
        """Whether views that were made for the one fit the other."""
        # by identity first: to compare is to go over all tensors
        same_places = self.located is other.located or self.located == other.located
        return self.packs is other.packs and same_places


class _Sorting:
    """Sorts the tensors of a run by who copies them."""

    def __init__(
        self,
        plan: CompiledPlan,
        start: int,
        stop: int,
        lease: Lease,
        placement: Placement,
        vectored_bytes: int,
    ) -> None:
        """Tensors that overlap the image's bytes [start, stop); row-major ones of up to ``vectored_bytes``
        are left to the kernel."""
        self._plan, self._lease, self._start, self._stop = plan, lease, start, stop
        self._placement = placement
        self._vectored_bytes = vectored_bytes
        self._whole: defaultdict[torch.device | None, list[int]] = defaultdict(list)
        self._targets: defaultdict[torch.device | None, list[torch.Tensor]] = defaultdict(list)
        self._cut: list[int] = []
        self._small: list[int] = []
        # where a new target begins: between small tensors that follow each other lie constant bytes alone
        self._run_starts: list[int] = []

    def views(self) -> BatchViews:
        self._sort()
        layout, lease = self._plan.layout, self._lease
        vectored = None
        if self._small:
            base = lease.arena.tensor.data_ptr() + lease.offset - self._start
            addresses = [base + layout.payload_offsets[index] for index in self._small]
            lengths = [layout.payload_bytes[index] for index in self._small]
            vectored = VectoredCopy(addresses, lengths, self._run_starts)
        devices = {device for device in self._placement.located if device is not None}
        return BatchViews(
            whole=Selection(self._whole[None]),
            targets=self._targets[None],
            cut=Selection(self._cut),
            small=Selection(self._small),
            vectored=vectored,
            away={device: self._on_device(device) for device in devices},
        )

    def _sort(self) -> None:
        layout, structure, located = self._plan.layout, self._plan.structure, self._placement.located
        packed = {index for pack in self._placement.packs.values() for index in pack.members}
        follows_small = False
        for index in layout.tensors_between(self._start, self._stop):
            low, nbytes = layout.payload_offsets[index], layout.payload_bytes[index]
            if nbytes == 0 or index in packed:
                continue
            in_structure = self._plan.tensors[index]
            is_small = nbytes <= self._vectored_bytes and structure.strides[in_structure] is None
            # a view reaches over no end of the run: behind it lies another lease's memory
            if low < self._start or low + nbytes > self._stop:
                self._cut.append(index)
                follows_small = False
            # row-major ones alone: the kernel takes bytes as they lie
            elif is_small:
                if not follows_small:
                    self._run_starts.append(len(self._small))
                self._small.append(index)
                follows_small = True
            else:
                device = located[in_structure] if located else None
                self._whole[device].append(index)
                self._targets[device].append(self._target(index))
                follows_small = False

    def _target(self, index: int) -> torch.Tensor:
        layout, structure = self._plan.layout, self._plan.structure
        in_structure = self._plan.tensors[index]
        dtype, shape = structure.dtypes[in_structure], structure.shapes[in_structure]
        offset = (self._lease.offset + layout.payload_offsets[index] - self._start) // dtype.itemsize
        # one call instead of slice, view and view: a quarter of the time
        return self._lease.arena.typed(dtype).as_strided(shape, contiguous_strides(shape), offset)

    def _on_device(self, device: torch.device) -> DeviceViews:
        pack = self._placement.packs.get(device)
        stretches = pack.pieces(self._start, self._stop) if pack is not None else []
        base = self._lease.offset - self._start
        memory = self._lease.arena.tensor
        return DeviceViews(
            whole=Selection(self._whole[device]),
            targets=self._targets[device],
            stretches=stretches,
            stretch_targets=[memory[base + piece.start : base + piece.stop] for piece in stretches],
        )
