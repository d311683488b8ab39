"""How often tensors were changed, as autograd counts: of themselves, and of what wraps them.

Enters: tensors, DTensors, tensors of subclasses. Leaves: counters, to be compared with what they are later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .sharding import is_known_to_autograd, is_sharded


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    """How often each tensor was changed, as autograd counts; None for inference tensors, which it ignores."""
    try:
        return list(map(attrgetter("_version"), tensors))
    except RuntimeError:  # asking each inference tensor what it is would be felt
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def version_of(tensor: torch.Tensor) -> int | None:
    """How often a tensor of any kind was changed; None where nobody counts."""
    # to ask a ShardedTensor raises
    if not is_known_to_autograd(tensor):
        return None
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode
        return None


def layers_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """``tensor``, and the tensors that it is made of, outermost first: an operation counts on the outermost
    that it was called with."""
    yield tensor
    if isinstance(tensor, DTensor):
        yield from layers_of(tensor._local_tensor)
        return
    if hasattr(type(tensor), "__tensor_flatten__"):
        whole: Any = tensor
        names, _ = whole.__tensor_flatten__()
        for name in names:
            yield from layers_of(getattr(tensor, name))


def wrappers_in(live: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Those of a state's leaves and distributed tensors that wrap what is captured under their name."""
    return {
        name: value for name, value in live.items() if isinstance(value, torch.Tensor) and is_sharded(value)
    }
