"""Restorer: hands what was read back to the trainer's objects.

Enters: the caller's state, its Targets, what was read. Leaves: nothing; Statefuls got ``load_state_dict``,
other leaves were replaced in the mapping that the caller passed. Runs in the caller's thread and in one
piece.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from .._foreign import user_code
from ..formats import text_of
from .asking import UNASKED
from .materialise import below, materialise
from .optimizers import load_optimizer, restore_app
from .stateful import AppState, FromRank, PerRank, RNGState
from .targets import Targets

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBack:
    """What was read of a checkpoint, by DCP's names, and who gets it."""

    values: Mapping[str, Any]
    """Name -> new value of a leaf, or of a tensor that was not filled in place."""
    taken: Mapping[str, Any]
    """Name -> what was saved there, for what takes it whole; objects inside of it are the state's own."""
    resized: Set[str]
    """What is PerRank and was saved by another number of ranks: taken from all of them."""
    grown: Mapping[str, Sequence[tuple[Any, str]]]
    """Mapping -> (key, name) of what is taken below it and is not there."""
    replaced: Mapping[str, Set[str]]
    """Optimizers' mappings whose other entries go: mapping -> names of the entries that were saved."""
    absent: Set[str]
    """Statefuls of which nothing was saved: they are not called."""


class Restorer:
    """One restoration. A Stateful gets all that was saved of it, and is not called where nothing was; modules
    and optimizers get what they have, with what was read in it."""

    def __init__(self, targets: Targets, read: ReadBack, *, strict: bool, exact: bool) -> None:
        """
        Args:
            strict: whether what does not fit is an error.
            exact: whether an optimizer's entries keep their saved dtypes.
        """
        self._strict = strict
        self._exact = exact
        self._targets = targets
        self._values = read.values
        self._taken = read.taken
        self._read = read
        self.at = "the state"
        """The name of what is handed back."""
        self._done: set[str] = set()
        """Names of Statefuls that have theirs."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Hand what was read back to ``state``."""
        # first of all: an optimizer casts its state to the device that it finds its parameters on
        for prefix, (stateful, _) in self._targets.statefuls.items():
            self.at = prefix
            if isinstance(stateful, AppState):
                materialise(stateful.model, below(f"{prefix}.model", self._values))
            elif isinstance(stateful, torch.nn.Module):
                materialise(stateful, below(prefix, self._values))
        for key in self._in_order(state):
            self._hand_back(state, key, text_of(key))

    def _in_order(self, keys: Iterable[Any]) -> list[Any]:
        """One order on all ranks: a ``load_state_dict()`` may run collectives."""
        if self._targets.world_size == 1:
            return list(keys)
        return sorted(keys, key=lambda key: text_of(key).split("."))

    def _hand_back(self, container: Any, key: Any, name: str) -> None:
        self.at = name
        value = container[key]
        if isinstance(value, FromRank):  # first: it stays, whatever was read under its name
            holder = [value.value]
            self._hand_back(holder, 0, name)
            (value.value,) = holder
        elif name in self._targets.statefuls:
            self._give(name)
        elif name in self._values:
            container[key] = self._values[name]
        elif isinstance(value, torch.Tensor):
            return  # it was filled in place
        elif name in self._targets.flat.own:
            self._give_own(value, name)
        elif isinstance(value, Mapping):
            for inner_key in self._in_order(value):
                self._hand_back(value, inner_key, f"{name}.{text_of(inner_key)}")
        elif isinstance(value, PerRank):
            self._hand_back_own(value, name)
        elif isinstance(value, list):
            for index in range(len(value)):
                self._hand_back(value, index, f"{name}.{index}")

    def _hand_back_own(self, own: PerRank, name: str) -> None:
        inside = f"{name}.{PerRank.key(self._targets.flat.rank)}"
        # an earlier release saved generators once, for all ranks
        is_once = isinstance(own.value, RNGState) and "torch" in self._taken.get(name, ())
        if name in self._read.resized and (own.on_resize is None or is_once):
            self._give_own(own.value, name)
        elif name in self._read.resized:
            assert own.on_resize is not None
            with user_code("on_resize", own, name):
                chosen = own.on_resize(list(self._taken[name].values()))
            if inside in self._targets.statefuls:
                own.value.load_state_dict(chosen)
            else:
                own.value = chosen
        else:
            # something to assign into: what is PerRank may be a leaf, and gets replaced
            holder = [own.value]
            self._hand_back(holder, 0, inside)
            (own.value,) = holder

    def _give_own(self, own: Any, name: str) -> None:
        """What is each rank's own by itself."""
        rank = self._targets.flat.rank
        if name not in self._read.resized:
            self._give(f"{name}.{PerRank.key(rank)}")
        elif name in self._taken:
            own.load_state_dict(self._taken[name])
        else:
            logger.warning(
                "%s: the checkpoint was saved by fewer ranks and holds nothing for rank %d, which keeps its "
                "random number generators as they are; PerRank(RNGState(), on_resize=...) says what it takes",
                *(name, rank),
            )

    def _give(self, name: str) -> None:
        """Give the Stateful at ``name`` its state, after those that lie inside of that."""
        if name in self._done:
            return
        self._done.add(name)
        stateful, inner = self._targets.statefuls[name]
        inside = f"{name}."
        # inner ones first: a load_state_dict() may use the objects that are in its state
        for other in self._in_order(other for other in self._targets.statefuls if other.startswith(inside)):
            self._give(other)
        if name in self._read.absent:
            return
        self.at = name
        saved = self._merged(name, inner)
        with user_code("load_state_dict", stateful, name):
            if isinstance(stateful, AppState):
                restore_app(stateful, saved, strict=self._strict, exact=self._exact)
            elif isinstance(stateful, torch.optim.Optimizer):
                load_optimizer(stateful, saved, exact=self._exact)
            else:
                stateful.load_state_dict(saved)
        if inner is UNASKED or not _left_meta(name, inner, self._values):
            return
        # asked a second time only where it showed meta tensors: being asked may change an object
        if left := _left_meta(name, stateful.state_dict(), self._values):
            # torch's load_state_dict() fills nothing there, and only warns
            raise ValueError(
                f"{left[0]} is still on the meta device after {type(stateful).__name__}.load_state_dict(); "
                "put the module itself or an AppState into the state, or use to_empty() first"
            )

    def _merged(self, name: str, value: Any) -> Any:
        """``value`` with what was read; containers that change are copied, the trainer's own stay as they
        are."""
        if isinstance(value, FromRank):
            return self._merged(name, value.value)
        # an object that lies inside of the state has its own by now, and goes back as it is
        if name in self._done and value is self._targets.statefuls[name][0]:
            return value
        whole = self._targets.wholes.get(name)
        if name in self._taken and not (whole is not None and whole.keeps and isinstance(value, Mapping)):
            return self._taken[name]
        if name in self._values:
            return self._values[name]
        if isinstance(value, Mapping):
            return self._merged_mapping(name, value)
        if isinstance(value, list):
            entries = [self._merged(f"{name}.{index}", entry) for index, entry in enumerate(value)]
            return entries if any(new is not old for new, old in zip(entries, value, strict=True)) else value
        return value

    def _merged_mapping(self, name: str, value: Mapping[Any, Any]) -> Mapping[Any, Any]:
        if name in self._taken:  # what was not saved stays
            changed = dict(self._taken[name])
        else:
            updates = {key: self._merged(f"{name}.{text_of(key)}", entry) for key, entry in value.items()}
            changed = {key: entry for key, entry in updates.items() if entry is not value[key]}
            for key, inside in self._read.grown.get(name, ()):
                changed[self._optimizer_key(name, key)] = self._taken[inside]
        stay = self._read.replaced.get(name)
        gone = [key for key in value if f"{name}.{text_of(key)}" not in stay] if stay is not None else []
        if not changed and not gone:
            return value
        # a copy of another mapping might share what is inside of it
        made = copy.copy(value) if isinstance(value, dict) else dict(value)
        for key in gone:
            del made[key]
        for key, entry in changed.items():  # not update(): a Counter would add
            made[key] = entry
        return made

    def _optimizer_key(self, name: str, key: Any) -> Any:
        """Stock turns an optimizer's parameter numbers into text."""
        mapping = self._targets.optimizer_states.get(name)
        owned = mapping is not None and issubclass(mapping.owner, torch.optim.Optimizer)
        return int(key) if owned and isinstance(key, str) and key.isdigit() else key


def _left_meta(name: str, value: Any, read: Container[str]) -> list[str]:
    """Names of tensors on the meta device although they were read."""
    if isinstance(value, Mapping):
        return [
            left for key, entry in value.items() for left in _left_meta(f"{name}.{text_of(key)}", entry, read)
        ]
    if isinstance(value, list):
        return [
            left for index, entry in enumerate(value) for left in _left_meta(f"{name}.{index}", entry, read)
        ]
    return [name] if isinstance(value, torch.Tensor) and name in read and value.is_meta else []
