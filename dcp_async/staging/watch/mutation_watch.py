"""What tells that a captured tensor was changed before it was staged: counters, wrappers, a sample of bytes.

Enters: a captured state, in the trainer's thread and right after capture. Leaves: which of its tensors were
changed since. Invariant: a difference of bytes is only held against a tensor whose counters stood still;
where one moved, that is judged when the tensor is copied. Costs are per save and per wrapper, not per tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...state import Captured, layers_of, version_of, versions_of, wrappers_in
from ..device import Stream
from ..selection import Selection
from .byte_sample import ByteSample
from .element_sample import ElementSample
from .samples import Sampled


class MutatedTensors(Exception):
    """Tensors that were changed between capture and staging; ``names`` says which."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(", ".join(names))
        self.names = tuple(names)


@dataclass(slots=True)
class MutationWatch:
    """A state's counters and addresses as they were at capture. Refers to what wraps its tensors, not to
    them."""

    versions: list[int | None]
    """How often each tensor had been changed; None for an inference tensor, which autograd ignores."""
    addresses: Sequence[int]
    """Where each tensor lay, on whatever device: ``parameter.data = other`` moves no counter."""
    outer: list[torch.Tensor]
    """What operations count on in place of each tensor: a DTensor around it, or itself; empty without
    DTensors."""
    outer_versions: list[int | None]
    layers: dict[int, list[tuple[torch.Tensor, int | None]]]
    """Index of a tensor -> what else wraps it, and how often that had been changed."""
    host_sample: ByteSample
    """What notices changes on the host that move no counter."""
    device_sample: ElementSample
    """What notices them on devices."""

    @classmethod
    def begin(
        cls,
        captured: Captured,
        aside: Collection[int],
        sampled: Sampled,
        streams: Mapping[torch.device, Stream],
    ) -> MutationWatch:
        """Take note of ``captured`` as it is now.

        Args:
            aside: the tensors that were copied; the originals may change.
            sampled: where to look at the others.
            streams: the caller's current ones.
        """
        if captured.pointers is not None:
            addresses: Sequence[int] = captured.pointers
        else:
            addresses = list(map(torch.Tensor.data_ptr, captured.tensors))
        samples = sampled.take(captured.tensors, addresses, streams)
        outer = _outermost(captured, aside)
        return cls(
            versions_of(captured.tensors),
            addresses,
            outer,
            versions_of(outer),
            _layers(captured, aside),
            *samples,
        )

    def dtensors_changed(self, selection: Selection) -> set[int]:
        """Those of ``selection`` whose DTensors were changed: an operation counts on what it was called
        with."""
        if not self.outer:
            return set()
        now = versions_of(selection.pick(self.outer))
        return selection.differing(now, selection.pick(self.outer_versions))

    def wrappers_changed(self, indices: Iterable[int]) -> set[int]:
        """Those of ``indices`` whose other wrappers were changed, or what lies between them and the
        tensor."""
        # neither plain tensors nor DTensors have any: a state of them is not gone over in Python
        if not self.layers:
            return set()
        return {
            index
            for index in indices
            if any(version_of(layer) != version for layer, version in self.layers.get(index, ()))
        }

    def changed_unseen(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """Which sampled ones of ``tensors`` on the host have other bytes although no counter of theirs moved.
        To be asked once all of them are copied: what is changed after that is the trainer's."""
        indices = self.host_sample.indices()
        sampled = [tensors[index] for index in indices]
        # a counter that moved was judged when its tensor was copied: after that the trainer may change it
        wrapped = self.wrappers_changed(indices) | self.dtensors_changed(Selection(indices))
        addresses = map(torch.Tensor.data_ptr, sampled)
        current = {
            index: address
            for index, address, version in zip(indices, addresses, versions_of(sampled), strict=True)
            if version == self.versions[index] and index not in wrapped
        }
        return self.host_sample.differing(current)

    def share(self, indices: Sequence[int]) -> MutationWatch:
        """The watch over these tensors alone, by their new indices."""
        renumbered = {old: new for new, old in enumerate(indices)}
        # a share has indices of its own, by which it is asked from here on
        return MutationWatch(
            [self.versions[index] for index in indices],
            [self.addresses[index] for index in indices],
            [self.outer[index] for index in indices] if self.outer else [],
            [self.outer_versions[index] for index in indices] if self.outer else [],
            {renumbered[index]: layers for index, layers in self.layers.items() if index in renumbered},
            self.host_sample.share(renumbered),
            self.device_sample.share(renumbered),
        )


def _outermost(captured: Captured, aside: Collection[int]) -> list[torch.Tensor]:
    if not captured.dtensors:
        return []
    # in C, but for those that were copied: they are nobody's local part
    outer = list(map(captured.dtensors.get, captured.structure.tensor_names, captured.tensors))
    for index in aside:
        outer[index] = captured.tensors[index]
    return outer


def _layers(captured: Captured, aside: Collection[int]) -> dict[int, list[tuple[torch.Tensor, int | None]]]:
    others = captured.live.keys() - captured.dtensors.keys()
    wrappers = wrappers_in({name: captured.live[name] for name in others})
    if not wrappers:
        return {}
    counted = {
        name: [(layer, version_of(layer)) for layer in layers_of(wrapper)]
        for name, wrapper in wrappers.items()
    }
    skipped = set(aside)
    return {
        index: counted[name]
        for index, name in enumerate(captured.structure.tensor_names)
        if name in counted and index not in skipped
    }
