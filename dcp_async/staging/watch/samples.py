"""Which tensors of a structure are sampled: on the host by the kernel, on devices by their own queues.

Enters: a captured state, in the trainer's thread. Leaves: a ByteSample and an ElementSample of it, at a cost
that is the same for ten tensors and for ten thousand. Invariant: no address of a device is given to the
kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...state import Captured
from ..device import Stream
from ..packing import Located
from ..vectored_copy import RefusedError
from .byte_sample import ByteSample, Place, places_to_sample
from .element_sample import Block, ElementSample, block_at


@dataclass(frozen=True, slots=True)
class Sampled:
    """Where states of one structure are looked at."""

    located: Located
    pinned: frozenset[int]
    num_aside: int
    on_host: list[Place]
    on_devices: list[Block]
    refused: list[Block]
    """What is looked at in place of ``on_host`` where the kernel reads no memory for us."""

    @classmethod
    def of(cls, captured: Captured, located: Located, aside: Collection[int]) -> Sampled:
        """For states like ``captured``, but for the tensors that are copied ``aside``. What was found out for
        the last one is kept in its cache."""
        structure, cache = captured.structure, captured.known.cache
        known, pinned, strides = cache.sampled, cache.pinned, structure.strides
        if isinstance(known, cls) and known.fits(located, pinned, aside):
            return known
        # on the host between the elements of others than row-major ones may lie somebody else's, and pinned
        # ones need not hold yet what they are about to
        can_look = [
            (steps is None and index not in pinned) or bool(located and located[index])
            for index, steps in enumerate(strides)
        ]
        places = places_to_sample([tensor.nbytes for tensor in captured.tensors], can_look, aside)
        blocks = [
            block_at(place, structure.dtypes[place[0]], structure.shapes[place[0]], strides[place[0]])
            for place in places
        ]
        on_host = [not located or located[index] is None for index, *_ in places]
        made = cls(
            located,
            pinned,
            len(aside),
            [place for place, is_there in zip(places, on_host, strict=True) if is_there],
            [block for block, is_there in zip(blocks, on_host, strict=True) if not is_there],
            [block for block, is_there in zip(blocks, on_host, strict=True) if is_there],
        )
        cache.sampled = made
        return made

    def fits(self, located: Located, pinned: frozenset[int], aside: Collection[int]) -> bool:
        """Whether tensors that lie there, without those ``aside``, are looked at in the same places."""
        lie_there = located is self.located or located == self.located
        return lie_there and pinned == self.pinned and self.num_aside == len(aside)

    def take(
        self,
        tensors: Sequence[torch.Tensor],
        addresses: Sequence[int],
        streams: Mapping[torch.device, Stream],
    ) -> tuple[ByteSample, ElementSample]:
        """Samples of a state of that structure as it is now. ``streams``: the caller's current ones of the
        devices on which tensors lie."""
        blocks = self.on_devices
        try:
            on_host = ByteSample.take(self.on_host, addresses)
        except RefusedError:  # the kernel reads no memory for us
            on_host, blocks = ByteSample([], [], []), [*self.refused, *blocks]
        return on_host, ElementSample.take(blocks, tensors, self.located, streams)
