"""CaptureCache: a state that kept its structure is gone over again list by list, in C.

Enters: a state, and what flattening it met before. Leaves: its tensors and leaves in the same order, if
nothing changed that a plan depends on; else what the Statefuls gave, so that flattening asks them no second
time. Invariant: the same answer as flattening anew, and the trainer's tensors are not kept: all that is
remembered of them are types, geometry and addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from operator import attrgetter, is_, itemgetter, ne, not_
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .asking import Given, snapshot
from .checkpointable import any_checkpointable, is_checkpointable
from .containers import is_plain, is_terminal
from .flat_state import FlatState
from .layouts import LayoutGuard, local_parts
from .optimizers import stepped_by
from .recorder import Branch, Recorder, UncacheableError
from .stateful import is_stateful
from .tensor_guards import HAS_GUARDS, Guards, guards_of
from .tensor_memory import SpotCheck, has_memory

_is_nested = attrgetter("is_nested")


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
    dtensors: dict[str, DTensor]
    """By their names; the local parts are among the tensors."""
    optimizers: list[Optimizer]
    pointers: list[int] | None
    """Address of each tensor; None unless the bytes there are its elements and the CPU reads them."""


@dataclass(slots=True)
class _Recording:
    """What a state was built of when it was flattened."""

    root: Branch
    tensors: Callable[[list[Any]], list[Any]]
    """Those that are stored, then those that have the bytes of one of them."""
    num_stored: int
    leaves: Callable[[list[Any]], list[Any]]
    dtensors: Callable[[list[Any]], list[Any]]
    layouts: LayoutGuard
    """Compares which parts of larger tensors the DTensors are, which no guard does."""
    num_bare: int
    """How many tensors come behind those in ``pointers``: local parts of which nothing is stored, as they are
    empty."""
    guards: Guards
    pointers: tuple[list[int], list[int]]
    """Addresses of all tensors, and of those that are stored; one value, since several threads may save."""
    is_raw: bool

    def match(self, state: object, given: Given) -> CacheHit | None:
        values: list[Any] = []
        optimizers: list[Optimizer] = []
        if not self._collect(self.root, state, values, given, optimizers):
            return None
        leaves, dtensors = self.leaves(values), self.dtensors(values)
        # looked at before what lies in them, and in place of what else they are asked when a state is new
        if not self.layouts.check(dtensors):
            return None
        values += local_parts(dtensors)
        tensors = self.tensors(values)
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
        tensors, pointers = tensors[: len(tensors) - self.num_bare], pointers[: len(tensors) - self.num_bare]
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
            dtensors=dict(zip(self.layouts.names, dtensors, strict=True)),
            optimizers=optimizers,
            pointers=stored if self.is_raw else None,
        )

    def _collect(
        self, branch: Branch, root: object, collected: list[Any], given: Given, optimizers: list[Optimizer]
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
        """The tensors in pinned host memory: a device may still be filling them."""
        self.is_pinned_known = False
        """Whether somebody has looked since tensors came to lie elsewhere: no guard tells of what kind memory
        is."""
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
        recording = self._recording
        if recording is None:
            return None
        known = recording.pointers
        hit = recording.match(state, given)
        if recording.pointers is not known:
            self.is_pinned_known = False
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
        self.is_pinned_known = False
        if not HAS_GUARDS or flat.per_rank:
            return
        recorder = Recorder(flat.statefuls, flat.asked, flat.rank)
        try:
            root = recorder.branch(state)
        except UncacheableError:
            return
        same = len(recorder.tensors) == len(tensors) and len(recorder.leaves) == len(leaves)
        # nested tensors, for one, have become leaves meanwhile
        if not (same and all(map(is_, recorder.tensors, tensors)) and all(map(is_, recorder.leaves, leaves))):
            return
        layouts = LayoutGuard.of(list(flat.distributed), recorder.dtensors)
        if layouts is None or not all(map(is_, recorder.dtensors, flat.distributed.values())):
            return
        stored = flat.kept or list(range(len(tensors)))
        self._recording = _make_recording(recorder, root, layouts, stored, raw)


def _make_recording(
    recorder: Recorder, root: Branch, layouts: LayoutGuard, stored: list[int], raw: bool
) -> _Recording:
    every, bare = recorder.tensors, recorder.bare
    # a guard refuses an object that it sees twice, so those that occur again come last, with their own guards
    order = [*stored, *sorted(set(range(len(every))) - set(stored))]
    places = recorder.tensor_places()
    tensors = [every[index] for index in order]
    pointers = list(map(torch.Tensor.data_ptr, tensors))
    return _Recording(
        root=root,
        tensors=_pick([*(places[index] for index in order), *places[len(every) :]]),
        num_stored=len(stored),
        leaves=_pick(recorder.places(recorder.leaf_marks)),
        dtensors=_pick(recorder.places(recorder.dtensor_marks)),
        layouts=layouts,
        num_bare=len(bare),
        guards=guards_of([*tensors, *bare], len(stored), len(order)),
        pointers=(pointers, pointers if len(stored) == len(order) else pointers[: len(stored)]),
        is_raw=raw,
    )
