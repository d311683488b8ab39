"""Many copies by one call of torch's, bit for bit and of any dtype.

Enters: targets and sources. Leaves: queued or done copies, as torch makes them. Source:
ATen/native/cuda/ForeachBinaryOpList.cu and ForeachFunctors.cuh: the kernel for a batch on one device takes
float16, bfloat16 and float8 by way of float32, where all NaNs become one, and knows fewer dtypes than
``copy_``.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import methodcaller

import torch

_NARROW_FLOATS = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
_BITS: dict[torch.dtype, torch.dtype] = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.complex32: torch.int32,
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    # not every torch has all of them
    **{getattr(torch, name): torch.uint8 for name in _NARROW_FLOATS if hasattr(torch, name)},
}
"""What elements are copied as on one device, where the batched kernel would change or refuse them."""


def copy_batch(
    targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, non_blocking: bool
) -> None:
    """Copy each of ``sources`` into its target. A batch within one device is of one pair of dtypes."""
    targets, sources = _as_bits(list(targets), list(sources))
    # in a trainer's thread a copy of a Parameter would record autograd; and tensors that were made in
    # inference mode are written to in it alone
    with torch.inference_mode():
        try:
            torch._foreach_copy_(targets, sources, non_blocking=non_blocking)
        except NotImplementedError:  # before anything is queued
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=non_blocking)


def _as_bits(
    targets: list[torch.Tensor], sources: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    first, dtype = sources[0], sources[0].dtype
    if dtype not in _BITS or targets[0].dtype != dtype or targets[0].device != first.device:
        return targets, sources
    # lazily conjugated or negated: the bits in memory are not the element's
    if any(map(torch.Tensor.is_neg, sources)) or any(map(torch.Tensor.is_conj, sources)):
        return targets, sources
    as_bits = methodcaller("view", _BITS[dtype])
    with torch.inference_mode():
        return list(map(as_bits, targets)), list(map(as_bits, sources))
