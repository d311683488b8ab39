"""The items of a plan of DCP's, as a file image whose bytes its planner resolves part by part.

Enters: WriteItems and the SavePlanner that resolves them. Leaves: a FileLayout, the bytes of its parts, and
where each item lies. Invariant: what lies in a tensor's place has the dtype and shape that the layout was
made for; a planner that resolves an item otherwise the second time fails the save.
"""

from __future__ import annotations

import io
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from .._geometry import contiguous_strides
from ..formats import DISTCP, PLAIN_DTYPES, SECTOR_BYTES
from ..planning import WrittenItem
from ..state import PLAIN_TENSORS


def is_raw(tensor: torch.Tensor) -> bool:
    """Whether it is written as its bytes are, and not as ``torch.save`` makes them."""
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.layout is torch.strided
        and tensor.dtype in PLAIN_DTYPES
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _saved(tensor: torch.Tensor) -> bytes:
    # as stock does: a view is not worth the rest of its storage
    copy = tensor.cpu()
    if copy.layout is torch.strided and not copy.is_quantized:
        copy = copy.clone()
    file = io.BytesIO()
    torch.save(copy, file)
    return file.getvalue()


class ResolvedItems:
    """One rank's items of a save.

    Every item is resolved when this is made, to lay out the file, and only what is no plain tensor is kept.
    A tensor is resolved again when its bytes are wanted, unless somebody else keeps it: one that is made for
    the purpose takes no memory in between.
    """

    def __init__(self, items: Sequence[WriteItem], planner: SavePlanner) -> None:
        """Raises: ValueError for an item whose tensor has not the shape that the plan says; what the planner
        raises."""
        self._planner = planner
        self._tensors: list[WriteItem] = []
        self._leaves: list[WriteItem] = []
        self._kept: list[weakref.ref[torch.Tensor]] = []
        self._forms: list[tuple[torch.dtype, tuple[int, ...]]] = []
        self._stored: list[bytes] = []
        """Per leaf, its item."""
        self._exotic: list[torch.dtype | None] = []
        """Per leaf, its dtype if it is a tensor."""
        for item in items:
            self._sort(item, planner.resolve_data(item))
        rooms = [-(-len(stored) // SECTOR_BYTES) * SECTOR_BYTES for stored in self._stored]
        self.layout = DISTCP.layout(self._forms, rooms)
        self._room_offsets = self.layout.item_offsets[len(self._tensors) :]
        self._half_done: dict[int, torch.Tensor] = {}
        """Tensors that reach over the end of a part, until their last byte is taken."""

    def _sort(self, item: WriteItem, value: torch.Tensor | io.BytesIO) -> None:
        if not isinstance(value, torch.Tensor):
            self._leaves.append(item)
            self._stored.append(value.getvalue())
            self._exotic.append(None)
            return
        if item.tensor_data is None or tuple(item.tensor_data.chunk.sizes) != tuple(value.shape):
            planned = None if item.tensor_data is None else tuple(item.tensor_data.chunk.sizes)
            raise ValueError(
                f"{item.index.fqn}: the planner resolved it to a tensor of {tuple(value.shape)}, "
                f"its plan says {planned}"
            )
        if is_raw(value):
            self._tensors.append(item)
            self._kept.append(weakref.ref(value))
            self._forms.append((value.dtype, tuple(value.shape)))
        else:
            self._leaves.append(item)
            self._stored.append(_saved(value.detach()))
            self._exotic.append(value.dtype)

    def written(self, rank: int) -> Iterator[tuple[WriteItem, WrittenItem]]:
        """What each item has become in the file of ``rank``."""
        places = zip(self.layout.item_offsets, self.layout.item_bytes, strict=True)
        for item, (dtype, _), (offset, length) in zip(self._tensors, self._forms, places, strict=False):
            yield item, WrittenItem((rank, offset, length), dtype, is_exotic=False)
        # without the end of its room: what a planner pickles need not be a zip, which alone could be padded
        leaves = zip(self._leaves, self._stored, self._exotic, self._room_offsets, strict=True)
        for item, stored, exotic, offset in leaves:
            yield item, WrittenItem((rank, offset, len(stored)), exotic, is_exotic=exotic is not None)

    def fill(self, memory: memoryview, start: int) -> None:
        """Write the image's bytes from ``start`` on into all of ``memory``. For one thread at a time.

        Raises: ValueError if the planner resolves an item otherwise than before.
        """
        stop = start + len(memory)
        layout = self.layout
        layout.fill_constants(memory, start)
        self._fill_rooms(memory, start)
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        typed: dict[torch.dtype, torch.Tensor] = {torch.uint8: buffer}
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for index in layout.tensors_between(start, stop):
            first, nbytes = layout.payload_offsets[index], layout.payload_bytes[index]
            low, high = max(first, start), min(first + nbytes, stop)
            if high - low == nbytes:
                dtype, shape = self._forms[index]
                if dtype not in typed:
                    typed[dtype] = buffer.view(dtype)
                where = (first - start) // dtype.itemsize
                targets.append(typed[dtype].as_strided(shape, contiguous_strides(shape), where))
                sources.append(self._resolved(index))
            else:
                targets.append(buffer[low - start : high - start])
                sources.append(self._cut(index, low - first, high - first))
        if targets:
            torch._foreach_copy_(targets, sources)  # one call, so that the GIL is released once

    def _resolved(self, index: int) -> torch.Tensor:
        tensor = self._kept[index]()
        if tensor is None:
            item = self._tensors[index]
            value = self._planner.resolve_data(item)
            if (
                not isinstance(value, torch.Tensor)
                or not is_raw(value)
                or (value.dtype, tuple(value.shape)) != self._forms[index]
            ):
                raise ValueError(
                    f"{item.index.fqn}: the planner's resolve_data() gave something else the second time"
                )
            tensor = value
        return tensor.detach()

    def _cut(self, index: int, low: int, high: int) -> torch.Tensor:
        """Bytes [low, high) of a tensor that is asked for from front to end."""
        rows = self._half_done.pop(index, None)
        if rows is None:
            # contiguous once for all its parts, which for most tensors is no copy
            rows = self._resolved(index).contiguous().view(-1).view(torch.uint8)
        if high < self.layout.payload_bytes[index]:
            self._half_done[index] = rows
        return rows[low:high]

    def _fill_rooms(self, memory: memoryview, start: int) -> None:
        stop = start + len(memory)
        first = max(bisect_right(self._room_offsets, start) - 1, 0)
        for room in range(first, bisect_left(self._room_offsets, stop)):
            offset, stored = self._room_offsets[room], self._stored[room]
            end = offset + -(-len(stored) // SECTOR_BYTES) * SECTOR_BYTES
            low, high = max(offset, start), min(end, stop)
            if low < high:
                piece = stored[low - offset : high - offset]
                memory[low - start : low - start + len(piece)] = piece
                # slots are leased again, and hold what was written before
                memory[low - start + len(piece) : high - start] = bytes(high - low - len(piece))
