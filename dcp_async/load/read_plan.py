"""ReadPlan: from DCP's Metadata and the wanted names to byte ranges of files, each with its destination.

Enters: a checkpoint's contents and the targets. Leaves: Pieces, file by file. Pure: no I/O. Invariant: every
byte of every target is covered before a target is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

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
from ..formats import (
    BLOCK_BYTES,
    ItemKey,
    Quantised,
    StoredItem,
    UnsupportedError,
    inflated_bound,
    tensor_frame,
)
from ..state import PLAIN_TENSORS, Region, joined, pairs, part_of
from .device_writes import DeviceWrites
from .failures import DamagedError
from .place import (
    Numbers,
    Put,
    Receive,
    copy_exotic,
    is_plain,
    item_finisher,
    numbers_finisher,
    rows_finisher,
)
from .source import Source
from .spans import DeviceTarget, Fill, Piece, host_memory

_READ_BYTES = 32 << 20
"""The most that is read at once for what can't go straight into its target."""


class ReadPlan:
    """The pieces that one pass over the files reads, file by file."""

    def __init__(self, source: Source, writes: DeviceWrites | None = None) -> None:
        """``writes``: what reaches targets on devices, if any are there."""
        self._source = source
        self._writes = writes
        self._put: Put = copy_exotic if writes is None else writes.put
        self.pieces: dict[str, list[Piece]] = {}
        self.before: ReadPlan | None = None
        """What must have arrived before any of these pieces: the scales of what is quantised."""
        self.nbytes = 0
        self.items: list[StoredItem] = []
        """What ``torch.load`` will decode, among it."""
        self._keep: list[torch.Tensor] = []
        """Tensors whose memory pieces point into."""
        self._frames: dict[tuple[torch.dtype, torch.Size], tuple[int, int]] = {}
        """(bytes before the payload, bytes in all) of raw items that are alike."""

    def _add(self, file: str, piece: Piece) -> None:
        self.pieces.setdefault(file, []).append(piece)
        self.nbytes += piece.nbytes

    def want_item(self, key: ItemKey, sizes: Sequence[int], receive: Receive, *, raw: bool = False) -> None:
        """Read an item and hand its value over, or itself. Raises DamagedError, UnsupportedError."""
        name, _ = key
        file, offset, length = self._source.location(key)
        # no bytes arrive for it, so it would never be finished
        if length == 0:
            raise DamagedError(f"{name}: its item in {file} is empty", [name])
        item = StoredItem(
            name=name,
            file=file,
            offset=offset,
            length=length,
            descriptors=self._source.transforms.get(key, ()),
            max_bytes=inflated_bound(self._source.tensors.get(name), sizes, length),
            has_digests=file in self._source.raw_files,
            trust=self._source.trust,
        )
        item.check_readable()  # before anything is read: what lacks an extension can't be helped
        self.items.append(item)
        whole = Fill(length, item_finisher(item, receive, as_bytes=raw))
        self._add(file, Piece(offset, length, whole, 0, name))

    def want_head(self, item: StoredItem, doubt: Callable[[StoredItem], None]) -> None:
        """Judge ``item`` by its first bytes; ``doubt`` gets it where they do not suffice."""

        def finish(head: bytearray) -> None:
            if not item.judge(head):
                doubt(item)

        nbytes = item.head_bytes
        self._add(item.file, Piece(item.offset, nbytes, Fill(nbytes, finish), 0, item.name))

    def want_trial(self, item: StoredItem) -> None:
        """Decode the whole of ``item`` and throw it away: it raises what it would raise later."""
        whole = Fill(item.length, item_finisher(item, lambda value: None))
        self._add(item.file, Piece(item.offset, item.length, whole, 0, item.name))

    def want_leaf(self, name: str, receive: Callable[[str, Any], None]) -> None:
        """Read the item ``name``, a pickled leaf or a whole tensor stored as one, and hand its value over."""
        meta = self._source.tensors.get(name)
        if meta is not None and len(meta.chunks) != 1:
            self.want_joined(name, box_at((0,) * len(meta.size), meta.size), receive)
            return
        # leaves have no offsets, and .metadata does not say how long they are
        offsets, sizes = (meta.chunks[0].offsets, meta.chunks[0].sizes) if meta else (None, ())
        self.want_item((name, offsets), sizes, lambda value: receive(name, value))

    def want_bytes(self, name: str, receive: Callable[[str, Any], None]) -> None:
        """Read the pickled leaf ``name`` and hand its item over, once trust has admitted what it holds."""
        self.want_item((name, None), (), lambda item: receive(name, item), raw=True)

    def want_joined(self, name: str, wanted: Box, receive: Callable[[str, Any], None]) -> None:
        """Hand over a tensor made of what ``wanted`` meets of the chunks of one that is more than bytes.

        Raises: CoverageError, DamagedError, UnsupportedError.
        """
        source = self._source
        met = [
            (chunk, box)
            for chunk, chunk_box in zip(source.tensors[name].chunks, source.chunk_boxes(name), strict=True)
            if (box := common(chunk_box, wanted)) is not None
        ]
        # inner tensors are joined along the first dimension only, so all others must be whole
        sides = {tuple(box[1:]) for _, box in met}
        if not met or sides != {tuple(wanted[1:])}:
            raise CoverageError(f"{name}: its chunks can't be put side by side")
        check_coverage(extents(wanted), [relative(box, [low for low, _ in wanted]) for _, box in met])
        # no lock: batches are placed one at a time
        by_row: dict[int, torch.Tensor] = {}

        def collector(chunk: ChunkStorageMetadata, box: Box) -> Callable[[Any], None]:
            def collect(value: Any) -> None:
                source.check_item(name, value, tuple(chunk.sizes))
                try:
                    by_row[box[0][0]] = part_of(value, relative(box, chunk.offsets))
                    if len(by_row) == len(met):
                        receive(name, joined([by_row[row] for row in sorted(by_row)]))
                except ValueError as error:
                    raise CoverageError(f"{name}: {error}") from error

            return collect

        for chunk, box in met:
            self.want_item((name, chunk.offsets), chunk.sizes, collector(chunk, box))

    def want_pairs(
        self, name: str, regions: Iterable[Region], hold: Callable[[str, torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Read what ``regions``, of tensors made of others, are to be filled with; ``hold`` gets the inner
        tensors (target, source), which are copied once all fits.

        Raises: CoverageError, DamagedError, UnsupportedError.
        """
        source = self._source
        boxes = source.chunk_boxes(name)

        def receiver(
            target: torch.Tensor, in_region: Box, chunk: ChunkStorageMetadata, in_chunk: Box
        ) -> Callable[[Any], None]:
            def receive(value: Any) -> None:
                source.check_item(name, value, tuple(chunk.sizes))
                try:
                    inner_tensors = pairs(target, in_region, value, in_chunk)
                except ValueError as error:
                    raise CoverageError(f"{name}: {error}") from error
                for inner, value_of_inner in inner_tensors:
                    hold(name, inner, value_of_inner)

            return receive

        for region in regions:
            met = source.overlaps(name, boxes, region)
            try:
                for _, _, in_region in met:
                    part_of(region.tensor, in_region)  # not every wrapper can be cut there
            except ValueError as error:
                raise CoverageError(f"{name}: {error}") from error
            for chunk, in_chunk, in_region in met:
                key = (name, chunk.offsets)
                self.want_item(key, chunk.sizes, receiver(region.tensor, in_region, chunk, in_chunk))

    def want_tensor(self, name: str, regions: Iterable[Region]) -> None:
        """Fill ``regions`` of a tensor.

        Raises: CoverageError, DamagedError, UnsupportedError.
        """
        if (quantised := self._source.quantised.get(name)) is not None:
            self._want_quantised(name, quantised, regions)
            return
        meta = self._source.tensors[name]
        boxes: list[Box] = []
        for region in regions:
            tensor = region.tensor
            if len(meta.chunks) == 1 and self._want_whole(name, meta, tensor):
                continue
            # once for all regions, and never for what was read whole
            boxes = boxes or self._source.chunk_boxes(name)
            for chunk, in_chunk, in_region in self._source.overlaps(name, boxes, region):
                self._want_box(name, chunk, in_chunk, tensor, in_region)

    def _want_whole(self, name: str, meta: TensorStorageMetadata, target: torch.Tensor) -> bool:
        """Read the bytes of a tensor of one chunk as those of all of ``target``, if that is possible: most
        tensors by far, so each step counts."""
        chunk, size, dtype = meta.chunks[0], meta.size, meta.properties.dtype
        if chunk.sizes != size or size != target.shape or any(chunk.offsets) or not target.numel():
            return False
        memory = self._memory(target, dtype)
        file, offset, length = self._source.location((name, chunk.offsets))
        if memory is None or not self._source.is_raw(name, file, dtype):
            return False
        payload = offset + self._head_bytes(name, file, length, dtype, size)
        self._add(file, Piece(payload, target.nbytes, memory, 0, name))
        return True

    def _head_bytes(self, name: str, file: str, length: int, dtype: torch.dtype, size: torch.Size) -> int:
        """How far into a raw item its payload begins. Raises DamagedError if the item has another length."""
        if file in self._source.bare_files and length == dtype.itemsize * size.numel():
            return 0
        frame = self._frames.get((dtype, size))
        if frame is None:
            head, tail = tensor_frame(dtype, tuple(size))
            nbytes = dtype.itemsize * math.prod(size)
            frame = self._frames[dtype, size] = (len(head), len(head) + nbytes + len(tail))
        head_bytes, item_bytes = frame
        if length != item_bytes:
            raise DamagedError(
                f"{name}: its item has {length} bytes, a chunk of {tuple(size)} {dtype} has others", [name]
            )
        return head_bytes

    def _memory(self, target: torch.Tensor, dtype: torch.dtype) -> memoryview | DeviceTarget | None:
        """The bytes of ``target``, if those of elements of ``dtype`` are the same."""
        if (
            # of another dtype or order, or to be negated
            type(target) not in PLAIN_TENSORS
            or target.dtype != dtype
            or target.layout is not torch.strided
            or target.is_conj()
            or target.is_neg()
            or not target.is_contiguous()
        ):
            return None
        if self._writes is not None and (device := self._writes.device_of(target)) is not None:
            return DeviceTarget(target.detach(), device, dtype, target.nbytes)
        if not target.is_cpu:  # on the meta device there are none
            return None
        # a memoryview of an address keeps nothing alive
        self._keep.append(target)
        return host_memory(target)

    def _want_box(
        self, name: str, chunk: ChunkStorageMetadata, in_chunk: Box, target: torch.Tensor, in_target: Box
    ) -> None:
        """Copy box ``in_chunk`` of a stored chunk to box ``in_target`` of ``target``."""
        key = (name, chunk.offsets)
        file, offset, length = self._source.location(key)
        shape = tuple(chunk.sizes)
        dtype = self._source.tensors[name].properties.dtype
        if self._source.is_raw(name, file, dtype):
            payload = offset + self._head_bytes(name, file, length, dtype, chunk.sizes)
            for piece in self._row_pieces(name, payload, shape, dtype, in_chunk, target, in_target):
                self._add(file, piece)
            return
        if length == dtype.itemsize * chunk.sizes.numel() and self._source.is_plain_of_stock(file, key):
            # no item of torch.save's is as short as its elements
            raise UnsupportedError(
                f"{name} was written with SerializationFormat.SAFETENSORS, which stock DCP itself can't "
                f"load again; read {file} with the safetensors package, or save in the usual format"
            )
        # a whole tensor is not indexed: sparse ones can't be
        destination = target if extents(in_target) == tuple(target.shape) else target[slices(in_target)]
        self.want_item(key, shape, self._tensor_receiver(name, destination, shape, in_chunk))

    def _row_pieces(
        self,
        name: str,
        payload: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        in_chunk: Box,
        target: torch.Tensor,
        in_target: Box,
    ) -> Iterator[Piece]:
        """What to read of a chunk of ``shape`` whose elements begin at byte ``payload`` of its file."""
        memory, step = self._memory(target, dtype), dtype.itemsize
        device = self._writes.device_of(target) if self._writes is not None and is_plain(target) else None

        def rest(box: Box, cut: Box, nbytes: int) -> Fill | DeviceTarget:
            # detached: a view of a parameter that requires grad refuses to be written to
            view = target.detach()[slices(box)]
            if device is not None:
                return DeviceTarget(view, device, dtype, nbytes, contiguous_strides(shape))
            return Fill(nbytes, rows_finisher(self._put, name, view, cut, shape, dtype))

        cuts: Iterable[tuple[Box, int, int]]
        # one run in the file and one in memory need no cut, however long: the spans are cut anyway
        run = contiguous_run(in_chunk, shape) if memory is not None else None
        if run is not None and contiguous_run(in_target, target.shape) is not None:
            cuts = [(in_chunk, run[0] * step, run[1] * step)]
        else:
            cuts = cut_box(in_chunk, shape, step, gap_bytes=BLOCK_BYTES, limit_bytes=_READ_BYTES)
        for cut, first, nbytes in cuts:
            destination = shifted(cut, in_chunk, in_target)
            fits = memory is not None and contiguous_run(cut, shape) is not None
            run = contiguous_run(destination, target.shape) if fits else None
            if memory is not None and run is not None:
                yield Piece(payload + first, nbytes, memory, run[0] * step, name)
            else:
                yield Piece(payload + first, nbytes, rest(destination, cut, nbytes), 0, name)

    def _want_quantised(self, name: str, quantised: Quantised, regions: Iterable[Region]) -> None:
        """Make values of what is stored, a bounded part at a time, and copy them to ``regions``."""
        stored = self._source.stored
        assert stored is not None
        # all scales first, for they may lie in another file: they are a small part of what they scale, and
        # numbers that wait for theirs would have no bound
        before = self.before = self.before or ReadPlan(stored)
        meta, boxes = stored.tensors[quantised.weight], stored.chunk_boxes(quantised.weight)
        dtype = meta.properties.dtype
        for region in regions:
            if not region.tensor.numel():
                continue
            needed = quantised.stored_box(box_at(region.offsets, region.tensor.shape))
            scale_box = quantised.scale_box(needed)
            scale_dtype = stored.tensors[quantised.scales].properties.dtype
            scales = torch.empty(extents(scale_box), dtype=scale_dtype, device="cpu")
            before.want_tensor(quantised.scales, [Region(scales, tuple(low for low, _ in scale_box))])
            met = []
            # chunk by chunk, none of them joined: a number needs nothing of its neighbours
            for chunk, chunk_box in zip(meta.chunks, boxes, strict=True):
                if (box := common(chunk_box, needed)) is None:
                    continue
                met.append(relative(box, [low for low, _ in needed]))
                file, offset, _ = stored.location((quantised.weight, chunk.offsets))
                for cut, first, nbytes in cut_box(
                    relative(box, chunk.offsets),
                    chunk.sizes,
                    dtype.itemsize,
                    gap_bytes=BLOCK_BYTES,
                    limit_bytes=quantised.cut_bytes,
                ):
                    numbers = Numbers(quantised, cut, chunk, dtype, scales, scale_box)
                    whole = Fill(nbytes, numbers_finisher(self._put, name, region, numbers))
                    self._add(file, Piece(offset + first, nbytes, whole, 0, name))
            check_coverage(extents(needed), met)

    def _tensor_receiver(
        self, name: str, target: torch.Tensor, shape: tuple[int, ...], in_chunk: Box
    ) -> Callable[[Any], None]:
        def receive(value: Any) -> None:
            self._source.check_item(name, value, shape)
            # not the target's detach(): that of a sparse tensor is a copy
            self._put(name, target, value if extents(in_chunk) == shape else value[slices(in_chunk)])

        return receive
