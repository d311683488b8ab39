"""Small tensors are copied in ``save()`` under ``overlap=True``: a forward changes them, and they are cheap.

Enters: a captured state, in the trainer's thread. Leaves: the same state with copies in their places, and a
watch over the others. Invariant: what is copied on a device is queued on the stream that the caller uses
there, behind what made the state and before what will change it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from itertools import accumulate
from typing import TypeVar

import torch

from .._geometry import contiguous_strides
from ..state import Captured
from .device import Stream
from .packing import Located, Pack, Snapshot
from .watch import MutationWatch, Sampled

logger = logging.getLogger(__name__)

T = TypeVar("T")

ASIDE_BYTES = 8 << 20
"""How much is copied aside at most, but for what is packed on a device."""
_TENSOR_BYTES = 64 * 1024
# a device that is full must not fail the trainer
_FULL = "no room on %s for a copy of small tensors: they are watched instead, and may not change (%s)"
_ALIGN = 64
"""Where a copy on a device begins: vectorised kernels take no less."""


def take_snapshots(
    captured: Captured, packs: Mapping[torch.device, Pack], streams: Mapping[torch.device, Stream]
) -> dict[torch.device, Snapshot]:
    """Copy the tensors of ``packs`` on their devices, each on the stream that the caller uses there: kernels
    that it queued before are done by then, later ones find the copy made."""
    snapshots: dict[torch.device, Snapshot] = {}
    for device, pack in packs.items():
        try:
            snapshot = Snapshot(pack, pack.take(streams[device]))
        except RuntimeError as error:
            logger.warning(_FULL, device, error)
            continue
        pack.snapshot(snapshot.scratch, streams[device], captured.tensors)
        snapshots[device] = snapshot
    return snapshots


def copy_aside(
    captured: Captured,
    located: Located,
    snapshots: Mapping[torch.device, Snapshot],
    streams: Mapping[torch.device, Stream],
    in_place: Set[int] = frozenset(),
) -> tuple[Captured, list[int]]:
    """``captured`` with its small tensors, but for those ``in_place``, replaced by copies, and which these
    are.

    A forward changes small ones (BatchNorm's counters), and they are cheap. To be called before the events
    are recorded, so that copies on a device come first.
    """
    smallest = captured.known.cache.smallest(captured.tensors, _TENSOR_BYTES, ASIDE_BYTES)
    aside: list[int] = []
    copies: list[torch.Tensor] = []
    for snapshot in snapshots.values():
        aside += snapshot.pack.in_structure
        copies += snapshot.scratch.every
    # pinned ones are read when they have arrived, for which the trainer does not wait
    taken = captured.known.cache.pinned.union(aside, in_place)
    rest = [index for index in smallest if index not in taken] if taken else smallest
    # no step per tensor that calls anything: this is the trainer's time
    for device in (None, *streams):
        indices = [index for index in rest if located[index] == device] if located else rest
        sources = [captured.tensors[index] for index in indices]
        try:
            copies += _copies(sources, None if device is None else streams[device])
        except RuntimeError as error:
            logger.warning(_FULL, device, error)
            continue
        aside += indices
    tensors = _replaced(captured.tensors, aside, copies)
    pointers = captured.pointers
    if pointers is not None:
        # the list is the capture cache's, which compares the next state's addresses with it
        pointers = _replaced(pointers, aside, list(map(torch.Tensor.data_ptr, copies)))
    return dataclasses.replace(captured, tensors=tensors, pointers=pointers), aside


def _copies(sources: Sequence[torch.Tensor], stream: Stream | None) -> list[torch.Tensor]:
    if stream is None:
        with torch.no_grad():  # a copy of a Parameter would record autograd
            return list(map(torch.Tensor.clone, sources))
    # one batch per dtype: on a device a clone of each would be an allocation and a launch of each
    copies = list(sources)
    by_dtype: defaultdict[torch.dtype, list[int]] = defaultdict(list)
    for number, source in enumerate(sources):
        by_dtype[source.dtype].append(number)
    for dtype, numbers in by_dtype.items():
        step = max(_ALIGN // dtype.itemsize, 1)
        ends = list(accumulate((-(-sources[number].numel() // step) * step for number in numbers), initial=0))
        memory = stream.empty((max(ends[-1], 1),), dtype)
        for number, start in zip(numbers, ends, strict=False):
            shape = sources[number].shape
            copies[number] = memory.as_strided(shape, contiguous_strides(shape), start)
        stream.copy([copies[number] for number in numbers], [sources[number] for number in numbers])
    return copies


def _replaced(values: Sequence[T], indices: Sequence[int], instead: Sequence[T]) -> list[T]:
    """``values`` with those at ``indices`` taken from ``instead``."""
    replaced = list(values)
    for index, value in zip(indices, instead, strict=True):
        replaced[index] = value
    return replaced


def watched(
    captured: Captured,
    located: Located,
    snapshots: Mapping[torch.device, Snapshot],
    streams: Mapping[torch.device, Stream],
    in_place: Set[int] = frozenset(),
) -> tuple[Captured, MutationWatch]:
    """``captured`` as a trainer that goes on may leave it: small tensors, but for those ``in_place``, are
    copied, the others watched."""
    copied, aside = copy_aside(captured, located, snapshots, streams, in_place)
    sampled = Sampled.of(copied, located, aside)
    return copied, MutationWatch.begin(copied, aside, sampled, streams)
