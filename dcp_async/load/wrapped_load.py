"""What a load reads of tensors that are made of others (state/wrapped.py), before it touches anything.

Enters: regions of such targets, and leaves that become distributed tensors. Leaves: pairs of inner tensors to
copy, and DTensors that lie as an optimizer's parameters do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .._geometry import box_at
from ..state import Region
from .read_plan import ReadPlan


@dataclass(slots=True, kw_only=True)
class Wrapped:
    """Tensors made of others: read and compared before anything is touched, then copied."""

    regions: Mapping[str, list[Region]]
    """To be filled."""
    like: Mapping[str, DTensor]
    """Leaves that become distributed tensors -> one that lies as they shall."""
    names: list[str] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)
    """Inner tensors, and what is to be copied into them."""

    def hold(self, name: str, target: torch.Tensor, source: torch.Tensor) -> None:
        """Keep a pair until all have been read."""
        self.names.append(name)
        self.targets.append(target)
        self.sources.append(source)


def want_distributed(plan: ReadPlan, name: str, like: DTensor, values: dict[str, Any]) -> None:
    """Have ``name`` read as a distributed tensor that lies as ``like`` does."""

    def wrap(name: str, local: torch.Tensor) -> None:
        values[name] = DTensor.from_local(
            # with its index: of a mesh only the kind is known, and this thread sits on device 0
            local.to(regions[0].tensor.device),
            like.device_mesh,
            like.placements,
            run_check=False,  # a check is a collective, and a load must run none
            shape=like.shape,
            stride=like.stride(),
        )

    # each region as a tensor of its own: the wrapper around it is made once it has arrived
    regions = Region.all_of(name, like)
    for region in regions:
        plan.want_joined(name, box_at(region.offsets, region.tensor.shape), wrap)
    if not regions:
        values[name] = torch.zeros_like(like)  # nothing of it lies here
