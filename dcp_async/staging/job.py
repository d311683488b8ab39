"""What one save stages, and the runs of its parts that are on their way.

Owned by one save. Only the copying thread touches what a job holds beside its plan and its state.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..planning import CompiledPlan
from .device import Event
from .memory import Lease
from .packing import Scratch, Snapshot
from .prepared import Prepared
from .views import BatchViews, Placement
from .watch import FetchedSample


@dataclass(eq=False, slots=True, kw_only=True)
class StageJob:
    """What one save stages."""

    plan: CompiledPlan
    prepared: Prepared
    """What this rank writes."""
    items: list[bytes] = field(default_factory=list)
    """Padded items of the leaves, made by the first copy: not in the trainer's time."""
    placement: Placement | None = None
    """Who copies what; None before the first copy."""
    scratches: dict[torch.device, Scratch] = field(default_factory=dict)
    """What holds the packed tensors of each device, or will by the order of its stream."""
    taken: dict[torch.device, Snapshot] = field(default_factory=dict)
    """Those of them that the first copy filled, where ``save()`` had not."""
    sample: FetchedSample | None = None
    """What tensors on devices held at capture, to be compared with what is staged; None before the first
    copy."""
    is_stuck: bool = False
    """Whether a device was waited for in vain."""

    @property
    def is_on_device(self) -> bool:
        """Whether any of its tensors lies on an accelerator."""
        return bool(self.prepared.events)

    def give_back(self) -> None:
        """All its bytes have arrived."""
        while self.taken:
            _, snapshot = self.taken.popitem()
            snapshot.release()


@dataclass(eq=False, slots=True, kw_only=True)
class Run:
    """Consecutive parts that are copied together into the slots of a lease."""

    job: StageJob
    first: int
    """Its first part."""
    lease: Lease
    views: BatchViews
    is_last: bool
    """Whether it holds the end of the image."""
    arrivals: list[Event]
    """What devices reach once their copies into the slots are done; none: all is there."""

    @property
    def marks(self) -> list[object]:
        """Per slot, whose constant bytes it will hold."""
        return [(self.job.plan, self.first + number) for number in range(self.lease.count)]
