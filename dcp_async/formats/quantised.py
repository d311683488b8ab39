"""Tensors that are quantised in blocks, as Hugging Face's files hold them, and how values are made of them.

Enters: names, shapes and dtypes of stored tensors, and a config.json. Leaves: what each quantised tensor is
when plain, which boxes of what is stored any box of it needs, and its values. Pure: no I/O. Invariant: scales
fit their tensor before a value is made.
Source: torch's quantized_hf_storage.py, transformers' integrations/{finegrained_fp8,mxfp4}.py, the OCP
Microscaling specification (MXFP4).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from .._geometry import Box, box_at, extents
from .safetensors_header import HeaderError, parse_mapping
from .stored_item import UnsupportedError

_SCALE_INV = "_scale_inv"
_METHODS = ("fp8", "mxfp4")
_FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_BLOCK = (128, 128)
"""What a block is where config.json says nothing of it."""
_MAX_EXTENT = 1 << 62
_MAX_GROUP_BYTES = 4096
"""A group of MXFP4 has 16: one that is longer could not be read by whole groups."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# times 4, and exponents by 2 less: else the last power would not fit into single precision, as products do.
# By the specification that exponent makes no number; to torch and transformers it is one like any other
_PAIRS = tuple((4 * _FP4[byte & 15], 4 * _FP4[byte >> 4]) for byte in range(256))
"""What each byte of MXFP4 means, times 4."""
_POWERS = tuple(2.0 ** (byte - 129) for byte in range(256))
"""What each exponent means, divided by 4."""


