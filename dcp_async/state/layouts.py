"""DTensors of a state that is captured again: whether each is the same part of the same whole.

Enters: DTensors whose local parts are plain. Leaves: whether one has another size, mesh or placement than the
one that was in its place. Invariant: what is compared is all that the place of a local part in the whole is
computed from (sharding.py); of the DTensors nothing is kept but that. Costs no step of Python for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .containers import is_plain
from .tensor_guards import guards_of

_SPEC = attrgetter("_spec")
_LOCAL = attrgetter("_local_tensor")
_MESH = attrgetter("mesh")
_PLACEMENTS = attrgetter("placements")


def as_dtensor(tensor: torch.Tensor) -> DTensor | None:
    """``tensor`` if it is a DTensor, of no other class, around a plain tensor of this rank."""
    # exactly: a class of somebody's may have hooks of its own
    if type(tensor) is DTensor and is_plain(tensor._local_tensor):
        return tensor if tensor.device_mesh.get_coordinate() is not None else None
    return None


def as_dtensors(distributed: Mapping[str, torch.Tensor]) -> dict[str, DTensor]:
    """Those of ``distributed`` that ``as_dtensor`` takes."""
    dtensors = {name: as_dtensor(tensor) for name, tensor in distributed.items()}
    return {name: dtensor for name, dtensor in dtensors.items() if dtensor is not None}


def local_parts(dtensors: Iterable[DTensor]) -> list[torch.Tensor]:
    """What of each lies here."""
    return list(map(_LOCAL, dtensors))


class LayoutGuard:
    """The layouts of some DTensors."""

    def __init__(self, names: list[str], dtensors: Sequence[DTensor]) -> None:
        self.names = names
        self._guards = guards_of(dtensors)
        self._meshes, self._placements = _layouts(dtensors)

    @classmethod
    def of(cls, names: list[str], dtensors: Sequence[DTensor]) -> LayoutGuard | None:
        """For ``dtensors`` of these names; None where one occurs twice, which no guard takes."""
        return cls(names, dtensors) if len(set(map(id, dtensors))) == len(dtensors) else None

    def check(self, dtensors: Sequence[DTensor]) -> bool:
        """Whether each has the size, dtype, mesh and placements of the one that was in its place."""
        # size and dtype: the wrapper's own, which is all that its torch.Tensor knows of the whole
        for low, high, guard in self._guards:
            if not guard.check(*dtensors[low:high]):
                return False
        meshes, placements = _layouts(dtensors)
        # meshes by identity, as two of the same ranks may differ in what a name or a group says; placements
        # by value, since each operation makes new tuples of them
        return all(map(is_, meshes, self._meshes)) and placements == self._placements


def _layouts(dtensors: Sequence[DTensor]) -> tuple[list[Any], list[Any]]:
    specs = list(map(_SPEC, dtensors))
    return list(map(_MESH, specs)), list(map(_PLACEMENTS, specs))
