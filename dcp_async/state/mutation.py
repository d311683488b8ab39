"""What changes while it is staged: counters of tensors and of what wraps them, and whatever a sample tells.

Enters: a state's tensors at capture. Leaves: which of them were changed before staging had ended. Invariant:
a difference of bytes is only held against a tensor whose counters stood still; where one moved, that is
judged when the tensor is copied. Costs are per save and per wrapper, not per tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from .sharding import is_known_to_autograd, is_sharded

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


class Sample(Protocol):
    """Some blocks of a state's memory, as they were at capture."""

    def indices(self) -> list[int]:
        """The tensors that are sampled."""

    def differing(self, current: Mapping[int, int]) -> set[int]:
        """Which of the tensors in ``current``, which has their addresses, are not what they were."""

    def part(self, new: Mapping[int, int]) -> Sample:
        """Of the tensors in ``new`` alone, which has their new indices."""


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
