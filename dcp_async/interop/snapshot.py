"""A copy of a state dict in host memory, by few large calls: what stock asks an AsyncStager for.

Enters: a state dict as stock hands it over, its Statefuls asked. Leaves: one of the same structure whose
tensors nobody else writes to. Invariant: whatever is not a plain tensor is copied as stock's own stager
copies it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from .._concurrency import collection_paused
from .._geometry import contiguous_strides
from ..save import is_raw

_ALIGN = 64
"""What the elements of each copy are aligned to: so are those of any dtype."""
_SMALL_BYTES = 1 << 20
_SHARED_BYTES = 16 << 20
"""What small tensors share."""
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size, torch.device)


class _Snapshot:
    """One copy of one state dict: its leaves are noted, copied all at once, and put together."""

    def __init__(self) -> None:
        self._tensors: dict[int, torch.Tensor] = {}
        """By id: names that share a tensor share its copy."""
        self._copies: dict[int, Any] = {}
        self._others: dict[str, Any] = {}

    def take(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._note(state_dict)
        self._copy_tensors()
        if self._others:
            stager = StateDictStager(pin_memory=False, share_memory=False)
            copies = stager.stage(self._others)
            self._copies |= {id(value): copies[name] for name, value in self._others.items()}
        copy: dict[str, Any] = self._copy_of(state_dict)
        return copy

    def _note(self, value: Any) -> None:
        if type(value) is dict:
            for child in value.values():
                self._note(child)
        elif type(value) in (list, tuple):
            for child in value:
                self._note(child)
        elif isinstance(value, torch.Tensor) and is_raw(value) and not value.is_meta:
            self._tensors[id(value)] = value
        elif not isinstance(value, _ATOMS):
            self._others[str(id(value))] = value

    def _copy_tensors(self) -> None:
        """Small tensors share a piece of memory: for tens of thousands of them one of its own costs most."""
        typed: dict[torch.dtype, torch.Tensor] = {}
        # as if full: memory to share is made for the first small tensor, and not for none
        used = _SHARED_BYTES
        for key, tensor in self._tensors.items():
            dtype, shape, nbytes = tensor.dtype, tensor.shape, tensor.nbytes
            if nbytes > _SMALL_BYTES:
                self._copies[key] = torch.empty(shape, dtype=dtype, device="cpu")
                continue
            if used + nbytes > _SHARED_BYTES:
                memory = torch.empty(_SHARED_BYTES, dtype=torch.uint8, device="cpu")
                typed, used = {torch.uint8: memory}, 0
            if dtype not in typed:
                typed[dtype] = typed[torch.uint8].view(dtype)
            self._copies[key] = typed[dtype].as_strided(
                shape, contiguous_strides(shape), used // dtype.itemsize
            )
            used += -(-nbytes // _ALIGN) * _ALIGN
        if self._copies:
            with torch.no_grad():  # one call, so that the GIL is released once
                torch._foreach_copy_(list(self._copies.values()), list(self._tensors.values()))

    def _copy_of(self, value: Any) -> Any:
        if type(value) is dict:
            return {key: self._copy_of(child) for key, child in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copy_of(child) for child in value)
        return value if isinstance(value, _ATOMS) else self._copies[id(value)]


def snapshot(state_dict: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` in host memory of its own; what it was made of may change afterwards."""
    with collection_paused():  # the copies of tens of thousands of tensors are as many objects
        return _Snapshot().take(state_dict)
