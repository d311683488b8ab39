"""What a load reads: from DCP's Metadata and the wanted names to byte ranges of files, each with its
destination.

Enters: a checkpoint's contents and the targets. Leaves: Pieces, file by file. Pure: no I/O. Invariant: every
byte of every target is covered before a target is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from .._foreign import ENDINGS, FillError, words
from .._geometry import (
    Box,
    CoverageError,
    box_at,
    check_coverage,
    common,
    contiguous_run,
    contiguous_strides,
    cut_box,
    extents,
    relative,
    shifted,
    slices,
)
from ..formats import BLOCK_BYTES, PLAIN_DTYPES, StoredItem, UnsupportedError, inflated_bound, tensor_frame
from ..state import PLAIN_TENSORS, Region, joined, pairs, part_of
from ..trust import Trust, UntrustedGlobal
from .fetch import DamagedError, Fill, Piece, host_memory

_READ_BYTES = 32 << 20
"""The most that is read at once for what can't go straight into its target."""


_COMPRESSED = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})


@dataclass(slots=True, kw_only=True)
class Source:
    """Where a checkpoint's items lie and how to read them."""

    tensors: Mapping[str, TensorStorageMetadata]
    places: Mapping[MetadataIndex, tuple[str, int, int]]
    """Index -> (file, offset, length)."""
    raw_files: frozenset[str]
    """Files whose plain tensor items are laid out by our format: payload at a known place."""
    exotic: frozenset[str]
    transforms: Mapping[MetadataIndex, tuple[str, ...]]
    """Index -> descriptors of torch's stream extensions, of the items that they wrote."""
    trust: Trust


def _is_inside(box: Box, shape: Sequence[int]) -> bool:
    return len(box) == len(shape) and all(
        0 <= low <= high <= extent for (low, high), extent in zip(box, shape, strict=True)
    )