def plain_dtype(dtype: Any) -> torch.dtype | None:
    """``dtype``, if values can be made plain in it. Raises TypeError, ValueError."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dequantize is a torch.dtype such as torch.bfloat16, not {dtype!r}")
    if dtype is not None and dtype not in _PLAIN:
        raise ValueError(f"dequantize is one of {', '.join(map(str, _PLAIN))}, not {dtype}")
    return dtype


def may_be_quantised(names: Iterable[str]) -> bool:
    """Whether some of ``names`` look like scales of blocks, so that config.json matters."""
    return any(name.endswith((_SCALE_INV, "_scales", ".scales")) for name in names)


@dataclass(frozen=True, slots=True)
class Quantised(ABC):
    """One tensor that is stored as small numbers and scales."""

    weight: str
    """What holds the numbers, by its name in the file."""
    scales: str
    """What holds a scale for each block of them."""
    meta: TensorStorageMetadata
    """What it is when plain."""

    @property
    @abstractmethod
    def cut_bytes(self) -> int:
        """How many stored bytes are made plain at once: what that takes is a few times as much."""

    @abstractmethod
    def stored_box(self, box: Box) -> Box:
        """Which stored numbers the values in ``box`` are made of."""

    @abstractmethod
    def scale_box(self, stored: Box) -> Box:
        """The scales of the numbers in ``stored``."""

    @abstractmethod
    def values(
        self, numbers: torch.Tensor, stored: Box, scales: torch.Tensor, scales_at: Sequence[int]
    ) -> Iterator[tuple[Box, torch.Tensor]]:
        """Plain values, and the box that they are, of ``numbers``, which are those in ``stored``.

        Args:
            scales: those from ``scales_at`` on, as far as they are needed.
        """


@dataclass(frozen=True, slots=True)
class BlockFp8(Quantised):
    """Eight-bit floats; each rectangle of rows and columns has a factor."""

    block: tuple[int, int]
    """Rows and columns of a rectangle."""
    one_scale: Box | None
    """All of the scales, where that is a single one, of whatever rank."""

    @property
    def cut_bytes(self) -> int:
        return 2 << 20

    def stored_box(self, box: Box) -> Box:
        return box

    def scale_box(self, stored: Box) -> Box:
        if self.one_scale is not None:
            return self.one_scale
        *lead, (top, bottom), (left, right) = stored
        height, width = self.block
        return (*lead, (top // height, -(-bottom // height)), (left // width, -(-right // width)))

    def values(
        self, numbers: torch.Tensor, stored: Box, scales: torch.Tensor, scales_at: Sequence[int]
    ) -> Iterator[tuple[Box, torch.Tensor]]:
        *lead, (top, bottom), (left, right) = stored
        height, width = self.block
        dtype = self.meta.properties.dtype
        if self.one_scale is not None:
            scales, scales_at = scales.reshape((1,) * len(stored)), (0,) * len(stored)
        # the factor of each column, whether or not the box begins where a block does
        columns = torch.arange(left, right, device="cpu").floor_divide_(width).sub_(scales_at[-1])
        for index in itertools.product(*(range(low, high) for low, high in lead)):
            own = tuple(number - low for number, (low, _) in zip(index, lead, strict=True))
            of_index = scales[tuple(number - low for number, low in zip(index, scales_at[:-2], strict=True))]
            # by rows of blocks: each is a few MB in single precision, and one factor for each column
            for row in range(top // height, -(-bottom // height)):
                low, high = max(row * height, top), min((row + 1) * height, bottom)
                # CPUs multiply no eight-bit floats, and torch's own reader rounds once, from single precision
                part = numbers[own][low - top : high - top].to(torch.float32)
                part *= of_index[row - scales_at[-2]].to(torch.float32)[columns]
                box = (*((number, number + 1) for number in index), (low, high), (left, right))
                yield box, part.to(dtype).reshape(extents(box))


@dataclass(frozen=True, slots=True)
class Mxfp4(Quantised):
    """Four-bit floats, two to a byte, the lower half first; each group of them has an exponent."""

    group_bytes: int
    """A group is the last dimension of what is stored."""

    @property
    def cut_bytes(self) -> int:
        return 1 << 20

    def stored_box(self, box: Box) -> Box:
        *lead, (low, high) = box
        values = 2 * self.group_bytes
        return (*lead, (low // values, -(-high // values)), (0, self.group_bytes))

    def scale_box(self, stored: Box) -> Box:
        return stored[:-1]

    def values(
        self, numbers: torch.Tensor, stored: Box, scales: torch.Tensor, scales_at: Sequence[int]
    ) -> Iterator[tuple[Box, torch.Tensor]]:
        dtype = self.meta.properties.dtype
        exact = torch.promote_types(dtype, torch.float32)
        pairs = torch.tensor(_PAIRS, dtype=exact, device="cpu")
        powers = torch.tensor(_POWERS, dtype=exact, device="cpu")
        of_groups = self.scale_box(stored)
        own = tuple(
            slice(low - first, high - first) for (low, high), first in zip(of_groups, scales_at, strict=True)
        )
        # three times as fast as indexing
        plain = torch.nn.functional.embedding(numbers.to(torch.int32), pairs)
        plain *= powers[scales[own].to(torch.int64)][..., None, None]
        *lead, (low, high), _ = stored
        box = (*lead, (low * 2 * self.group_bytes, high * 2 * self.group_bytes))
        yield box, plain.reshape(extents(box)).to(dtype)


def quantised_among(
    tensors: Mapping[str, TensorStorageMetadata], config: bytes | None, dtype: torch.dtype
) -> dict[str, Quantised]:
    """Those of ``tensors`` that are quantised, by their names, to be made plain in ``dtype``.

    Args:
        config: the model's config.json; None if it has none.
    Raises: HeaderError for what contradicts itself; UnsupportedError for another way to quantise.
    """
    block = _block_of(config)
    quantised: dict[str, Quantised] = {}
    for scales in tensors:
        if scales.endswith(_SCALE_INV) and (weight := scales.removesuffix(_SCALE_INV)) in tensors:
            quantised[weight] = _block_fp8(weight, scales, tensors, block, dtype)
        for separator in "_.":
            blocks = f"{scales.removesuffix('scales')}blocks"
            if scales.endswith(f"{separator}scales") and blocks in tensors:
                kinds = {tensors[name].properties.dtype for name in (scales, blocks)}
                if kinds == {torch.uint8}:  # else it only has such a name
                    quantised[blocks] = _mxfp4(blocks, scales, tensors, dtype)
    return quantised


def _block_of(config: bytes | None) -> tuple[int, int]:
    """The size of a block that ``config`` tells. Raises HeaderError, UnsupportedError."""
    told = parse_mapping(config, "config.json").get("quantization_config") if config is not None else None
    # not every copy of a model has it, and its files say enough: whether scales fit is looked at below
    if told is None:
        return _BLOCK
    if not isinstance(told, dict):
        raise HeaderError("the quantization_config of config.json is no mapping")
    method = told.get("quant_method")
    if method is not None and method not in _METHODS:
        raise UnsupportedError(
            f"config.json says that it is quantised by {str(method)[:40]!r}, and dequantize= knows "
            f"{' and '.join(_METHODS)} alone; read it as it is stored, or load it with transformers"
        )
    size = told.get("weight_block_size")
    if size is None:
        return _BLOCK
    is_pair = isinstance(size, list) and len(size) == 2
    if not is_pair or not all(type(extent) is int and 0 < extent < _MAX_EXTENT for extent in size):
        raise HeaderError(f"config.json has weight_block_size {str(size)[:80]}, which is no pair of sizes")
    return size[0], size[1]


def _block_fp8(
    weight: str,
    scales: str,
    tensors: Mapping[str, TensorStorageMetadata],
    block: tuple[int, int],
    dtype: torch.dtype,
) -> BlockFp8:
    stored, of_blocks = tensors[weight], tensors[scales]
    if stored.properties.dtype not in _FLOAT8:
        raise UnsupportedError(
            f"{weight} is {stored.properties.dtype} with scales in {scales}, and dequantize= knows float8 "
            "with such scales alone; read the values as they are stored"
        )
    if not of_blocks.properties.dtype.is_floating_point or len(stored.size) < 2:
        raise HeaderError(
            f"{weight} of {tuple(stored.size)} can't be scaled by {scales}, which is "
            f"{of_blocks.properties.dtype}"
        )
    *lead, rows, columns = stored.size
    expected = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    one_scale = None
    if prod(of_blocks.size) == 1 == prod(lead):  # for all of it, whatever config.json says
        one_scale, block = box_at((0,) * len(of_blocks.size), of_blocks.size), (max(rows, 1), max(columns, 1))
    elif tuple(of_blocks.size) != expected:
        raise HeaderError(
            f"{scales} is {tuple(of_blocks.size)}, and {weight} of {tuple(stored.size)} in blocks of "
            f"{block[0]}x{block[1]} needs {expected}"
        )
    properties = TensorProperties(dtype=dtype)
    meta = TensorStorageMetadata(properties=properties, size=stored.size, chunks=stored.chunks)
    return BlockFp8(weight, scales, meta, block, one_scale)


def _mxfp4(
    blocks: str, scales: str, tensors: Mapping[str, TensorStorageMetadata], dtype: torch.dtype
) -> Mxfp4:
    stored, of_groups = tensors[blocks], tensors[scales]
    # a size of zero elsewhere may hide an extent that no tensor can have
    *groups, group_bytes = stored.size if stored.size else (0,)
    fits = groups == list(of_groups.size) and groups and 0 < group_bytes <= _MAX_GROUP_BYTES
    if not fits or groups[-1] * 2 * group_bytes >= _MAX_EXTENT:
        raise HeaderError(
            f"{blocks} of {tuple(stored.size)} and {scales} of {tuple(of_groups.size)} are no groups with a "
            "scale each"
        )
    if any(chunk.sizes[-1] != group_bytes for chunk in stored.chunks):
        raise HeaderError(f"a part of {blocks} ends within a group")

    def plain(sizes: Sequence[int]) -> torch.Size:
        return torch.Size([*sizes[:-2], sizes[-2] * 2 * group_bytes])

    chunks = [ChunkStorageMetadata(plain(chunk.offsets), plain(chunk.sizes)) for chunk in stored.chunks]
    properties = TensorProperties(dtype=dtype)
    meta = TensorStorageMetadata(properties=properties, size=plain(stored.size), chunks=chunks)
    return Mxfp4(blocks, scales, meta, group_bytes)


def stored_chunks(quantised: Quantised, stored: TensorStorageMetadata) -> list[tuple[torch.Size, torch.Size]]:
    """(offsets when plain, offsets as stored) of each chunk."""
    return [
        (plain.offsets, chunk.offsets)
        for plain, chunk in zip(quantised.meta.chunks, stored.chunks, strict=True)
    ]
