"""Whether the memory of a tensor is there, up to its last element.

A storage can be freed or made smaller under its tensors, as FSDP1 frees parameters between their uses; then
whoever copies the tensor reads memory that is not its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

_LARGE = 1 << 20
"""Looking at one takes a hundredth of the time of copying it."""
_AT_A_TIME = 128


def has_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all elements of plain tensors lie in memory that the tensors own.

    A storage that was asked for its length stays in Python's memory as long as the tensor, for each garbage
    collection to go over: not for tensors by the thousand that stay (``is_in_bounds``).
    """
    storages = list(map(torch.Tensor.untyped_storage, tensors))
    held = map(torch.UntypedStorage.nbytes, storages)
    return all(nbytes >= _reach(tensor) for nbytes, tensor in zip(held, tensors, strict=True))


def is_in_bounds(tensors: Sequence[torch.Tensor], shapes: Sequence[torch.Size]) -> bool:
    """Whether no tensor ends behind its memory, with no call per tensor that traces: torch checks the bounds
    of each view that it makes, at a microsecond each."""
    strides = map(torch.Tensor.stride, tensors)
    offsets = map(torch.Tensor.storage_offset, tensors)
    try:
        # a view of what requires grad would be a node of a graph
        with torch.no_grad():
            # maxlen=0: C goes over all of them, and no view is kept
            deque(map(torch.Tensor.as_strided, tensors, shapes, strides, offsets), maxlen=0)
    except RuntimeError:
        return False
    return True


class SpotCheck:
    """Looks again and again at tensors whose storages may have been made anew, smaller, at the same address:
    at the large ones each time, which are those that are freed to save memory, and at the others in turn."""

    def __init__(self, nbytes: Sequence[int]) -> None:
        """``nbytes``: of each tensor."""
        self._large = [index for index, size in enumerate(nbytes) if size >= _LARGE]
        self._others = [index for index, size in enumerate(nbytes) if size < _LARGE]
        self._turn = 0

    def is_in_bounds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether those that are looked at this time end within their memory."""
        start = self._turn if self._turn < len(self._others) else 0
        self._turn = stop = start + _AT_A_TIME
        chosen = [tensors[index] for index in (*self._large, *self._others[start:stop])]
        return is_in_bounds(chosen, [tensor.shape for tensor in chosen])


def _reach(tensor: torch.Tensor) -> int:
    """Where in its storage the last element ends, in bytes."""
    # without elements it reaches nowhere, whatever its offset and strides are
    if not tensor.numel():
        return 0
    last = sum((extent - 1) * step for extent, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def lack_of_memory(tensor: torch.Tensor) -> str | None:
    """What is wrong with the memory of a tensor, None if nothing is."""
    try:
        # inside of a functorch transformation torch refuses to be asked
        held = tensor.untyped_storage().nbytes()
    except RuntimeError as error:
        return (
            f"a tensor without memory of its own ({str(error).splitlines()[0]}); "
            "save what it is made of, outside of the transformation"
        )
    if held < (needed := _reach(tensor)):
        return (
            f"its storage holds {held} bytes, and {tuple(tensor.shape)} {tensor.dtype} needs "
            f"{needed}: it was freed or made smaller, as FSDP1 frees parameters between their uses. Gather "
            "it first (AppState does), or leave it out of the state"
        )
    return None
