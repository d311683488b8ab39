"""Recorder: goes over a state once and notes, level by level, what it is built of.

Enters: a state that was just flattened, and the Statefuls that were met. Leaves: Branches, which say of
another state in a few calls in C whether it is built so, and what lies in it. Invariant: a Branch refers to
no object of the trainer's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, compress
from operator import attrgetter, call
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .containers import PLAIN_TENSORS, Kind, is_plain, is_terminal, kind_of_value
from .layouts import as_dtensor
from .stateful import FromRank

_KEYS = frozenset({str, int, bool, type(None)})
"""Types of keys that are equal only if what they are called and pickled as is."""


def _none(_: object) -> tuple[()]:
    return ()


def _its_value(marked: FromRank) -> Iterable[Any]:
    return (marked.value,)


_VALUES: dict[type, Callable[[Any], Iterable[Any]]] = {
    dict: dict.values,
    OrderedDict: OrderedDict.values,
    list: iter,
}
_NAMES: dict[type, Callable[[Any], Iterable[Any]]] = {dict: iter, OrderedDict: iter, list: _none}


class UncacheableError(Exception):
    """The state holds what can't be compared in C."""


@dataclass(slots=True)
class _Level:
    """All containers of one depth, in the order of the state, and what lies in them."""

    values: list[Callable[[Any], Iterable[Any]]] = field(default_factory=list)
    names: list[Callable[[Any], Iterable[Any]]] = field(default_factory=list)
    sizers: list[Callable[[Any], int]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """How many values each has; of what is FromRank, whose it is."""
    keys: list[Any] = field(default_factory=list)
    key_types: list[type] = field(default_factory=list)
    types: list[type] = field(default_factory=list)
    inner: bytearray = field(default_factory=bytearray)
    """Per value, 1 if it is a container of the next level."""


@dataclass(slots=True)
class Branch:
    """A state or what a Stateful gave, down to the next Statefuls."""

    kind: type
    levels: list[_Level] = field(default_factory=list)
    statefuls: list[tuple[int, int, str, Branch]] = field(default_factory=list)
    """(depth, place in its level, name, branch) in the order of the state."""
    order: list[int] = field(default_factory=list)
    """Which of them is asked first, and so on."""

    def level(self, depth: int) -> _Level:
        if depth == len(self.levels):
            self.levels.append(_Level())
        return self.levels[depth]

    def starts(self) -> list[int]:
        """Where each level begins in what ``values`` gives."""
        starts, end = [], 0
        for level in self.levels:
            starts.append(end)
            end += len(level.types)
        return [*starts, end]

    def values(self, root: Any) -> list[Any] | None:
        """Everything that lies in ``root``, level by level; None if it is built in another way."""
        if type(root) is not self.kind:
            return None
        values_met: list[Any] = []
        containers: list[Any] = [root]
        for level in self.levels:
            # lengths first: a key may have moved to the next container, and the keys in a row be the same
            if list(map(call, level.sizers, containers)) != level.sizes:
                return None
            keys = list(chain.from_iterable(map(call, level.names, containers)))
            # 1, 1.0 and True are equal as keys, but not called the same
            if list(map(type, keys)) != level.key_types or keys != level.keys:
                return None
            values = list(chain.from_iterable(map(call, level.values, containers)))
            if list(map(type, values)) != level.types:
                return None
            values_met += values
            if level is not self.levels[-1]:
                containers = list(compress(values, level.inner))
        return values_met


class Recorder:
    """Goes over a state in its own order and notes, level by level, what it is built of."""

    def __init__(self, statefuls: list[tuple[str, Any, Any]], asked: list[str], rank: int) -> None:
        """``rank``: this process's."""
        self._rank = rank
        self.tensors: list[torch.Tensor] = []
        self.tensor_marks: list[tuple[int, int, int] | int] = []
        """(branch, depth, place in its level), or the number of the DTensor whose local part it is."""
        self.dtensors: list[DTensor] = []
        self.dtensor_marks: list[tuple[int, int, int]] = []
        self.bare: list[torch.Tensor] = []
        """Local parts of which nothing is stored."""
        self._bare_numbers: list[int] = []
        self.leaves: list[Any] = []
        self.leaf_marks: list[tuple[int, int, int]] = []
        self._statefuls: Iterator[tuple[str, Any, Any]] = iter(statefuls)
        self._turn = {name: turn for turn, name in enumerate(asked)}
        self._branches: list[Branch] = []

    def branch(self, root: object) -> Branch:
        branch = Branch(type(root))
        self._branches.append(branch)
        if branch.kind not in _VALUES or (isinstance(root, list) and is_terminal(root)):
            raise UncacheableError
        self._visit(branch, len(self._branches) - 1, 0, root)
        names = [name for _, _, name, _ in branch.statefuls]
        branch.order = sorted(range(len(names)), key=lambda index: self._turn[names[index]])
        return branch

    def places(self, marks: list[tuple[int, int, int]]) -> list[int]:
        """Where these lie when the levels of all branches lie one behind the other."""
        bases: list[list[int]] = []
        end = 0
        for branch in self._branches:
            starts = branch.starts()
            bases.append([end + start for start in starts])
            end += starts[-1]
        return [bases[branch][depth] + place for branch, depth, place in marks]

    def tensor_places(self) -> list[int]:
        """Where the tensors lie, and behind them ``bare`` ones, if local parts lie behind everything else."""
        end = sum(branch.starts()[-1] for branch in self._branches)
        marks = [mark for mark in self.tensor_marks if not isinstance(mark, int)]
        places = iter(self.places(marks))
        ours = [end + mark if isinstance(mark, int) else next(places) for mark in self.tensor_marks]
        return [*ours, *(end + number for number in self._bare_numbers)]

    def _visit_dtensor(self, dtensor: DTensor, mark: tuple[int, int, int]) -> None:
        number, local = len(self.dtensors), dtensor._local_tensor
        self.dtensors.append(dtensor)
        self.dtensor_marks.append(mark)
        # as flattening does: an empty part of what is not is nothing to store
        if local.numel() or not dtensor.numel():
            self.tensors.append(local)
            self.tensor_marks.append(number)
        else:
            self.bare.append(local)
            self._bare_numbers.append(number)

    def _visit(self, branch: Branch, number: int, depth: int, container: Any) -> None:
        level = branch.level(depth)
        kind = type(container)
        if kind is FromRank:
            # of another rank's nothing is looked at
            level.values.append(_its_value if container.rank == self._rank else _none)
            level.names.append(_none)
            level.sizers.append(attrgetter("rank"))
        else:
            level.values.append(_VALUES[kind])
            level.names.append(_NAMES[kind])
            level.sizers.append(len)
        level.sizes.append(level.sizers[-1](container))
        if kind in (dict, OrderedDict):
            keys = list(container)
            types = list(map(type, keys))
            if not _KEYS.issuperset(types):
                raise UncacheableError
            level.keys += keys
            level.key_types += types
        for value in level.values[-1](container):
            mark = (number, depth, len(level.types))
            level.types.append(type(value))
            level.inner.append(0)
            match kind_of_value(value, is_own=False):
                case Kind.TENSOR if is_plain(value):
                    self.tensors.append(value)
                    self.tensor_marks.append(mark)
                case Kind.TENSOR if (dtensor := as_dtensor(value)) is not None:
                    self._visit_dtensor(dtensor, mark)
                case Kind.TENSOR if type(value) not in PLAIN_TENSORS:
                    raise UncacheableError  # what lies in a subclass is not seen from outside
                case Kind.OWN | Kind.STATEFUL:
                    name, stateful, inner = next(self._statefuls)
                    assert stateful is value
                    branch.statefuls.append((depth, mark[2], name, self.branch(inner)))
                case Kind.MAPPING | Kind.PER_RANK | Kind.FROM_RANK | Kind.LIST:
                    if type(value) not in _VALUES and type(value) is not FromRank:
                        raise UncacheableError
                    level.inner[-1] = 1
                    self._visit(branch, number, depth + 1, value)
                case Kind.TENSOR | Kind.LEAF:
                    self.leaves.append(value)
                    self.leaf_marks.append(mark)
