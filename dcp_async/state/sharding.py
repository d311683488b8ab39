"""What of a distributed tensor lies on this rank, be it a DTensor, a ShardedTensor, or one with DCP's own
hooks or protocol.

Enters: a tensor that represents more than its local memory. Leaves: its global size and, per local piece,
where that piece begins in the whole. Invariant: nothing is gathered, no collective runs.
Source: torch/distributed/checkpoint/planner_helpers.py (the hooks), torch/distributed/tensor/_utils.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .._geometry import Offsets
from .checkpointable import is_checkpointable, local_pieces


@dataclass(frozen=True, slots=True)
class Shard:
    """Where a local tensor lies in a global one."""

    size: Offsets
    """The global tensor's."""
    offsets: Offsets
    """Where the local tensor's first element lies."""


@dataclass(frozen=True, slots=True)
class Sharded:
    """A distributed tensor, seen from this rank."""

    size: Offsets
    dtype: torch.dtype
    pieces: list[tuple[Shard | None, torch.Tensor]]
    """What lies here; a piece that is the whole has no Shard. Empty where this rank holds nothing of it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A local tensor that is stored as an item of its own, not as bytes: a subclass around other tensors."""

    name: str
    """The distributed tensor's."""
    shard: Shard

    @property
    def leaf(self) -> str:
        """What its item is called: two ranks hold different ones of one tensor."""
        return f"{self.name}@{','.join(map(str, self.shard.offsets))}"


class PartialError(ValueError):
    """A tensor whose ranks hold summands, not pieces, has no bytes to save."""


LayoutCache = dict[Any, Offsets]
"""Offsets per (mesh, placements, shape): many tensors share a layout, and computing one costs 50 us."""


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` stands for more than its own memory."""
    kind = type(tensor)
    return (
        kind is DTensor
        or isinstance(tensor, ShardedTensor)
        or hasattr(kind, "__create_chunk_list__")
        or is_checkpointable(tensor)
    )


def is_known_to_autograd(tensor: torch.Tensor) -> bool:
    """Whether it has a version of its own; a ShardedTensor refuses to be asked."""
    return not isinstance(tensor, ShardedTensor)


def sharded(name: str, tensor: torch.Tensor, cache: LayoutCache) -> Sharded:
    """This rank's pieces of ``tensor``. Raises PartialError."""
    size = tuple(tensor.size())
    pieces: list[tuple[Shard, torch.Tensor]]
    if isinstance(tensor, ShardedTensor):
        pieces = [
            (Shard(size, tuple(shard.metadata.shard_offsets)), shard.tensor)
            for shard in tensor.local_shards()
        ]
    elif not hasattr(type(tensor), "__create_chunk_list__") and is_checkpointable(tensor):
        size, places = local_pieces(tensor)
        pieces = [(Shard(size, offsets), local) for offsets, local in places]
    # DTensor's own hook computes the layout each time, and gives way to hooks of its local tensor
    elif type(tensor) is DTensor and not hasattr(tensor._local_tensor, "__create_chunk_list__"):
        pieces = _dtensor_pieces(size, tensor, cache)
    else:
        hooks: Any = tensor
        pieces = []
        for number, chunk in enumerate(hooks.__create_chunk_list__()):
            index = MetadataIndex(name, chunk.offsets, number)
            local = hooks.__get_tensor_shard__(index)
            # a hook may hand over more than the chunk that it names
            if tuple(local.shape) != tuple(chunk.sizes):
                raise ValueError(
                    f"its chunk at {tuple(chunk.offsets)} has {tuple(chunk.sizes)} elements in "
                    f"__create_chunk_list__() and {tuple(local.shape)} in __get_tensor_shard__()"
                )
            pieces.append((Shard(size, tuple(chunk.offsets)), local))
    return Sharded(
        size,
        tensor.dtype,
        [
            # a piece that is the whole is written like a plain tensor
            (None if tuple(local.shape) == size else shard, local)
            for shard, local in pieces
            # an empty shard is nothing to store, but a tensor without elements must be there at the load
            if local.numel() or not torch.Size(size).numel() > 0
        ],
    )


def _dtensor_pieces(size: Offsets, tensor: DTensor, cache: LayoutCache) -> list[tuple[Shard, torch.Tensor]]:
    mesh, placements = tensor.device_mesh, tensor.placements
    key = (mesh, placements, size)
    offsets = cache.get(key)
    if offsets is None:
        # once per layout: placements are part of what it is known by
        for placement in placements:
            if isinstance(placement, Partial):
                raise PartialError(
                    f"its placement {placement!r} leaves a sum to be done; redistribute() it first"
                )
        _, first = compute_local_shape_and_global_offset(size, mesh, placements)
        offsets = cache[key] = tuple(first)
    if mesh.get_coordinate() is None:
        return []  # this rank is outside of the tensor's mesh
    return [(Shard(size, offsets), tensor._local_tensor)]
