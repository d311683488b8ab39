"""CaptureCache: a state that kept its structure is gone over again list by list, in C.

Enters: a state, and what flattening it met before. Leaves: its tensors and leaves in the same order, if
nothing changed that a plan depends on; else what the Statefuls gave, so that flattening asks them no second
time. Invariant: the same answer as flattening anew, and the trainer's tensors are not kept: all that is
remembered of them are types, geometry and addresses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress
from operator import attrgetter, call, is_, itemgetter, ne, not_
from typing import Any

import torch
from torch.optim import Optimizer

from .asking import Given, snapshot
from .checkpointable import any_checkpointable, is_checkpointable
from .containers import PLAIN_TENSORS, Kind, is_plain, is_terminal, kind_of_value
from .flat_state import FlatState
from .optimizers import stepped_by
from .stateful import is_stateful
from .tensor_memory import SpotCheck, has_memory

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # private, and the only way to look at thousands of tensors in one call
    TensorGuards = None  # type: ignore[assignment, misc]  # then each state is flattened anew

_CHUNK = 512
"""Tensors that are compared by one call; more at once miss the cache, fewer cost calls."""
_is_nested = attrgetter("is_nested")
_KEYS = frozenset({str, int, bool, type(None)})
"""Types of keys that are equal only if what they are called and pickled as is."""


def _none(_: object) -> tuple[()]:
    return ()


_VALUES: dict[type, Callable[[Any], Iterable[Any]]] = {
    dict: dict.values,
    OrderedDict: OrderedDict.values,
    list: iter,
}
_NAMES: dict[type, Callable[[Any], Iterable[Any]]] = {dict: iter, OrderedDict: iter, list: _none}


class _UncacheableError(Exception):
    """The state holds what can't be compared in C."""


@dataclass(slots=True)
class _Level:
    """All containers of one depth, in the order of the state, and what lies in them."""

    values: list[Callable[[Any], Iterable[Any]]] = field(default_factory=list)
    names: list[Callable[[Any], Iterable[Any]]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)
    key_types: list[type] = field(default_factory=list)
    types: list[type] = field(default_factory=list)
    inner: bytearray = field(default_factory=bytearray)
    """Per value, 1 if it is a container of the next level."""


@dataclass(slots=True)
class _Branch:
    """A state or what a Stateful gave, down to the next Statefuls."""

    kind: type
    levels: list[_Level] = field(default_factory=list)
    statefuls: list[tuple[int, int, str, _Branch]] = field(default_factory=list)
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
            if [len(container) for container in containers] != level.sizes:
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


def _pick(places: list[int]) -> Callable[[list[Any]], list[Any]]:
    """Takes these of a list."""
    if places == list(range(len(places))):
        end = len(places)
        return lambda values: values[:end]
    if len(places) < 2:  # itemgetter of one gives no tuple
        return lambda values: [values[place] for place in places]
    getter = itemgetter(*places)
    return lambda values: list(getter(values))


@dataclass(slots=True, kw_only=True)
class CacheHit:
    """What a state holds that is built as it was."""

    tensors: list[torch.Tensor]
    """Without those that have the bytes of an earlier one."""
    leaves: list[Any]
    optimizers: list[Optimizer]
    pointers: list[int] | None
    """Address of each tensor; None unless the bytes there are its elements and the CPU reads them."""


