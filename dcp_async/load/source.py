"""Source: where a checkpoint's items lie in its files, and which of them are a payload at a known place.

Enters: a checkpoint's contents. Leaves: locations, boxes of chunks, what of them a region meets. Pure.
Invariant: what `.metadata` says of a tensor is checked before anything is read by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from .._geometry import Box, CoverageError, box_at, check_coverage, common, relative
from ..catalog import Contents
from ..formats import PLAIN_DTYPES, ItemKey, Quantised
from ..state import Region
from ..trust import Trust
from .failures import DamagedError


@dataclass(slots=True, kw_only=True)
class Source:
    """Where a checkpoint's items lie and how to read them."""

    tensors: Mapping[str, TensorStorageMetadata]
    locations: Mapping[ItemKey, tuple[str, int, int]]
    """Item -> (file, offset, length)."""
    raw_files: frozenset[str]
    """Files whose plain tensor items are laid out by our format: payload at a known place."""
    bare_files: frozenset[str]
    """Files whose items are payload and nothing else."""
    exotic: frozenset[str]
    transforms: Mapping[ItemKey, tuple[str, ...]]
    """Item -> descriptors of torch's stream extensions, of the items that they wrote."""
    quantised: Mapping[str, Quantised]
    """Tensors whose values are made of what ``stored`` tells."""
    stored: Source | None
    """What lies in the files, under its own names, where some of it is quantised."""
    trust: Trust

    @classmethod
    def of(cls, contents: Contents, trust: Trust) -> Source:
        """What an opened checkpoint tells of its items."""
        return cls(
            tensors=contents.tensors,
            locations=contents.locations,
            # only our files end in checksums
            raw_files=frozenset(contents.digests),
            bare_files=contents.bare,
            exotic=contents.exotic,
            transforms=contents.transforms,
            quantised=contents.quantised,
            stored=None if contents.stored is None else cls.of(contents.stored, trust),
            trust=trust,
        )

    def is_raw(self, name: str, file: str, dtype: torch.dtype) -> bool:
        """Whether the item is laid out by our format, its payload at a known place."""
        if file in self.bare_files:
            return True
        return file in self.raw_files and name not in self.exotic and dtype in PLAIN_DTYPES

    def is_plain_of_stock(self, file: str, key: ItemKey) -> bool:
        """Whether the item is a plain tensor that stock wrote without a stream extension."""
        properties = self.tensors[key[0]].properties
        return (
            file not in self.raw_files
            and key not in self.transforms
            and properties.dtype in PLAIN_DTYPES
            and properties.layout is torch.strided
        )

    def location(self, key: ItemKey) -> tuple[str, int, int]:
        """(file, offset, length) of an item. Raises DamagedError."""
        try:
            return self.locations[key]
        except KeyError:
            name, offsets = key
            item = "" if offsets is None else f" at {list(offsets)}"
            raise DamagedError(f"{name}: .metadata does not say where its item{item} lies", [name]) from None

    def chunk_boxes(self, name: str) -> list[Box]:
        """Where the chunks of a tensor lie in it. Raises DamagedError if they can't lie so."""
        meta = self.tensors[name]
        boxes = [box_at(chunk.offsets, chunk.sizes) for chunk in meta.chunks]
        if not all(_is_inside(box, meta.size) for box in boxes):
            raise DamagedError(f"{name}: a chunk lies outside of the tensor", [name])
        # cheap, and before anybody looks at all pairs: a hostile list of chunks may be long
        if sum(chunk.sizes.numel() for chunk in meta.chunks) > meta.size.numel():
            raise DamagedError(f"{name}: its chunks overlap", [name])
        return boxes

    def overlaps(
        self, name: str, boxes: Iterable[Box], region: Region
    ) -> list[tuple[ChunkStorageMetadata, Box, Box]]:
        """Chunks that hold some of ``region``, each with (what of the chunk, where in the region). Raises
        CoverageError unless they hold all of it once."""
        shape = region.tensor.shape
        wanted = box_at(region.offsets, shape)
        met = [
            (chunk, relative(box, chunk.offsets), relative(box, region.offsets))
            for chunk, chunk_box in zip(self.tensors[name].chunks, boxes, strict=True)
            if (box := common(chunk_box, wanted)) is not None
        ]
        try:
            check_coverage(shape, [in_region for _, _, in_region in met])
        except CoverageError as error:
            raise CoverageError(f"{name}: {error}") from None
        return met

    def check_item(self, name: str, value: Any, shape: tuple[int, ...]) -> None:
        """Raises DamagedError unless a decoded ``value`` is a chunk as `.metadata` names it."""
        dtype = self.tensors[name].properties.dtype
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
            raise DamagedError(f"{name}: its item is not the tensor of {shape} that .metadata names", [name])


def _is_inside(box: Box, shape: Sequence[int]) -> bool:
    return len(box) == len(shape) and all(
        0 <= low <= high <= extent for (low, high), extent in zip(box, shape, strict=True)
    )
