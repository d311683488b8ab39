"""What arrived and was verified goes where it belongs: rows into targets, items through ``torch.load``.

Enters: filled buffers. Leaves: written targets, values handed to who wants them, or DamagedError, FillError,
UntrustedGlobal. Invariant: what is copied here was verified; what was read straight into a target does not
pass here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from .._foreign import ENDINGS, FillError, words
from .._geometry import Box, CoverageError, box_at, common, contiguous_strides, extents, relative, slices
from ..formats import Quantised, StoredItem, UnsupportedError
from ..state import PLAIN_TENSORS, Region
from ..trust import UntrustedGlobal
from .failures import DamagedError
from .fetch import FetchBuffers

_COMPRESSED = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})


Put = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Copies a value into the target of that name. Raises FillError."""
Receive = Callable[[Any], None]
"""Takes what an item holds."""


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is bytes at strides, as torch's batched copies take them."""
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def copy_exotic(name: str, target: torch.Tensor, value: torch.Tensor) -> None:
    """``target.copy_(value)``, where a sparse target may hold another number of elements. Raises FillError:
    a subclass runs its own code."""
    try:
        # copy_() takes another number of elements for COO, and refuses it for these
        if target.layout in _COMPRESSED:
            target.resize_as_sparse_(value)
        target.copy_(value)
    except ENDINGS:
        raise
    except BaseException as error:
        what = f"the {type(target).__name__} in the state would not take its value"
        raise FillError(f"{name}: {what} ({words(error)})", (name,)) from error


def copy_all(names: Iterable[str], targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> None:
    """Copy each of ``sources`` into its target. Raises FillError."""
    plain_targets: list[torch.Tensor] = []
    plain_sources: list[torch.Tensor] = []
    with torch.inference_mode():  # else tensors that were made in it could not be written to
        for name, target, source in zip(names, targets, sources, strict=True):
            if is_plain(target):
                plain_targets.append(target)
                plain_sources.append(source)
            else:
                copy_exotic(name, target, source)
        if plain_targets:
            # in one call, which releases the GIL once: a trainer's thread may want it between any two copies
            torch._foreach_copy_(plain_targets, plain_sources)


def item_finisher(
    item: StoredItem, receive: Receive, *, as_bytes: bool = False
) -> Callable[[bytearray], None]:
    """Decodes the whole of ``item`` and hands its value over, or with ``as_bytes`` what somebody else will
    decode."""

    def finish(stored: bytearray) -> None:
        try:
            value = item.admitted(stored) if as_bytes else item.decode(stored)
        except ValueError as error:
            raise DamagedError(f"{item.name} in {item.file}: {error}", [item.name]) from error
        except (UnsupportedError, UntrustedGlobal, *ENDINGS):
            raise
        except BaseException as error:  # making an object runs code of its class
            raise FillError(f"{item.name}: its value can't be made ({words(error)})", (item.name,)) from error
        receive(value)

    return finish


def rows_finisher(
    put: Put, name: str, target: torch.Tensor, box: Box, shape: Sequence[int], dtype: torch.dtype
) -> Callable[[bytearray], None]:
    """Puts what was read of a chunk of ``shape``, from the first element of ``box`` to its last."""

    def finish(buffer: bytearray) -> None:
        read = torch.frombuffer(buffer, dtype=dtype)
        put(name, target, read.as_strided(extents(box), contiguous_strides(shape)))

    return finish


@dataclass(frozen=True, slots=True)
class Numbers:
    """A part of a quantised tensor as it is stored, and the scales that it needs."""

    quantised: Quantised
    box: Box
    """Which part of the chunk."""
    chunk: ChunkStorageMetadata
    dtype: torch.dtype
    scales: torch.Tensor
    scale_box: Box
    """Which part of all scales these are."""

    def values(self, buffer: bytearray) -> Iterator[tuple[Box, torch.Tensor]]:
        """What the bytes in ``buffer`` mean, and where it lies in the whole tensor."""
        read = torch.frombuffer(buffer, dtype=self.dtype)
        numbers = read.as_strided(extents(self.box), contiguous_strides(self.chunk.sizes))
        # from the chunk's own corner to the tensor's
        stored = relative(self.box, [-offset for offset in self.chunk.offsets])
        scales_at = [low for low, _ in self.scale_box]
        return self.quantised.values(numbers, stored, self.scales, scales_at)


def numbers_finisher(put: Put, name: str, region: Region, numbers: Numbers) -> Callable[[bytearray], None]:
    """Puts what is made of quantised ``numbers`` where it lies in ``region``."""
    wanted = box_at(region.offsets, region.tensor.shape)

    def finish(buffer: bytearray) -> None:
        for box, values in numbers.values(buffer):
            # whole groups are read, of which the region may want a part
            if (inside := common(box, wanted)) is not None:
                target = region.tensor.detach()[slices(relative(inside, region.offsets))]
                put(name, target, values[slices(relative(inside, [low for low, _ in box]))])

    return finish


def scatter(batch: Iterable[FetchBuffers]) -> None:
    """Bring the bytes of a batch, all verified, to where they belong.

    Raises: DamagedError, CoverageError, FillError, UnsupportedError, UntrustedGlobal.
    """
    for buffers in batch:
        try:
            buffers.scatter()
        except (DamagedError, CoverageError):
            raise
        except (ValueError, RuntimeError, TypeError) as error:
            # torch refuses bytes that are no tensor of the shape and dtype that `.metadata` promised
            raise DamagedError(str(error), [piece.name for piece in buffers.span.pieces]) from error
        except (FillError, UnsupportedError, UntrustedGlobal, *ENDINGS):
            raise
        except BaseException as error:
            names = tuple(dict.fromkeys(piece.name for piece in buffers.span.pieces))
            raise FillError(f"{', '.join(names[:5])}: {words(error)}", names) from error
