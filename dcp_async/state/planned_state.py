"""A state that a LoadPlanner reads into: shown to it as DCP does, then handed back to the trainer.

Enters: the caller's state. Leaves: nested containers with a ``state_dict()`` in place of each Stateful, which
the planner changes as it likes; after it, each Stateful's ``load_state_dict`` with what stands there, other
leaves in the caller's containers. Runs in the caller's thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .._foreign import user_code
from ..formats import Tree, build, children_of, kind_of, text_of
from .asking import Given, ask_in_order, snapshot_to_fill
from .containers import Kind, kind_of_value
from .flatten import flatten
from .stateful import PerRank


class PlannedState:
    """One state.

    Attributes:
        nested: what the planner is shown.
        tensors: what of it lies in memory of the trainer's.
        at: the name of what is handed back.
    """

    def __init__(self, state: Mapping[str, Any], *, rank: int, world_size: int) -> None:
        """Raises CaptureError."""
        given: Given = {}
        # alone, they are asked as the walk meets them: there is no order to keep
        if world_size > 1:
            ask_in_order(state, rank, given, snapshot_to_fill, is_load=True)
        flat = flatten(state, rank, given, ask=snapshot_to_fill, is_load=True)
        values = dict(zip(flat.tensor_names, flat.tensors, strict=True)) | flat.distributed
        values |= {
            name: leaf
            for name, leaf in zip(flat.leaf_names, flat.leaves, strict=True)
            if name not in flat.pieces
        }
        self.tensors = flat.tensors
        self._tree = flat.tree
        self._rank_key = PerRank.key(rank)
        self._is_alone = world_size == 1
        nested = build(flat.tree, values.__getitem__, _as_it_is)
        # as stock has it, so that all ranks come to what they share in one order
        self.nested: dict[str, Any] = {key: nested[key] for key in sorted(nested)}
        self.at = "the state"

    def restore(self, state: Any) -> None:
        """Hand back what stands in ``nested`` to ``state``."""
        _rejoin(self._tree, self.nested)
        self._hand_back_entries(state, self.nested, "")

    def _hand_back_entries(self, container: Any, new: Any, above: str) -> None:
        keys: Iterable[Any] = new if isinstance(new, Mapping) else range(min(len(container), len(new)))
        # one order on all ranks: a load_state_dict() may run collectives
        for key in keys if self._is_alone else sorted(keys, key=text_of):
            name = f"{above}.{text_of(key)}" if above else text_of(key)
            if isinstance(new, Mapping) and key not in container:
                container[key] = new[key]
            else:
                self._hand_back(container, key, new[key], name)

    def _hand_back(self, container: Any, key: Any, new: Any, name: str, *, is_own: bool = False) -> None:
        self.at = name
        value = container[key]
        match kind_of_value(value, is_own=is_own):
            case Kind.STATEFUL:
                self._give(value, new, name)
            case Kind.OWN:
                self._give(value, new[self._rank_key], name)
            case Kind.PER_RANK:
                # as if it lay in a list: what is handed back may be another object, and has to be put here
                holder = [value.value]
                self._hand_back(holder, 0, new[self._rank_key], name, is_own=True)
                (value.value,) = holder
            case Kind.FROM_RANK:
                holder = [value.value]
                self._hand_back(holder, 0, new, name, is_own=True)
                (value.value,) = holder
            case Kind.MAPPING | Kind.LIST:
                self._hand_back_entries(value, new, name)
            case Kind.TENSOR | Kind.LEAF:
                if new is not value:  # filled in place, or left as it is
                    container[key] = new

    def _give(self, stateful: Any, new: Any, name: str) -> None:
        with user_code("load_state_dict", stateful, name):
            stateful.load_state_dict(new)


def _as_it_is(key: Any) -> Any:
    return key


def _rejoin(node: Tree, value: Any) -> None:
    """DCP's planners know every key as text: what they put beside a key of another type belongs to that."""
    if kind_of(node) != "list" and isinstance(value, dict):
        for key, _ in children_of(node):
            if type(key) is not str and (text := str(key)) in value:
                value[key] = value.pop(text)
    for key, child in children_of(node):
        if child is not None and isinstance(value, (dict, list)):
            _rejoin(child, value[key])
