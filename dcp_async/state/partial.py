"""A part of a state: what a load looks at that asks for some names only.

Enters: a state or its Targets, and which names are asked for. Leaves: the same objects, without those that
are none of the load's. Invariant: what is left out is neither asked, nor filled, nor called; what takes its
state whole is in it whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, Protocol

import torch

from ..formats import text_of
from .containers import Kind, kind_of_value
from .depth import MAX_DEPTH
from .stateful import AppState
from .targets import Targets


class Part(Protocol):
    """Which names are asked for."""

    def selects(self, name: str) -> bool:
        """Whether the leaf ``name`` is."""

    def touches(self, name: str) -> bool:
        """Whether something at or below ``name`` is."""

    def takes(self, name: str) -> bool:
        """Whether all at and below ``name`` is. Raises IncompatibleStateError if it is so in part."""


def part_of_state(state: Mapping[str, Any], part: Part) -> Mapping[str, Any]:
    """The containers of ``state`` without what is not asked for."""
    # what is no mapping flatten() refuses
    return _part_of_mapping("", state, part, 0) if isinstance(state, Mapping) else state


def _part_of_mapping(name: str, mapping: Mapping[Any, Any], part: Part, depth: int) -> Mapping[Any, Any]:
    made = {}
    for key, value in mapping.items():
        below = f"{name}.{text_of(key)}" if depth else text_of(key)
        kept = _part_of(below, value, part, depth + 1)
        if kept is not _NOTHING:
            made[key] = kept
    # one that can't be assigned to is refused as such
    return made if isinstance(mapping, MutableMapping) else MappingProxyType(made)


_NOTHING: Any = object()


def _part_of(name: str, value: Any, part: Part, depth: int) -> Any:
    """What of ``value`` is asked for, or _NOTHING."""
    if depth > MAX_DEPTH:
        return value  # whoever flattens the state refuses what goes deeper, or in circles, and says where
    match kind_of_value(value, is_own=False):
        case Kind.TENSOR | Kind.LEAF:
            return value if part.selects(name) else _NOTHING
        case Kind.STATEFUL if isinstance(value, (torch.nn.Module, AppState)):
            return value if part.touches(name) else _NOTHING
        case Kind.STATEFUL | Kind.OWN | Kind.PER_RANK | Kind.FROM_RANK:
            return value if part.takes(name) else _NOTHING
        case Kind.MAPPING:
            return _part_of_mapping(name, value, part, depth)
        case Kind.LIST:
            # an index is part of a name, so an empty container holds the place of what is left out
            entries = [
                _part_of(f"{name}.{index}", entry, part, depth + 1) for index, entry in enumerate(value)
            ]
            return [{} if entry is _NOTHING else entry for entry in entries]


def narrow(targets: Targets, part: Part) -> None:
    """Take out of ``targets`` what is not asked for: parts of modules, and optimizers beside them."""
    for prefix, (stateful, _) in targets.statefuls.items():
        # its groups name the parameters of its entries: one is nothing without the other
        if isinstance(stateful, AppState):
            part.takes(f"{prefix}.optim")
    targets.tensors = {name: tensor for name, tensor in targets.tensors.items() if part.selects(name)}
    targets.local = {name: regions for name, regions in targets.local.items() if part.selects(name)}
    targets.leaves = set(filter(part.selects, targets.leaves))
    targets.strict = set(filter(part.selects, targets.strict))
    targets.wholes = {name: whole for name, whole in targets.wholes.items() if part.takes(name)}
    targets.grows = {name: accepts for name, accepts in targets.grows.items() if part.touches(name)}
    targets.optimizer_states = {
        name: mapping for name, mapping in targets.optimizer_states.items() if part.touches(name)
    }
    targets.named_groups = {
        name: groups for name, groups in targets.named_groups.items() if part.touches(name)
    }
