"""Where the tensors of a run of parts go in the pool; made once per plan, run and place in the pool.

Enters: a plan, a range of its image, a lease. Leaves: BatchViews, destination views and source lists. Making
views costs more than copying small tensors, so they are kept with the slots that they lie in.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from .._geometry import contiguous_strides
from ..planning import CompiledPlan
from .buffer_pool import Arena, Lease
from .selection import Selection
from .vectored_copy import VectoredCopy

_VECTORED_BYTES = 64 * 1024
"""Up to here a tensor is copied by the kernel, many by one call."""
_KEPT_PLANS = 4
"""For how many plans views are kept: several engines may share a stager."""

_Key = tuple[int, int, int, int, bool]
"""(first part, id of the arena, first slot, number of slots, whether the kernel copies)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchViews:
    """Where the tensors of a run of parts go."""

    whole: Selection
    targets: list[torch.Tensor]
    """One per tensor of ``whole``."""
    cut: Selection
    """Tensors that reach over the run's ends."""
    small: Selection
    """Tensors that ``vectored`` copies."""
    vectored: VectoredCopy | None


@dataclass(slots=True)
class _PlanViews:
    """The views of one plan. Holding plan and arena keeps their ids from being used again."""

    plan: CompiledPlan
    batches: dict[_Key, tuple[Arena, BatchViews]] = field(default_factory=dict)


class ViewCache:
    """The views of the last few plans. For the copying thread alone."""

    def __init__(self, *, keeps: bool) -> None:
        """``keeps``: whether to keep any. A small budget deals slots out in ever new combinations, and views
        of those would only pile up."""
        self._keeps = keeps
        self._plans: OrderedDict[int, _PlanViews] = OrderedDict()

    def views(self, plan: CompiledPlan, first: int, stop: int, lease: Lease, *, vectored: bool) -> BatchViews:
        """Where the tensors go that lie in ``plan``'s image between the start of part ``first`` and byte
        ``stop``. ``vectored``: whether the kernel copies small ones."""
        known = self._plans.get(id(plan))
        key = (first, id(lease.arena), lease.first, lease.count, vectored)
        if known is not None and key in known.batches:
            # used again: the plan that goes first is the one that no save has asked for the longest
            self._plans.move_to_end(id(plan))
            return known.batches[key][1]
        start = first * lease.slot_bytes
        views = _make_views(plan, start, stop, lease, _VECTORED_BYTES if vectored else 0)
        if self._keeps:
            known = self._plans.setdefault(id(plan), _PlanViews(plan))
            # the arena is kept beside the views: its id is part of the key, and must not be used again
            known.batches[key] = (lease.arena, views)
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        return views

    def clear(self) -> None:
        """Let the arenas go."""
        self._plans.clear()


def _make_views(plan: CompiledPlan, start: int, stop: int, lease: Lease, vectored_bytes: int) -> BatchViews:
    """Where the tensors go that overlap the image's bytes [start, stop); row-major ones of up to
    ``vectored_bytes`` are left to the kernel."""
    layout, structure = plan.layout, plan.structure
    whole: list[int] = []
    targets: list[torch.Tensor] = []
    cut: list[int] = []
    small: list[int] = []
    # where a new target begins: between small tensors that follow each other lie constant bytes alone
    run_starts: list[int] = []
    follows_small = False
    for index in layout.tensors_between(start, stop):
        low, nbytes = layout.payload_offsets[index], layout.payload_bytes[index]
        if nbytes == 0:
            continue
        in_structure = plan.tensors[index]
        # a view reaches over no end of the run: behind it lies another lease's memory
        if low < start or low + nbytes > stop:
            cut.append(index)
            follows_small = False
        # row-major ones alone: the kernel takes bytes as they lie
        elif nbytes <= vectored_bytes and structure.strides[in_structure] is None:
            if not follows_small:
                run_starts.append(len(small))
            small.append(index)
            follows_small = True
        else:
            dtype, shape = structure.dtypes[in_structure], structure.shapes[in_structure]
            flat = lease.arena.typed(dtype)
            offset = (lease.offset + low - start) // dtype.itemsize
            whole.append(index)
            # one call instead of slice, view and view: a quarter of the time
            targets.append(flat.as_strided(shape, contiguous_strides(shape), offset))
            follows_small = False
    vectored = None
    if small:
        base = lease.arena.tensor.data_ptr() + lease.offset - start
        addresses = [base + layout.payload_offsets[index] for index in small]
        vectored = VectoredCopy(addresses, [layout.payload_bytes[index] for index in small], run_starts)
    return BatchViews(
        whole=Selection(whole),
        targets=targets,
        cut=Selection(cut),
        small=Selection(small),
        vectored=vectored,
    )