class Collector:
    """Gathers the pieces of one load, file by file."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.pieces: dict[str, list[Piece]] = {}
        self.nbytes = 0
        self.items: list[StoredItem] = []
        """What ``torch.load`` will decode, among it."""
        self._keep: list[torch.Tensor] = []

    def _add(self, file: str, piece: Piece) -> None:
        self.pieces.setdefault(file, []).append(piece)
        self.nbytes += piece.nbytes

    def _place(self, name: str, index: MetadataIndex) -> tuple[str, int, int]:
        try:
            return self._source.places[index]
        except KeyError:
            raise DamagedError(
                f"{name}: .metadata does not say where its item {index} lies", [name]
            ) from None

    def _want_item(
        self, name: str, index: MetadataIndex, sizes: Sequence[int], receive: Callable[[Any], None]
    ) -> None:
        """Read an item whole, decode it and hand its value over. Raises DamagedError, UnsupportedError."""
        file, offset, length = self._place(name, index)
        if length == 0:
            raise DamagedError(f"{name}: its item in {file} is empty", [name])
        item = StoredItem(
            name=name,
            file=file,
            offset=offset,
            length=length,
            descriptors=self._source.transforms.get(index, ()),
            max_bytes=inflated_bound(self._source.tensors.get(name), sizes, length),
            has_digests=file in self._source.raw_files,
            trust=self._source.trust,
        )
        item.check_readable()
        self.items.append(item)
        self._add(file, Piece(offset, length, Fill(length, _item_finisher(item, receive)), 0, name))

    def want_head(self, item: StoredItem, doubtful: Collector) -> None:
        """Judge ``item`` by its first bytes; where they do not suffice, ``doubtful`` gets all of it, to be
        decoded and thrown away."""

        def finish(head: bytearray) -> None:
            if not item.judge(head):
                whole = Fill(item.length, _item_finisher(item, lambda value: None))
                doubtful._add(item.file, Piece(item.offset, item.length, whole, 0, item.name))

        nbytes = item.head_bytes
        self._add(item.file, Piece(item.offset, nbytes, Fill(nbytes, finish), 0, item.name))

    def want_leaf(self, name: str, receive: Callable[[str, Any], None]) -> None:
        """Read the item ``name``, a pickled leaf or a whole tensor stored as one, and hand its value over."""
        meta = self._source.tensors.get(name)
        if meta is not None and len(meta.chunks) != 1:
            self.want_joined(name, box_at((0,) * len(meta.size), meta.size), receive)
            return
        offsets, sizes = (meta.chunks[0].offsets, meta.chunks[0].sizes) if meta else (None, ())
        self._want_item(name, MetadataIndex(name, offsets), sizes, lambda value: receive(name, value))

    def want_joined(self, name: str, wanted: Box, receive: Callable[[str, Any], None]) -> None:
        """Hand over a tensor made of what ``wanted`` meets of the chunks of one that is more than bytes.

        Raises: CoverageError, DamagedError, UnsupportedError.
        """
        meta = self._source.tensors[name]
        found: dict[int, torch.Tensor] = {}
        boxes = self._chunk_boxes(name, meta)
        met = [(chunk, part) for chunk, box in zip(meta.chunks, boxes, strict=True)
               if (part := common(box, wanted)) is not None]  # fmt: skip
        sides = {tuple(part[1:]) for _, part in met}
        if not met or sides != {tuple(wanted[1:])}:
            raise CoverageError(f"{name}: its chunks can't be put side by side")
        check_coverage(extents(wanted), [relative(part, [low for low, _ in wanted]) for _, part in met])

        def collect(chunk: ChunkStorageMetadata, part: Box) -> Callable[[Any], None]:
            def take(value: Any) -> None:
                self._check_item(name, value, tuple(chunk.sizes))
                try:
                    found[part[0][0]] = part_of(value, relative(part, chunk.offsets))
                    if len(found) == len(met):
                        receive(name, joined([found[at] for at in sorted(found)]))
                except ValueError as error:
                    raise CoverageError(f"{name}: {error}") from error

            return take

        for chunk, part in met:
            index = MetadataIndex(name, chunk.offsets)
            self._want_item(name, index, chunk.sizes, collect(chunk, part))

    def want_pairs(
        self, name: str, regions: Iterable[Region], hold: Callable[[str, torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Read what ``regions``, of tensors made of others, are to be filled with; ``hold`` gets the inner
        tensors (target, source), which are copied once all fits.

        Raises: CoverageError, DamagedError, UnsupportedError.
        """
        meta = self._source.tensors[name]
        boxes = self._chunk_boxes(name, meta)

        def receiver(
            target: torch.Tensor, at: Box, chunk: ChunkStorageMetadata, part: Box
        ) -> Callable[[Any], None]:
            def take(value: Any) -> None:
                self._check_item(name, value, tuple(chunk.sizes))
                try:
                    found = pairs(target, at, value, part)
                except ValueError as error:
                    raise CoverageError(f"{name}: {error}") from error
                for inner, source in found:
                    hold(name, inner, source)

            return take

        for region in regions:
            wanted = box_at(region.offsets, region.tensor.shape)
            met = [(chunk, common(box, wanted)) for chunk, box in zip(meta.chunks, boxes, strict=True)]
            here = [relative(box, region.offsets) for _, box in met if box is not None]
            try:
                check_coverage(region.tensor.shape, here)
                for at in here:
                    part_of(region.tensor, at)
            except ValueError as error:
                raise CoverageError(f"{name}: {error}") from error
            for chunk, box in met:
                if box is not None:
                    at, part = relative(box, region.offsets), relative(box, chunk.offsets)
                    index = MetadataIndex(name, chunk.offsets)
                    self._want_item(name, index, chunk.sizes, receiver(region.tensor, at, chunk, part))

    def _check_item(self, name: str, value: Any, shape: tuple[int, ...]) -> None:
        dtype = self._source.tensors[name].properties.dtype
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
            raise DamagedError(f"{name}: its item is not the tensor of {shape} that .metadata names", [name])

    def want_tensor(self, name: str, regions: Iterable[Region]) -> None:
        """Fill ``regions`` of a tensor.

        Raises: CoverageError, DamagedError, UnsupportedError.
        """
        meta = self._source.tensors[name]
        boxes: list[Box] = []
        for region in regions:
            tensor = region.tensor
            if len(meta.chunks) == 1 and self._want_whole(name, meta.size, meta.chunks[0], tensor):
                continue
            boxes = boxes or self._chunk_boxes(name, meta)
            wanted = box_at(region.offsets, tensor.shape)
            met = [(chunk, common(box, wanted)) for chunk, box in zip(meta.chunks, boxes, strict=True)]
            here = [relative(box, region.offsets) for _, box in met if box is not None]
            try:
                check_coverage(tensor.shape, here)
            except CoverageError as error:
                raise CoverageError(f"{name}: {error}") from None
            for chunk, box in met:
                if box is not None:
                    at = relative(box, region.offsets)
                    self._want_part(name, chunk, relative(box, chunk.offsets), tensor, at)

    @staticmethod
    def _chunk_boxes(name: str, meta: TensorStorageMetadata) -> list[Box]:
        boxes = [box_at(chunk.offsets, chunk.sizes) for chunk in meta.chunks]
        if not all(_is_inside(box, meta.size) for box in boxes):
            raise DamagedError(f"{name}: a chunk lies outside of the tensor", [name])
        if sum(chunk.sizes.numel() for chunk in meta.chunks) > meta.size.numel():
            raise DamagedError(f"{name}: its chunks overlap", [name])
        return boxes

    def _want_whole(
        self, name: str, size: torch.Size, chunk: ChunkStorageMetadata, target: torch.Tensor
    ) -> bool:
        """Read a chunk that is all of ``target`` straight into it, if that is possible: most tensors by
        far."""
        if chunk.sizes != size or size != target.shape or any(chunk.offsets) or not target.numel():
            return False
        dtype = self._source.tensors[name].properties.dtype
        memory = self._memory(target, dtype)
        file, offset, length = self._place(name, MetadataIndex(name, chunk.offsets))
        if memory is None or not self._is_raw(name, file, dtype):
            return False
        payload = self._payload(name, offset, length, dtype, tuple(size))
        self._add(file, Piece(payload, len(memory), memory, 0, name))
        return True

    def _is_raw(self, name: str, file: str, dtype: torch.dtype) -> bool:
        """Whether the item is laid out by our format, its payload at a known place."""
        return file in self._source.raw_files and name not in self._source.exotic and dtype in PLAIN_DTYPES

    @staticmethod
    def _payload(name: str, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        """Where the payload of a raw item begins. Raises DamagedError if the item has another length."""
        head, tail = tensor_frame(dtype, shape)
        nbytes = dtype.itemsize
        for extent in shape:
            nbytes *= extent
        if length != len(head) + nbytes + len(tail):
            raise DamagedError(
                f"{name}: its item has {length} bytes, a chunk of {shape} {dtype} has others", [name]
            )
        return offset + len(head)

    def _memory(self, target: torch.Tensor, dtype: torch.dtype) -> memoryview | None:
        """The bytes of ``target``, if elements of ``dtype`` can be read straight into them."""
        plain = type(target) in PLAIN_TENSORS and target.dtype == dtype and target.is_cpu
        plain = plain and target.layout is torch.strided
        if not plain or target.is_conj() or target.is_neg() or not target.is_contiguous():
            return None
        self._keep.append(target)
        return host_memory(target.detach())

    def _want_part(
        self, name: str, chunk: ChunkStorageMetadata, part: Box, target: torch.Tensor, at: Box
    ) -> None:
        """Copy ``part`` of a stored chunk to ``at`` of ``target``."""
        index = MetadataIndex(name, chunk.offsets)
        file, offset, length = self._place(name, index)
        shape = tuple(chunk.sizes)
        dtype = self._source.tensors[name].properties.dtype
        if not self._is_raw(name, file, dtype):
            if length == dtype.itemsize * chunk.sizes.numel() and self._is_stocks_plain(name, file, index):
                # no item of torch.save's is as short as its elements
                raise UnsupportedError(
                    f"{name} was written with SerializationFormat.SAFETENSORS, which stock DCP itself can't "
                    f"load again; read {file} with the safetensors package, or save in the usual format"
                )
            # a whole tensor is not indexed: sparse ones can't be
            place = target if extents(at) == tuple(target.shape) else target[slices(at)]
            self._want_item(name, index, shape, self._tensor_receiver(name, place, shape, part))
            return
        memory, step = self._memory(target, dtype), dtype.itemsize
        payload = self._payload(name, offset, length, dtype, shape)
        cuts: Iterable[tuple[Box, int, int]]
        whole = contiguous_run(part, shape) if memory is not None else None
        if whole is not None and contiguous_run(at, target.shape) is not None:
            cuts = [(part, whole[0] * step, whole[1] * step)]
        else:
            cuts = cut_box(part, shape, step, gap_bytes=BLOCK_BYTES, limit_bytes=_READ_BYTES)
        for cut, first, count in cuts:
            there = shifted(cut, part, at)
            fits = memory is not None and contiguous_run(cut, shape) is not None
            run = contiguous_run(there, target.shape) if fits else None
            if memory is not None and run is not None:
                piece = Piece(payload + first, count, memory, run[0] * step, name)
            else:
                finish = _part_finisher(name, target.detach()[slices(there)], cut, shape, dtype)
                piece = Piece(payload + first, count, Fill(count, finish), 0, name)
            self._add(file, piece)

    def _is_stocks_plain(self, name: str, file: str, index: MetadataIndex) -> bool:
        properties = self._source.tensors[name].properties
        return (
            file not in self._source.raw_files
            and index not in self._source.transforms
            and properties.dtype in PLAIN_DTYPES
            and properties.layout is torch.strided
        )

    def _tensor_receiver(
        self, name: str, target: torch.Tensor, shape: tuple[int, ...], part: Box
    ) -> Callable[[Any], None]:
        def receive(value: Any) -> None:
            self._check_item(name, value, shape)
            # not the target's detach(): that of a sparse tensor is a copy
            copy_exotic(name, target, value if extents(part) == shape else value[slices(part)])

        return receive


def copy_exotic(name: str, target: torch.Tensor, value: torch.Tensor) -> None:
    """``target.copy_(value)``, where a sparse target may hold another number of elements. Raises FillError:
    a subclass runs its own code."""
    try:
        if target.layout in _COMPRESSED:
            target.resize_as_sparse_(value)
        target.copy_(value)
    except ENDINGS:
        raise
    except BaseException as error:
        what = f"the {type(target).__name__} in the state would not take its value"
        raise FillError(f"{name}: {what} ({words(error)})", (name,)) from error


def _item_finisher(item: StoredItem, receive: Callable[[Any], None]) -> Callable[[bytearray], None]:
    def finish(stored: bytearray) -> None:
        try:
            value = item.decode(stored)
        except ValueError as error:
            raise DamagedError(f"{item.name} in {item.file}: {error}", [item.name]) from error
        except (UnsupportedError, UntrustedGlobal, *ENDINGS):
            raise
        except BaseException as error:  # making an object runs code of its class
            raise FillError(f"{item.name}: its value can't be made ({words(error)})", (item.name,)) from error
        receive(value)

    return finish


def _part_finisher(
    name: str, place: torch.Tensor, part: Box, shape: Sequence[int], dtype: torch.dtype
) -> Callable[[bytearray], None]:
    """Copies what was read of a chunk of ``shape``, from the first element of ``part`` to its last."""

    def finish(buffer: bytearray) -> None:
        read = torch.frombuffer(buffer, dtype=dtype)
        copy_exotic(name, place, read.as_strided(extents(part), contiguous_strides(shape)))

    return finish
