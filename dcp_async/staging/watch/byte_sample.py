"""A sample of a state's bytes: notices changes that move no counter.

Enters: addresses of tensors at capture. Leaves: which of them have other bytes later. Costs are per save, not
per tensor.
"""

from __future__ import annotations

import ctypes
import heapq
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..vectored_copy import RefusedError, VectoredCopy

Place = tuple[int, int, int]
"""(index of a tensor, offset in its row-major bytes, length) of a sampled block."""

SAMPLE_BYTES = 64
_TENSORS = 64
"""How many tensors are sampled: the largest and some that lie evenly among the others."""
_BLOCKS = 4
"""How many places of each; a write to all elements is seen at any of them."""


def places_to_sample(nbytes: Sequence[int], can_look: Sequence[bool], aside: Collection[int]) -> list[Place]:
    """Where to look in tensors of these sizes, but for those that are copied ``aside``; ``can_look`` says at
    which of them one can."""
    skipped = set(aside)
    able = [index for index, size in enumerate(nbytes) if size and can_look[index] and index not in skipped]
    chosen = able
    if len(able) > _TENSORS:
        # half of them the largest, which hold most of the bytes; half among the others, so that a change of
        # small tensors alone is seen as well
        largest = set(heapq.nlargest(_TENSORS // 2, able, key=nbytes.__getitem__))
        others = [index for index in able if index not in largest]
        count = _TENSORS - len(largest)
        even = [others[number * len(others) // count] for number in range(count)]
        chosen = sorted({*largest, *even})
    places: list[Place] = []
    for index in chosen:
        length = min(SAMPLE_BYTES, nbytes[index])
        room = nbytes[index] - length
        # the blocks of a short tensor coincide: each is looked at once
        offsets = dict.fromkeys(room * number // (_BLOCKS - 1) for number in range(_BLOCKS))
        places += [(index, offset, length) for offset in offsets]
    return places


@dataclass(slots=True)
class ByteSample:
    """Some blocks of a state's memory, as they were at capture."""

    places: list[Place]
    pointers: list[int]
    """Per place, where its tensor lay."""
    then: list[bytes]

    @classmethod
    def take(cls, places: list[Place], pointers: Sequence[int]) -> ByteSample:
        """The blocks at ``places`` now, of row-major tensors on the host; ``pointers`` are all tensors'.
        Raises RefusedError where the kernel does not copy."""
        own = [pointers[index] for index, *_ in places]
        return cls(places, own, _read(places, own))

    def indices(self) -> list[int]:
        """The tensors that are sampled."""
        return list(dict.fromkeys([index for index, *_ in self.places]))

    def differing(self, current: Mapping[int, int]) -> set[int]:
        """Which of the tensors in ``current``, which has their addresses, are not what they were. One that
        lies elsewhere by now is not judged."""
        pairs = enumerate(zip(self.places, self.pointers, strict=True))
        chosen = [
            number
            for number, ((index, *_), pointer) in pairs
            if index in current and current[index] == pointer
        ]
        places = [self.places[number] for number in chosen]
        pointers = [self.pointers[number] for number in chosen]
        try:
            now = _read(places, pointers)
        except RefusedError:  # the memory is gone
            return set()
        return {
            index
            for (index, *_), block, number in zip(places, now, chosen, strict=True)
            if block != self.then[number]
        }

    def share(self, new: Mapping[int, int]) -> ByteSample:
        """The sample of the tensors in ``new`` alone, which has their new indices."""
        # taken over, not read anew: what counts is what the bytes were at capture
        kept = [number for number, (index, *_) in enumerate(self.places) if index in new]
        places = [self.places[number] for number in kept]
        return ByteSample(
            [(new[index], offset, length) for index, offset, length in places],
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
    buffer = torch.empty(ends[-1], dtype=torch.uint8, device="cpu")
    base = buffer.data_ptr()
    copy = VectoredCopy([base + start for start in ends[:-1]], lengths, [])
    copy.read_from([pointer + offset for pointer, (_, offset, _) in zip(pointers, places, strict=True)])
    copy.copy(0, copy.num_calls)
    held = ctypes.string_at(base, ends[-1])
    return [held[start:stop] for start, stop in itertools.pairwise(ends)]
