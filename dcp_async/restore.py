"""restore(): hands what was read back to the trainer's objects.

Enters: the caller's state, its Targets, values of leaves. Leaves: nothing; Statefuls got ``load_state_dict``,
other leaves were replaced in the mapping that the caller passed. Runs in the caller's thread and in one
piece.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Container, Mapping
from typing import Any

import torch

from .formats.structure import text_of
from .materialise import below, materialise
from .optimizer_load import load_optimizer
from .state import Targets
from .stateful import AppState, PerRank


def restore(
    state: Mapping[str, Any],
    targets: Targets,
    values: Mapping[str, Any],
    extra: Mapping[str, Mapping[Any, Any]],
    replaced: Mapping[str, Collection[str]],
    resized: Collection[str],
    *,
    strict: bool = True,
    exact: bool = True,
) -> None:
    """Hand what was read back to ``state``; runs in the caller's thread.

    Args:
        values: name -> new value of a leaf or of a tensor on the meta device (others were filled in place).
        extra: name of an open mapping -> what it takes in addition.
        replaced: name of an optimizer's mapping -> names of the entries that stay; others go.
        resized: names of what is PerRank and was saved by another number of ranks.
        strict: whether what does not fit is an error.
        exact: whether an optimizer's entries keep their saved dtypes.
    """
    # first of all: an optimizer casts its state to the device that it finds its parameters on
    for prefix, stateful, _ in targets.walk.statefuls:
        if isinstance(stateful, AppState):
            materialise(stateful.model, below(f"{prefix}.model", values))
        elif isinstance(stateful, torch.nn.Module):
            materialise(stateful, below(prefix, values))
    captured = {id(stateful): inner for _, stateful, inner in targets.walk.statefuls}

    def merged(name: str, value: Any) -> Any:
        """``value`` with its leaves replaced; containers that change are copied, the trainer's own stay as
        they are."""
        if name in values:
            return values[name]
        if id(value) in captured:  # one inside of another's state: it takes its own
            give(value, name)
            return value
        if isinstance(value, Mapping):
            updates = {key: merged(f"{name}.{key}", entry) for key, entry in value.items()}
            changed = {key: entry for key, entry in updates.items() if entry is not value[key]}
            changed |= extra.get(name, {})
            stay = replaced.get(name)
            gone = [key for key in value if f"{name}.{key}" not in stay] if stay is not None else []
            if not changed and not gone:
                return value
            # a copy of another mapping might share what is inside of it
            made = copy.copy(value) if isinstance(value, dict) else dict(value)
            for key in gone:
                del made[key]
            for key, entry in changed.items():  # not update(): a Counter would add
                made[key] = entry
            return made
        if isinstance(value, list):
            entries = [merged(f"{name}.{index}", entry) for index, entry in enumerate(value)]
            return entries if any(new is not old for new, old in zip(entries, value, strict=True)) else value
        return value

    def give(stateful: Any, name: str) -> None:
        inner = captured[id(stateful)]
        saved = merged(name, inner)
        if isinstance(stateful, AppState):
            stateful._restore(saved, strict=strict, exact=exact)
        elif isinstance(stateful, torch.optim.Optimizer):
            load_optimizer(stateful, saved, exact=exact)
        else:
            stateful.load_state_dict(saved)
        if _left_meta(name, inner, values) and (left := _left_meta(name, stateful.state_dict(), values)):
            # torch's load_state_dict() fills nothing there, and only warns
            raise ValueError(
                f"{left[0]} is still on the meta device after {type(stateful).__name__}.load_state_dict(); "
                "put the module itself or an AppState into the state, or use to_empty() first"
            )

    def hand_back(container: Any, key: Any, name: str) -> None:
        value = container[key]
        if name in values:
            container[key] = values[name]
        elif isinstance(value, torch.Tensor):
            return
        elif id(value) in captured:
            give(value, name)
        elif isinstance(value, Mapping):
            for inner_key in list(value):
                hand_back(value, inner_key, f"{name}.{inner_key}")
        elif isinstance(value, PerRank):
            hand_back_own(value, name)
        elif isinstance(value, list):
            for index in range(len(value)):
                hand_back(value, index, f"{name}.{index}")

    def hand_back_own(own: PerRank, name: str) -> None:
        if name in resized:
            assert own.on_resize is not None
            chosen = own.on_resize(list(extra[name].values()))
            if id(own.value) in captured:
                own.value.load_state_dict(chosen)
            else:
                own.value = chosen
        else:
            holder = [own.value]
            hand_back(holder, 0, f"{name}.{PerRank.key(targets.walk.rank)}")
            (own.value,) = holder

    for key in state:
        hand_back(state, key, text_of(key))


def _left_meta(name: str, value: Any, read: Container[str]) -> list[str]:
    """Names of tensors on the meta device although they were read."""
    if isinstance(value, Mapping):
        return [left for key, entry in value.items() for left in _left_meta(f"{name}.{key}", entry, read)]
    if isinstance(value, list):
        return [left for at, entry in enumerate(value) for left in _left_meta(f"{name}.{at}", entry, read)]
    return [name] if isinstance(value, torch.Tensor) and name in read and value.is_meta else []
