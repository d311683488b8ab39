"""Targets that share memory: what was saved under their names must agree, or one would overwrite the other.

Enters: the regions that a load fills. Leaves: groups of them that lie in the same memory, and whether given
values can be in it together. Pure, and no target is read. Every load looks for them, so over whole lists.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import add, attrgetter, gt

import torch

from ..state import PLAIN_TENSORS, Region

_ALIGNMENT = 16
"""No element of a plain dtype is longer."""

NamedRegion = tuple[str, Region]
"""What lies in memory, under its name."""


def groups_in_memory(
    regions: Mapping[str, Iterable[Region]], gappy: Collection[str]
) -> list[list[NamedRegion]]:
    """Those that may have bytes in common, together. ``gappy``: names of tensors that are not contiguous."""
    plain = [
        (name, region)
        for name, some in regions.items()
        for region in some
        # what is sparse has no address, and a subclass answers what it likes
        if type(region.tensor) in PLAIN_TENSORS and region.tensor.layout is torch.strided
    ]
    tensors = [region.tensor for _, region in plain]
    starts = list(map(torch.Tensor.data_ptr, tensors))
    ends = list(map(add, starts, map(attrgetter("nbytes"), tensors)))
    # nbytes counts no gaps; only where there are any is a Python step per tensor paid for them
    if gappy:
        for index, (name, region) in enumerate(plain):
            if name in gappy:
                ends[index] = starts[index] + _extent(region.tensor)
    # sorted apart, starts and ends interleave strictly unless two regions overlap: no Python step for each
    first, last = sorted(starts), sorted(ends)
    if not any(map(gt, last, first[1:])):
        return []
    return _grouped(plain, starts, ends)


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from its first element to its last."""
    if not tensor.numel():
        return 0
    steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.itemsize


def _grouped(
    regions: Sequence[NamedRegion], starts: Sequence[int], ends: Sequence[int]
) -> list[list[NamedRegion]]:
    extents = [
        (str(region.tensor.device), starts[index], ends[index], index)
        for index, (_, region) in enumerate(regions)
        if starts[index] < ends[index]
    ]
    groups: list[list[int]] = []
    last_device, end = "", 0
    for device, low, high, index in sorted(extents):
        # equal addresses on two devices are two places
        if device == last_device and low < end:
            groups[-1].append(index)
            end = max(end, high)
        else:
            groups.append([index])
            last_device, end = device, high
    return [[regions[index] for index in sorted(group)] for group in groups if len(group) > 1]


def are_one_view(group: Sequence[NamedRegion]) -> bool:
    """Whether all of ``group`` are one view of one memory."""
    kinds = {
        (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), region.offsets)
        for _, region in group
        for tensor in (region.tensor,)
    }
    return len(kinds) == 1


def conflict(group: Sequence[NamedRegion], values: Sequence[torch.Tensor]) -> tuple[str, str] | None:
    """Names of two of ``group`` whose ``values``, in host memory, can't both be in the memory that they
    share."""
    tensors = [region.tensor for _, region in group]
    low = min(tensor.data_ptr() for tensor in tensors)
    # set_() counts in elements, so every view must begin at a whole one
    low -= low % _ALIGNMENT
    high = max(tensor.data_ptr() + _extent(tensor) for tensor in tensors)
    memory = torch.zeros(high - low, dtype=torch.uint8, device="cpu").untyped_storage()
    views = [
        torch.empty(0, dtype=tensor.dtype, device="cpu").set_(
            memory, (tensor.data_ptr() - low) // tensor.itemsize, tensor.shape, tensor.stride()
        )
        for tensor in tensors
    ]
    # tried out in memory of our own, laid out alike: what a later value leaves of an earlier one decides
    for index, (view, value) in enumerate(zip(views, values, strict=True)):
        view.copy_(value)
        for earlier in range(index):
            if not _same_bytes(views[earlier], values[earlier]):
                return group[earlier][0], group[index][0]
    return None


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    # as bytes, since NaN equals nothing and the two zeros equal each other
    left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(left, right)