@dataclass(slots=True)
class _Recording:
    """What a state was built of when it was flattened."""

    root: _Branch
    tensors: Callable[[list[Any]], list[Any]]
    """Those that are stored, then those that have the bytes of one of them."""
    num_stored: int
    leaves: Callable[[list[Any]], list[Any]]
    guards: list[tuple[int, int, TensorGuards]]
    pointers: tuple[list[int], list[int]]
    """Addresses of all tensors, and of those that are stored; one value, since several threads may save."""
    is_raw: bool

    def match(self, state: object, given: Given) -> CacheHit | None:
        values: list[Any] = []
        optimizers: list[Optimizer] = []
        if not self._collect(self.root, state, values, given, optimizers):
            return None
        tensors, leaves = self.tensors(values), self.leaves(values)
        # what makes a tensor a part of a larger one is an attribute, which no guard sees
        if not all(map(_is_leaf, leaves)) or any_checkpointable(tensors):
            return None
        pointers: list[int] = []
        for start, stop, guard in self.guards:  # in chunks, so that the second look finds them in the cache
            chunk = tensors[start:stop]
            # asked first: the guard ends the process where it is given a nested tensor, which has no strides
            if any(map(_is_nested, chunk)) or not guard.check(*chunk):
                return None
            pointers += map(torch.Tensor.data_ptr, chunk)
        # the same list as long as they are the same, so that what was made of it is known to be good still
        known, stored = self.pointers
        if pointers != known:
            if len(tensors) != self.num_stored or len(set(pointers)) != len(pointers):
                return None  # ties may have come or gone
            if not has_memory(list(compress(tensors, map(ne, pointers, known)))):
                return None  # flattening anew says which one has not
            self.pointers = (pointers, pointers)
            stored = pointers
        return CacheHit(
            tensors=tensors[: self.num_stored],
            leaves=leaves,
            optimizers=optimizers,
            pointers=stored if self.is_raw else None,
        )

    def _collect(
        self, branch: _Branch, root: object, collected: list[Any], given: Given, optimizers: list[Optimizer]
    ) -> bool:
        values = branch.values(root)
        if values is None:
            return False
        collected += values
        starts = branch.starts() if branch.statefuls else []
        inside_of: list[list[Any]] = [[] for _ in branch.statefuls]
        for turn in branch.order:
            depth, place, name, inside = branch.statefuls[turn]
            stateful = values[starts[depth] + place]
            optimizers += stepped_by(stateful)
            inner = snapshot(name, stateful)
            # before it is compared: after a miss flattening must not ask it once more
            given[name, id(stateful)] = (stateful, inner)
            if not self._collect(inside, inner, inside_of[turn], given, optimizers):
                return False
        collected += chain.from_iterable(inside_of)
        if branch.statefuls:  # a state_dict() may have changed what lies beside it
            again = branch.values(root)
            return again is not None and all(map(is_, values, again))
        return True


def _is_leaf(value: object) -> bool:
    """Whether a leaf of the same type as before is still one."""
    if isinstance(value, list):
        return is_terminal(value)
    if isinstance(value, tuple):
        return not any(map(is_stateful, value))
    return not (isinstance(value, torch.Tensor) and (is_plain(value) or is_checkpointable(value)))


class CaptureCache:
    """What the states of one structure have in common, found out once."""

    def __init__(self) -> None:
        self.devices: set[torch.device] | None = None
        """The accelerators on which tensors lie that are built so; None before somebody has looked."""
        self.located: list[torch.device | None] = []
        """Which of ``devices`` each tensor lies on, None for host memory; empty if there are none."""
        self.pinned: frozenset[int] = frozenset()
        """The tensors in pinned host memory, found out with ``devices``: a device may still be filling
        them."""
        self.sampled: object = None
        """Staging's, on where tensors that are built so are sampled; None before it has looked."""
        self.in_bounds: list[int] | None = None
        """Addresses of the last tensors that were found to end within their memory."""
        self._recording: _Recording | None = None
        self._spots: SpotCheck | None = None
        self._smallest: list[int] | None = None

    def look_up(self, state: object, given: Given) -> CacheHit | None:
        """What ``state`` holds if it is built as before, each tensor of the same type, dtype, shape, strides
        and device.

        Asks the Statefuls in the order in which they were asked then, and adds to ``given`` what they gave,
        also where the answer is None. Raises: CaptureError of a ``state_dict()`` that fails.
        """
        hit = self._recording.match(state, given) if self._recording is not None else None
        if hit is not None and not self._spots_in_bounds(hit.tensors):
            self.in_bounds = None  # flattening anew looks at all, and says which one has too little memory
            return None
        return hit

    def is_in_bounds(self, tensors: Sequence[torch.Tensor], addresses: list[int]) -> bool:
        """Whether nothing speaks against it that ``tensors``, at ``addresses``, end within their memory, as
        they did the last time."""
        if addresses != self.in_bounds:
            return False
        if 0 in addresses and any(map(torch.Tensor.numel, compress(tensors, map(not_, addresses)))):
            return False  # no memory; those without elements have none either
        return self._spots_in_bounds(tensors)

    def _spots_in_bounds(self, tensors: Sequence[torch.Tensor]) -> bool:
        if self._spots is None:  # once, as all tensors of one structure have the same sizes
            self._spots = SpotCheck([tensor.nbytes for tensor in tensors])
        return self._spots.is_in_bounds(tensors)

    def smallest(self, tensors: Sequence[torch.Tensor], each_bytes: int, all_bytes: int) -> list[int]:
        """The smallest of ``tensors``, of ``each_bytes`` at most and ``all_bytes`` together. All tensors of
        one structure have the same sizes, so they are looked at once."""
        if self._smallest is None:
            sizes = [tensor.nbytes for tensor in tensors]
            self._smallest = []
            for index in sorted(range(len(sizes)), key=sizes.__getitem__):
                all_bytes -= sizes[index]
                if sizes[index] > each_bytes or all_bytes < 0:
                    break
                self._smallest.append(index)
        return self._smallest

    def record(
        self, state: object, flat: FlatState, tensors: list[torch.Tensor], leaves: list[Any], *, raw: bool
    ) -> None:
        """Remember of what ``state`` is built, that held these ``tensors`` and ``leaves`` before ties were
        taken out.

        ``raw`` says whether the bytes in the tensors' memory are their elements, and the CPU reads them.
        """
        # first of all: whatever returns below must leave no recording of an earlier state
        self._recording = self.devices = None
        # which piece of a distributed tensor lies here is nothing that a guard compares
        if TensorGuards is None or flat.distributed or flat.bare or flat.per_rank:
            return
        recorder = _Recorder(flat.statefuls, flat.asked)
        try:
            root = recorder.branch(state)
        except _UncacheableError:
            return
        same = len(recorder.tensors) == len(tensors) and len(recorder.leaves) == len(leaves)
        # nested tensors, for one, have become leaves meanwhile
        if not (same and all(map(is_, recorder.tensors, tensors)) and all(map(is_, recorder.leaves, leaves))):
            return
        stored = flat.kept or list(range(len(tensors)))
        self._recording = _make_recording(recorder, root, tensors, stored, raw)


