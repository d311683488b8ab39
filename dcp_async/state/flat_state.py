"""A state as flat lists: its leaves in one order, by the names of DCP's ``flatten_state_dict``.

Enters: what flatten.py meets in a state. Leaves: a FlatState, which refers to the live objects. Invariant:
lists that belong together stay parallel, whatever is taken out of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from .._geometry import Offsets
from ..formats import Tree
from .containers import CaptureError
from .sharding import Piece, Shard
from .stateful import FromRank, PerRank, RNGState
from .tensor_memory import is_in_bounds, lack_of_memory


class Extent(NamedTuple):
    """What one object of a state reaches over, in the order in which the state is gone over."""

    leaves: range
    """Indices into ``FlatState.order``."""
    objects: range
    """The numbers of itself and of those inside of it, which have extents too."""


@dataclass(slots=True)
class FlatState:
    """The leaves of a state, in DCP's order and by DCP's names."""

    order: list[str] = field(default_factory=list)
    """Every leaf's name, tensors included, in the order in which they are met: mappings keep that of their
    keys."""
    tensor_names: list[str] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    shards: dict[int, Shard] = field(default_factory=dict)
    """Index of a tensor that is a piece of a distributed one -> where it lies in that."""
    bare: list[tuple[str, torch.dtype, Offsets]] = field(default_factory=list)
    """(name, dtype, global size) of distributed tensors of which nothing lies here."""
    distributed: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name -> distributed tensor."""
    pieces: dict[str, Piece] = field(default_factory=dict)
    """Name of a leaf that is a piece of a distributed tensor -> where it lies in that."""
    kept: list[int] = field(default_factory=list)
    """Which of the tensors ``separate_ties`` has left, if there were ties."""
    ties: list[tuple[str, int]] = field(default_factory=list)
    """(name, index of the tensor that has the same bytes) of tensors that occur again; filled by
    ``separate_ties``."""
    leaf_names: list[str] = field(default_factory=list)
    leaves: list[Any] = field(default_factory=list)
    """Everything that is no plain tensor: pickled."""
    containers: list[tuple[str, str, int, int]] = field(default_factory=list)
    """(prefix, kind, size, leaves before it) of each container: with the names this is the whole
    structure."""
    odd_keys: list[tuple[str, bytes]] = field(default_factory=list)
    """Mapping keys that are no str: (name below the key, what tells it from another of that name)."""
    optimizers: list[Optimizer] = field(default_factory=list)
    statefuls: list[tuple[str, Any, Any]] = field(default_factory=list)
    """(prefix, the Stateful, what its state_dict() gave, or UNASKED)."""
    rank: int = 0
    """This process's, for what is PerRank."""
    per_rank: dict[str, PerRank] = field(default_factory=dict)
    from_rank: dict[str, FromRank] = field(default_factory=dict)
    own: dict[str, RNGState] = field(default_factory=dict)
    """Name -> what is each rank's own by itself."""
    extents: dict[str, Extent] = field(default_factory=dict)
    """What lies inside of a Stateful and of what is PerRank: names alone do not tell, since keys may have
    dots."""
    same_name: str = ""
    """A name that two objects have which do not lie in each other."""
    asked: list[str] = field(default_factory=list)
    """Names of the Statefuls in the order in which they were asked."""
    tree: Tree = None
    """The containers, for the manifest."""

    def ambiguous_name(self) -> str:
        """A name that an object has and something outside of it as well; empty if there is none."""
        if self.same_name:
            return self.same_name
        names = set(self.order) if self.extents else set()
        for name, extent in self.extents.items():
            inside = self.order[extent.leaves.start : extent.leaves.stop]
            # an object whose whole state is a leaf shares its name with that
            if name in names and (name not in inside or self.order.count(name) > 1):
                return name
        return ""

    def shapes(self) -> list[torch.Size]:
        """The shapes of ``tensors``; nested ones, which have none, become leaves."""
        try:
            return [tensor.shape for tensor in self.tensors]
        except RuntimeError:  # asking each tensor before would be felt
            # they have no shape to be cut by, so they are stored as leaves
            self._demote_nested()
            return [tensor.shape for tensor in self.tensors]

    def _demote_nested(self) -> None:
        nested = [index for index, tensor in enumerate(self.tensors) if tensor.is_nested]
        self.leaf_names += [self.tensor_names[index] for index in nested]
        self.leaves += [self.tensors[index] for index in nested]
        self._keep(sorted(set(range(len(self.tensors))) - set(nested)))

    def _keep(self, indices: list[int]) -> None:
        """Forget all tensors but these."""
        # by index, so they move with their tensors
        self.shards = {new: self.shards[old] for new, old in enumerate(indices) if old in self.shards}
        self.tensor_names = [self.tensor_names[index] for index in indices]
        self.tensors = [self.tensors[index] for index in indices]

    def addresses(self) -> list[int]:
        """Where each tensor lies. Raises CaptureError for one that has no memory at all."""
        try:
            # one call in C: a Python step per tensor would be felt in the stall
            return list(map(torch.Tensor.data_ptr, self.tensors))
        except RuntimeError:  # it only looks like a plain tensor, as inside of a vmap
            self._refuse_without_memory()
            raise

    def check_memory(self, shapes: Sequence[torch.Size]) -> None:
        """Raises CaptureError for a tensor whose memory ends before its last element: copying it would read
        what is not its own."""
        if not is_in_bounds(self.tensors, shapes):
            self._refuse_without_memory()

    def _refuse_without_memory(self) -> None:
        for name, tensor in zip(self.tensor_names, self.tensors, strict=True):
            if (lack := lack_of_memory(tensor)) is not None:
                raise CaptureError(f"{name}: {lack}")

    def separate_ties(self, addresses: Sequence[int]) -> bool:
        """Keep one of each group of tensors that are the same view of the same memory: it is stored once.

        Says whether there were any.
        """
        # most states have no ties, and this runs in C
        if len(set(addresses)) == len(addresses):
            return False
        first: dict[tuple[Any, ...], int] = {}
        kept: list[int] = []
        for number, tensor in enumerate(self.tensors):
            # an empty tensor has no memory to share
            memory = addresses[number] if tensor.numel() else id(tensor)
            lazy = (tensor.is_conj(), tensor.is_neg())
            # items are row-major: a transposed view of the same memory has other bytes there
            shape = (tensor.shape, tensor.stride(), self.shards.get(number))
            index = first.setdefault((tensor.device, memory, tensor.dtype, lazy, shape), len(kept))
            if index == len(kept):
                kept.append(number)
            else:
                self.ties.append((self.tensor_names[number], index))
        self._keep(kept)
        self.kept = kept
        return bool(self.ties)
