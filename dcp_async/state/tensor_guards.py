"""Many tensors compared at once with those that were in their places: torch's own guards, in chunks.

Enters: tensors, each only once. Leaves: whether others have their types, dtypes, devices, shapes, strides and
whether they require grad. Invariant: no tensor is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # private, and the only way to look at thousands of tensors in one call
    TensorGuards = None  # type: ignore[assignment, misc]  # then each state is flattened anew

HAS_GUARDS = TensorGuards is not None

_CHUNK = 512
"""Tensors that are compared by one call; more at once miss the cache, fewer cost calls."""

Guards = list[tuple[int, int, TensorGuards]]
"""(first, end, guard of these tensors) of chunks."""


def guards_of(tensors: Sequence[torch.Tensor], *ends: int) -> Guards:
    """Guards of chunks, none of which reaches over one of ``ends``: a guard refuses an object that it
    sees twice, but several guards may see it."""
    bounds = [0, *ends, len(tensors)]
    starts = [start for low, high in pairwise(bounds) for start in range(low, high, _CHUNK)]
    return [
        (low, high, TensorGuards(*tensors[low:high], dynamic_dims_sizes=None, dynamic_dims_strides=None))
        for low, high in pairwise([*starts, len(tensors)])
    ]
