"""Checkpoints as one file of ``torch.save``, written as they are read.

Enters: a checkpoint's directory, ours or stock's. Leaves: a file that ``torch.load`` reads, verified against
the checkpoint's checksums on the way, or nothing. Invariant: of plain tensors no more is in memory than the
budget, or one alone that takes more and can't be read in parts.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anyio.to_thread
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .._geometry import contiguous_strides, flat_slices
from ..catalog import Catalog, Contents
from ..formats import Archive, StandIn
from ..load import LoadServices, batches, read_box, read_names, read_outline, tensor_names
from ..staging import Stager
from ..trust import Trust
from .call_resources import CallResources, local_path
from .new_file import NewFile

_BUDGET_BYTES = 64 << 20
_CPU = torch.device("cpu")


async def dcp_to_torch_save(
    dcp_checkpoint_dir: str | os.PathLike[str],
    torch_save_path: str | os.PathLike[str],
    *,
    trust: Trust = Trust(),
    budget_bytes: int = _BUDGET_BYTES,
) -> None:
    """Write a checkpoint, ours or stock's, as one file that ``torch.load(path, weights_only=True)`` reads, in
    the structure that was saved: int keys, empty containers, ties, strides.

    The file appears whole, in place of one of its name, or not at all. Leaves that ``weights_only`` does not
    admit are written all the same; torch says which ones.

    Args:
        dcp_checkpoint_dir: the checkpoint's own directory.
        torch_save_path: the file; its directory must exist.
        trust: which pickled leaves are accepted.
        budget_bytes: what is in memory at most of plain tensors. A tensor that takes more is read in parts if
            ours, whole if stock's. Other leaves are in memory together.
    Raises: TypeError, ValueError; CheckpointNotFoundError, CorruptCheckpointError, UntrustedCheckpointError;
        OSError.
    Cancellation: waits until the file is written.
    """
    if budget_bytes < 1:
        raise ValueError(f"budget_bytes is at least 1, not {budget_bytes}")
    directory, path = local_path(dcp_checkpoint_dir), local_path(torch_save_path)
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
            _put(file, archive, record, [content])
        for record, storage in archive.held.items():
            _put(
                file,
                archive,
                record,
                [_bytes_of(torch.empty(0, dtype=torch.uint8, device=_CPU).set_(storage))],
            )
        wanted = [name for name in tensor_names(contents, None) if name in ties.values()]
        limit = max(budget_bytes // 4, 1)
        for names, nbytes in batches(contents, wanted, limit):
            if nbytes > limit and contents.digests:
                await _put_in_parts(file, archive, contents, services, names[0], stand_ins[names[0]], limit)
                continue
            values = await read_names(contents, services, names, device=_CPU, writes=None)
            for name in names:
                like, tensor = stand_ins[name], values.pop(name)
                _put(file, archive, archive.record_of(like.key), [_bytes_of(tensor.permute(_order(like)))])
        file.write(*archive.tail())
        file.publish()
    finally:
        file.close()


async def _put_in_parts(
    file: NewFile,
    archive: Archive,
    contents: Contents,
    services: LoadServices,
    name: str,
    like: StandIn,
    limit: int,
) -> None:
    """One tensor, by boxes that are each one range of its memory."""
    record, order = archive.record_of(like.key), _order(like)
    shape = [like.shape[dim] for dim in order]
    numel = torch.Size(shape).numel()
    # whole rows, where they fit: a range that ends within one takes several boxes
    step = max(limit // like.dtype.itemsize, 1)
    for extent in contiguous_strides(shape):
        if extent <= step:
            step -= step % extent
            break
    crc, position = 0, archive.payload(record)
    for start in range(0, numel, step):
        for index, _, _ in flat_slices(shape, start, min(start + step, numel)):
            box = [slice(None)] * len(shape)
            for dim, part in zip(order, index, strict=False):
                box[dim] = part if isinstance(part, slice) else slice(part, part + 1)
            tensor = await read_box(contents, services, name, tuple(box), device=_CPU, writes=None)
            content = _bytes_of(tensor.permute(order))
            crc = zlib.crc32(content, crc)
            file.write(position, content)
            position += len(content)
    file.write(*archive.head(record, crc))


def _put(file: NewFile, archive: Archive, record: str, contents: Iterable[bytes | memoryview]) -> None:
    crc, position = 0, archive.payload(record)
    for content in contents:
        crc = zlib.crc32(content, crc)
        file.write(position, content)
        position += len(content)
    file.write(*archive.head(record, crc))


def _order(like: StandIn) -> list[int]:
    """Its dimensions, in the order in which its memory has them."""
    return sorted(range(len(like.shape)), key=lambda dim: (-like.strides[dim], dim))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    raw: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(raw)
