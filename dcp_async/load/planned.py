"""A load that somebody else has planned: regions of tensors, and leaves that he decodes himself.

Enters: an opened checkpoint, and what is wanted of it by name. Leaves: filled regions, and verified items.
Invariant: leaves are read, and all is judged by trust, before the first region is written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..catalog import Contents
from ..state import Region
from .device_writes import DeviceWrites
from .failures import LoadFailures
from .pipeline import LoadPipeline, LoadServices


async def read_planned(
    contents: Contents,
    services: LoadServices,
    *,
    tensors: Mapping[str, Sequence[Region]],
    items: Iterable[str],
    writes: DeviceWrites | None,
) -> dict[str, bytes]:
    """Fill ``tensors``, and give the item of each of ``items`` as ``torch.load`` takes it.

    Args:
        writes: what reaches regions on devices; None where there are none.
    Raises: LoadError and what derives from it. Cancellation: as for LoadPipeline.
    """
    failures = LoadFailures(contents, touched=False)
    pipeline = LoadPipeline(contents, services, failures, writes)
    with failures.explained():
        plan = pipeline.plan(tensors, (), items=items)
        # in this order: what trust refuses is refused while all regions are as they were
        await pipeline.read_leaves(plan, fresh=False)
        await pipeline.fill(plan, fresh=False)
    return plan.items
