"""What a planner of the user's made of a state, as a Captured: tensors and bytes by DCP's names.

Enters: items, each with the value that the planner gave for it. Leaves: a Captured that may refer to the
trainer's tensors, as one of ``capture`` does. Invariant: every tensor in it lies in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._geometry import Offsets
from ..formats import Tree
from .capture import Captured, KnownStructure, Structure, exotic_leaves
from .capture_cache import CaptureCache
from .containers import CaptureError, is_plain
from .leaves import LeafPickler
from .sharding import Piece, Shard
from .tensor_memory import lack_of_memory


@dataclass(frozen=True, slots=True)
class ResolvedItem:
    """One item of a plan, and its value."""

    name: str
    offsets: Offsets
    """Where the tensor begins in the whole; empty of bytes."""
    size: Offsets
    """The whole tensor's."""
    value: torch.Tensor | bytes


def captured_items(items: Sequence[ResolvedItem], tree: Tree) -> Captured:
    """A Captured of ``items``, whose names are unique but for the pieces of one tensor. ``tree``: the
    containers that they lie in, as far as that is known. Raises CaptureError."""
    sorted_items = _SortedItems()
    for item in items:
        sorted_items.add(item)
    tensors = sorted_items.tensors
    is_raw = not any(map(torch.Tensor.is_neg, tensors)) and not any(map(torch.Tensor.is_conj, tensors))
    return Captured(
        # a cache of its own: a planner may make something else of the next state
        known=KnownStructure(sorted_items.structure(), CaptureCache()),
        tree=tree,
        tensors=tensors,
        leaf_items=sorted_items.leaf_items,
        optimizers=[],
        live=sorted_items.exotic,
        dtensors={},
        # a copy of bytes by address would leave out what a conjugate or a negative view does to them
        pointers=list(map(torch.Tensor.data_ptr, tensors)) if is_raw else None,
    )


class _SortedItems:
    """Items by how they are stored."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.leaf_items: list[bytes] = []
        self.exotic: dict[str, torch.Tensor] = {}
        """Name of a leaf -> the tensor that it is."""
        self._names: list[str] = []
        self._leaf_names: list[str] = []
        self._shards: dict[int, Shard] = {}
        self._pieces: dict[str, Piece] = {}
        self._pickler = LeafPickler(None)

    def add(self, item: ResolvedItem) -> None:
        """Raises CaptureError."""
        value = item.value
        if isinstance(value, bytes):
            self._leaf_names.append(item.name)
            self.leaf_items.append(value)
            return
        shard = Shard(item.size, item.offsets) if tuple(value.shape) != item.size else None
        if not is_plain(value):
            self._add_exotic(item.name, value, shard)
            return
        # staging copies by address: where a storage was freed it would read foreign memory
        if (lack := lack_of_memory(value)) is not None:
            raise CaptureError(f"{item.name}: {lack}")
        if shard is not None:
            self._shards[len(self.tensors)] = shard
        self._names.append(item.name)
        self.tensors.append(value)

    def _add_exotic(self, name: str, value: torch.Tensor, shard: Shard | None) -> None:
        """Sparse, quantized or a subclass: it has no bytes that could be cut, and is an item of
        torch.save's."""
        leaf = name
        if shard is not None:
            piece = Piece(name, shard)
            leaf = piece.leaf
            self._pieces[leaf] = piece
        self._leaf_names.append(leaf)
        self.leaf_items.append(self._pickler.item(name, value))
        self.exotic[leaf] = value

    def structure(self) -> Structure:
        return Structure(
            order=[*self._names, *self._leaf_names],
            tensor_names=self._names,
            dtypes=[tensor.dtype for tensor in self.tensors],
            shapes=[tensor.shape for tensor in self.tensors],
            strides=[None if tensor.is_contiguous() else tensor.stride() for tensor in self.tensors],
            leaf_names=self._leaf_names,
            exotic=exotic_leaves([self.exotic.get(name) for name in self._leaf_names]),
            containers=[],
            odd_keys=[],
            ties=[],
            shards=self._shards,
            bare=[],
            pieces=self._pieces,
        )
