"""Plain tensors that say of themselves which part of a larger one they hold: torch's CheckpointableTensor.

Enters: a tensor of any kind. Leaves: whether it carries the protocol, and if so its global size and its
pieces. Invariant: what carries it here is what stock of this torch takes for one: nothing before 2.14.1,
where the four attributes mean nothing. Asking many tensors at once costs no Python step for each.
Source: torch/distributed/checkpoint/protocol.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import index
from typing import Any

import torch

try:
    from torch.distributed.checkpoint import protocol as _protocol  # type: ignore[attr-defined, unused-ignore]
except ImportError:
    _protocol = None
HAS_PROTOCOL = _protocol is not None
"""Whether stock of this torch knows it."""

_FIELD = "global_offsets"
"""One of the protocol's attributes, the one whose name nothing else is likely to have."""
_FIELDS = ("global_shape", "global_offsets", "local_offsets", "local_sizes")

Numbers = tuple[int, ...]


def is_checkpointable(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` carries the protocol."""
    # hasattr() first: nearly no tensor needs stock's own check, which is Python
    return _protocol is not None and hasattr(tensor, _FIELD) and _protocol._is_checkpointable_tensor(tensor)


def any_checkpointable(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether one of ``tensors`` may carry the protocol."""
    # in C: every save asks all tensors, since guards do not see attributes (docs/adr/0014)
    return _protocol is not None and any(map(hasattr, tensors, repeat(_FIELD)))


def global_size(tensor: torch.Tensor) -> torch.Size:
    """The size of what ``tensor`` is, or is a part of."""
    if is_checkpointable(tensor):
        carrier: Any = tensor
        return torch.Size(_numbers(carrier.global_shape))
    return tensor.shape


def local_pieces(tensor: torch.Tensor) -> tuple[Numbers, list[tuple[Numbers, torch.Tensor]]]:
    """(global size, [(offsets, what lies there)]) of a tensor that carries the protocol. The pieces are views
    without the attributes. Raises ValueError for attributes that make no sense."""
    assert _protocol is not None
    carrier: Any = tensor
    try:
        chunks = _protocol._get_checkpointable_tensor_chunks(carrier)  # which checks them
        size = _numbers(carrier.global_shape)
        places = [_numbers(chunk.offsets) for chunk in chunks]
        boxes = [
            tuple(slice(offset, offset + extent) for offset, extent in zip(start, chunk.sizes, strict=True))
            for start, chunk in zip(map(_numbers, carrier.local_offsets), chunks, strict=True)
        ]
    except (TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"its {', '.join(_FIELDS)} can't be read ({error})") from error
    # stock knows an item by name and offsets: the second piece would take the place of the first
    if len(set(places)) < len(places):
        raise ValueError(f"its global_offsets name {max(places, key=places.count)} twice")
    bare = tensor.detach()  # shares memory and version, and is known to no graph
    return size, [
        (place, bare[box].requires_grad_(tensor.requires_grad))
        for place, box in zip(places, boxes, strict=True)
    ]


def empty_like(tensor: torch.Tensor, dtype: torch.dtype, made: torch.Tensor | None = None) -> torch.Tensor:
    """An empty tensor of the same part of a larger one. ``made``: what it shall be, else memory is asked
    for."""
    made = torch.empty_like(tensor, dtype=dtype) if made is None else made
    if is_checkpointable(tensor):
        for field in _FIELDS:
            setattr(made, field, getattr(tensor, field))
    return made


def _numbers(values: Sequence[int]) -> Numbers:
    return tuple(map(index, values))