def _make_recording(
    recorder: _Recorder, root: _Branch, every: list[torch.Tensor], stored: list[int], raw: bool
) -> _Recording:
    # a guard refuses an object that it sees twice, so those that occur again come last, with their own guards
    order = [*stored, *sorted(set(range(len(every))) - set(stored))]
    places = recorder.places(recorder.tensor_marks)
    tensors = [every[index] for index in order]
    pointers = list(map(torch.Tensor.data_ptr, tensors))
    starts = [*range(0, len(stored), _CHUNK), *range(len(stored), len(order), _CHUNK)]
    chunks = list(zip(starts, [*starts, len(order)][1:], strict=True))
    return _Recording(
        root=root,
        tensors=_pick([places[index] for index in order]),
        num_stored=len(stored),
        leaves=_pick(recorder.places(recorder.leaf_marks)),
        guards=[
            (
                start,
                stop,
                TensorGuards(*tensors[start:stop], dynamic_dims_sizes=None, dynamic_dims_strides=None),
            )
            for start, stop in chunks
        ],
        pointers=(pointers, pointers if len(stored) == len(order) else pointers[: len(stored)]),
        is_raw=raw,
    )


class _Recorder:
    """Goes over a state in its own order and notes, level by level, what it is built of."""

    def __init__(self, statefuls: list[tuple[str, Any, Any]], asked: list[str]) -> None:
        self.tensors: list[torch.Tensor] = []
        self.tensor_marks: list[tuple[int, int, int]] = []
        """(branch, depth, place in its level)"""
        self.leaves: list[Any] = []
        self.leaf_marks: list[tuple[int, int, int]] = []
        self._statefuls: Iterator[tuple[str, Any, Any]] = iter(statefuls)
        self._turn = {name: turn for turn, name in enumerate(asked)}
        self._branches: list[_Branch] = []

    def branch(self, root: object) -> _Branch:
        branch = _Branch(type(root))
        self._branches.append(branch)
        if branch.kind not in _VALUES or (isinstance(root, list) and is_terminal(root)):
            raise _UncacheableError
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

    def _visit(self, branch: _Branch, number: int, depth: int, container: Any) -> None:
        level = branch.level(depth)
        kind = type(container)
        level.values.append(_VALUES[kind])
        level.names.append(_NAMES[kind])
        level.sizes.append(len(container))
        if kind is not list:
            keys = list(container)
            types = list(map(type, keys))
            if not _KEYS.issuperset(types):
                raise _UncacheableError
            level.keys += keys
            level.key_types += types
        for value in _VALUES[kind](container):
            mark = (number, depth, len(level.types))
            level.types.append(type(value))
            level.inner.append(0)
            match kind_of_value(value, is_own=False):
                case Kind.TENSOR if is_plain(value):
                    self.tensors.append(value)
                    self.tensor_marks.append(mark)
                case Kind.TENSOR if type(value) not in PLAIN_TENSORS:
                    raise _UncacheableError  # what lies in a subclass is not seen from outside
                case Kind.OWN | Kind.STATEFUL:
                    name, stateful, inner = next(self._statefuls)
                    assert stateful is value
                    branch.statefuls.append((depth, mark[2], name, self.branch(inner)))
                case Kind.MAPPING | Kind.PER_RANK | Kind.LIST:
                    if type(value) not in _VALUES:
                        raise _UncacheableError
                    level.inner[-1] = 1
                    self._visit(branch, number, depth + 1, value)
                case Kind.TENSOR | Kind.LEAF:
                    self.leaves.append(value)
                    self.leaf_marks.append(mark)
