"""What changes while it is staged: counters of wrappers, and a sample of the bytes for what moves no counter.

Enters: a state's tensors at capture. Leaves: which of them were changed before staging had ended. Invariant:
a difference of bytes is only held against a tensor whose counters stood still; where one moved, that is
judged when the tensor is copied. Costs are per save and per wrapper, not per tensor.
"""

from __future__ import annotations

import ctypes
import heapq
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..staging.vectored_copy import Gather, RefusedError
from .sharding import is_known_to_autograd, is_sharded

SAMPLE_BYTES = 64
_TENSORS = 64
"""How many tensors are sampled: the largest and some that lie evenly among the others."""
_BLOCKS = 4
"""How many places of each; a write to all elements is seen at any of them."""

Place = tuple[int, int, int]
"""(index of a tensor, offset in its bytes, length) of a sampled block."""


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    """How often each tensor was changed, as autograd counts; None for inference tensors, which it ignores."""
    try:
        return list(map(attrgetter("_version"), tensors))
    except RuntimeError:  # asking each inference tensor what it is would be felt
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _version_of(tensor: torch.Tensor) -> int | None:
    """The same of one that may be of any kind."""
    if not is_known_to_autograd(tensor):
        return None
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode
        return None


def layers_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """``tensor``, and the tensors that it is made of, outermost first: an operation counts on the outermost
    that it was called with."""
    yield tensor
    if isinstance(tensor, DTensor):
        yield from layers_of(tensor._local_tensor)
        return
    if hasattr(type(tensor), "__tensor_flatten__"):
        whole: Any = tensor
        names, _ = whole.__tensor_flatten__()
        for name in names:
            yield from layers_of(getattr(tensor, name))


def places_to_sample(nbytes: Sequence[int], row_major: Sequence[bool], aside: Collection[int]) -> list[Place]:
    """Where to look in tensors of these sizes, but for those that are copied ``aside``. Only row-major ones:
    between the elements of another may lie somebody else's."""
    skipped = set(aside)
    able = [at for at, size in enumerate(nbytes) if size and row_major[at] and at not in skipped]
    chosen = able
    if len(able) > _TENSORS:
        largest = set(heapq.nlargest(_TENSORS // 2, able, key=nbytes.__getitem__))
        others = [at for at in able if at not in largest]
        count = _TENSORS - len(largest)
        even = [others[number * len(others) // count] for number in range(count)]
        chosen = sorted({*largest, *even})
    found: list[Place] = []
    for at in chosen:
        length = min(SAMPLE_BYTES, nbytes[at])
        room = nbytes[at] - length
        offsets = dict.fromkeys(room * number // (_BLOCKS - 1) for number in range(_BLOCKS))
        found += [(at, offset, length) for offset in offsets]
    return found


@dataclass(slots=True)
class Sample:
    """Some blocks of a state's memory, as they were at capture."""

    places: list[Place]
    pointers: list[int]
    """Per place, where its tensor lay."""
    then: list[bytes]

    @classmethod
    def take(cls, places: list[Place], pointers: Sequence[int]) -> Sample:
        """The blocks at ``places`` now; ``pointers`` are the tensors'. Raises RefusedError where the kernel
        does not copy."""
        own = [pointers[at] for at, *_ in places]
        return cls(places, own, _read(places, own))

    def indices(self) -> list[int]:
        """The tensors that are sampled."""
        return list(dict.fromkeys([at for at, *_ in self.places]))

    def differing(self, current: Mapping[int, int]) -> set[int]:
        """Which of the tensors in ``current``, which has their addresses, are not what they were. One that
        lies elsewhere by now is not judged."""
        pairs = enumerate(zip(self.places, self.pointers, strict=True))
        chosen = [number for number, ((at, *_), pointer) in pairs if at in current and current[at] == pointer]
        places, pointers = [self.places[at] for at in chosen], [self.pointers[at] for at in chosen]
        try:
            now = _read(places, pointers)
        except RefusedError:  # the memory is gone
            return set()
        return {self.places[at][0] for at, block in zip(chosen, now, strict=True) if block != self.then[at]}

    def part(self, new: Mapping[int, int]) -> Sample:
        """Of the tensors in ``new`` alone, which has their new indices."""
        kept = [number for number, (at, *_) in enumerate(self.places) if at in new]
        places = [self.places[number] for number in kept]
        return Sample(
            [(new[at], offset, length) for at, offset, length in places],
            [self.pointers[number] for number in kept],
            [self.then[number] for number in kept],
        )


def _read(places: Sequence[Place], pointers: Sequence[int]) -> list[bytes]:
    """The bytes there, by one system call or a few."""
    if not places:
        return []
    lengths = [length for *_, length in places]
    # each behind the one before, so that no bytes lie between them
    ends = list(itertools.accumulate(lengths, initial=0))
    buffer = torch.empty(ends[-1], dtype=torch.uint8)
    base = buffer.data_ptr()
    gather = Gather([base + start for start in ends[:-1]], lengths, [])
    gather.aim([pointer + offset for pointer, (_, offset, _) in zip(pointers, places, strict=True)])
    gather.copy(0, gather.num_calls)
    held = ctypes.string_at(base, ends[-1])
    return [held[start:stop] for start, stop in itertools.pairwise(ends)]


@dataclass(slots=True)
class Watch:
    """What beside the counters of the captured tensors tells that one was changed."""

    layers: dict[int, list[tuple[torch.Tensor, int | None]]] = field(default_factory=dict)
    """Index of a tensor -> what wraps it, and how often that had been changed at capture."""
    sample: Sample | None = None

    @classmethod
    def of(cls, live: Mapping[str, Any], names: Sequence[str], aside: Iterable[int]) -> Watch:
        """Over the wrappers among ``live``, each of what bears its name among the captured tensors; what was
        copied ``aside`` may change."""
        watch = cls()
        wrappers = {
            name: value
            for name, value in live.items()
            if isinstance(value, torch.Tensor) and is_sharded(value)
        }
        if wrappers:
            counted = {
                name: [(layer, _version_of(layer)) for layer in layers_of(wrapper)]
                for name, wrapper in wrappers.items()
            }
            for index in set(range(len(names))).difference(aside):
                if names[index] in counted:
                    watch.layers[index] = counted[names[index]]
        return watch

    def moved(self, indices: Iterable[int]) -> set[int]:
        """Those of ``indices`` whose wrappers were changed."""
        if not self.layers:
            return set()
        return {
            index
            for index in indices
            if any(_version_of(layer) != version for layer, version in self.layers.get(index, ()))
        }

    def changed_unseen(self, tensors: Sequence[torch.Tensor], versions: Sequence[int | None]) -> set[int]:
        """Which sampled tensors have other bytes although no counter of theirs moved. At the end of
        staging."""
        if self.sample is None:
            return set()
        indices = self.sample.indices()
        sampled = [tensors[at] for at in indices]
        now = zip(indices, map(torch.Tensor.data_ptr, sampled), versions_of(sampled), strict=True)
        wrapped = self.moved(indices)
        current = {
            at: pointer for at, pointer, version in now if version == versions[at] and at not in wrapped
        }
        return self.sample.differing(current)

    def part(self, indices: Sequence[int]) -> Watch:
        """Of these tensors alone, by their new indices."""
        new = {old: at for at, old in enumerate(indices)}
        layers = {new[at]: layers for at, layers in self.layers.items() if at in new}
        return Watch(layers, self.sample.part(new) if self.sample is not None else None)
