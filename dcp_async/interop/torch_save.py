"""Checkpoints as one file of ``torch.save``, written as they are read.

Enters: a checkpoint's directory, ours or stock's. Leaves: a file that ``torch.load`` reads, verified against
the checkpoint's checksums on the way, or nothing. Invariant: what is read of plain tensors, and what reading
it takes, is within the budget, but for one alone that takes more and can't be read in parts.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio.to_thread
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .._geometry import Box, contiguous_strides, extents, flat_slices
from ..catalog import Catalog, Contents
from ..formats import Archive, StandIn
from ..load import (
    LoadServices,
    batches,
    fill_box,
    host_memory,
    read_names,
    read_outline,
    tensor_names,
)
from ..staging import Stager
from ..trust import Trust
from .call_resources import CallResources, local_path
from .new_file import NewFile

_CPU = torch.device("cpu")


async def dcp_to_torch_save(
    dcp_checkpoint_dir: str | os.PathLike[str],
    torch_save_path: str | os.PathLike[str],
    *,
    trust: Trust = Trust(),
    budget_bytes: int = 64 << 20,
) -> None:
    """Write a checkpoint, ours or stock's, as one file that ``torch.load(path, weights_only=True)`` reads, in
    the structure that was saved: int keys, empty containers, ties, strides.

    The file appears whole, in place of one of its name, or not at all. Leaves that ``weights_only`` does not
    admit are written all the same; torch says which ones.

    Args:
        dcp_checkpoint_dir: the checkpoint's own directory.
        torch_save_path: the file; its directory must exist.
        trust: which pickled leaves are accepted.
        budget_bytes: what is in memory at most of plain tensors, beside about 4 KiB for each. One that
            takes more is read in parts, if we wrote it; a chunk that stock wrote is decoded whole. Other
            leaves are in memory together.
    Raises: TypeError, ValueError; CheckpointNotFoundError, CorruptCheckpointError, UntrustedCheckpointError;
        OSError.
    Cancellation: waits until the file is written.
    """
    if not isinstance(budget_bytes, int) or budget_bytes < 1:
        raise ValueError(f"budget_bytes={budget_bytes!r} must be a whole number of bytes, at least 1")
    directory, path = local_path(dcp_checkpoint_dir), local_path(torch_save_path)
    if path.is_dir():
        raise ValueError(f"torch_save_path={str(path)!r} is a directory; give the file's own path")
    # in a thread: run() of the resources blocks until their own loop is done with it
    await anyio.to_thread.run_sync(_convert, directory, path, trust, budget_bytes)


def _convert(directory: Path, path: Path, trust: Trust, budget_bytes: int) -> None:
    resources = CallResources(directory, io_concurrency=1, trust=trust)
    try:
        resources.run(_write(resources, directory.name, path, trust, budget_bytes))
    finally:
        resources.close()


async def _write(resources: CallResources, name: str, path: Path, trust: Trust, budget_bytes: int) -> None:
    await resources.storage.connect()
    catalog = Catalog(resources.storage, resources.threads, lambda name: catalog.metadata(name))
    contents = await catalog.open(name)
    resources.readers.append(contents.reader)
    services = LoadServices(
        threads=resources.threads,
        stager=Stager(),
        io_concurrency=resources.io_concurrency,
        timeout=resources.timeouts.storage,
        trust=trust,
        most_at_once=max(budget_bytes // 16, 1 << 20),
    )
    stand_ins: dict[str, StandIn] = {}
    ties: dict[object, str] = {}

    def stand_in(name: str, meta: TensorStorageMetadata) -> StandIn:
        is_one = len(meta.chunks) == 1
        location = contents.locations.get((name, meta.chunks[0].offsets)) if is_one else None
        shape = tuple(meta.size)
        strides = contents.strides.get(name) or contiguous_strides(shape)
        key = ties.setdefault(location or name, name)
        stand_ins[name] = StandIn(key, meta.properties.dtype, shape, strides)
        return stand_ins[name]

    archive = Archive(await read_outline(contents, services, stand_in))
    file = NewFile(path)
    try:
        for record, content in archive.small:
            _put(file, archive, record, content)
        for record, storage in archive.held.items():
            held = torch.empty(0, dtype=torch.uint8, device=_CPU).set_(storage)
            _put(file, archive, record, host_memory(held))
        # of names that share their bytes the first, whose name is their key
        stored = {
            name: stand_ins[name]
            for name in tensor_names(contents, None)
            if name in stand_ins and stand_ins[name].key == name
        }
        await _Tensors(file, archive, contents, services, budget_bytes).write(stored)
        file.write(*archive.tail())
        file.publish()
    finally:
        file.close()


class _Tensors:
    """Writes tensors of a checkpoint into a file, within a budget."""

    def __init__(
        self,
        file: NewFile,
        archive: Archive,
        contents: Contents,
        services: LoadServices,
        budget_bytes: int,
    ) -> None:
        self._file = file
        self._archive = archive
        self._contents = contents
        self._services = services
        # one half for what is read, the other for what reading it takes
        self._limit = max(budget_bytes // 2, 1)
        # one for all parts: memory that is freed part by part stays with the allocator
        self._memory = torch.empty(0, dtype=torch.uint8, device=_CPU)

    async def write(self, stored: Mapping[str, StandIn]) -> None:
        """Write ``stored``, which is in the order of the checkpoint's files."""
        # by neighbours, so that the checkpoint is read from front to end
        for names, nbytes in batches(self._contents, stored, self._limit):
            # a chunk of stock's is decoded whole, however little of it is wanted
            if nbytes > self._limit and self._contents.digests:
                await self._write_in_parts(names[0], stored[names[0]])
                continue
            values = await read_names(self._contents, self._services, names, device=_CPU, writes=None)
            for name in names:
                like = stored[name]
                # one at a time: what is written is let go before the next is copied
                tensor = values.pop(name).permute(_order(like)).contiguous()
                _put(self._file, self._archive, self._archive.record_of(like.key), host_memory(tensor))

    async def _write_in_parts(self, name: str, like: StandIn) -> None:
        """One tensor, by boxes that are each one range of its memory."""
        record, order = self._archive.record_of(like.key), _order(like)
        back = sorted(range(len(order)), key=order.__getitem__)
        shape = tuple(like.shape[dim] for dim in order)
        step = _rows(shape, max(self._limit // like.dtype.itemsize, 1))
        numel = torch.Size(shape).numel()
        crc, position = 0, self._archive.payload(record)
        for start in range(0, numel, step):
            for index, _, _ in flat_slices(shape, start, min(start + step, numel)):
                box = _box(index, shape)
                part = self._view(like.dtype, extents(box))
                low = tuple(box[dim][0] for dim in back)
                await fill_box(self._contents, self._services, name, part.permute(back), low, writes=None)
                content = host_memory(part)
                crc = zlib.crc32(content, crc)
                self._file.write(position, content)
                position += len(content)
        self._file.write(*self._archive.head(record, crc))

    def _view(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor in the memory that all parts have."""
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        if len(self._memory) < nbytes:
            self._memory = torch.empty(max(nbytes, self._limit), dtype=torch.uint8, device=_CPU)
        return self._memory[:nbytes].view(dtype).view(shape)


def _put(file: NewFile, archive: Archive, record: str, content: bytes | memoryview) -> None:
    file.write(archive.payload(record), content)
    file.write(*archive.head(record, zlib.crc32(content)))


def _order(like: StandIn) -> list[int]:
    """Its dimensions, in the order in which its memory has them."""
    return sorted(range(len(like.shape)), key=lambda dim: (-like.strides[dim], dim))


def _rows(shape: tuple[int, ...], most: int) -> int:
    """How many elements a part has: whole rows, where they fit, since a range that ends within one takes
    several boxes."""
    for extent in contiguous_strides(shape):
        if extent <= most:
            return most - most % max(extent, 1)
    return most


def _box(index: Sequence[int | slice], shape: Sequence[int]) -> Box:
    whole = [(0, extent) for extent in shape[len(index) :]]
    cut = [(part.start, part.stop) if isinstance(part, slice) else (part, part + 1) for part in index]
    return (*cut, *whole)
