"""What a checkpoint or a model holds, laid out anew: as a checkpoint of ours, or as a file of torch.save.

    contents -> batches -> scratch file, mapped -> state -> engine or torch.save

Enters: opened Contents. Leaves: a committed checkpoint or a durable file, or nothing. Invariant: tensors that
are plain bytes lie in a scratch file without a name, not in memory: a batch of them is read and verified, put
there and let go of, and what is written from there is let go of as it is written.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .._concurrency import BlockingThreads
from ..catalog import Contents
from ..coordination import Coordination
from ..engine import CheckpointEngine
from ..events import Event, SaveProgress
from ..formats import DISTCP, Format
from ..info import CheckpointInfo
from ..load import LoadServices, batches, read_names, read_outline, tensor_names
from ..options import Timeouts
from ..staging import Stager, StagingOptions
from ..trust import Trust
from .new_file import NewFile

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

_CPU = torch.device("cpu")
_ALIGN = 64
_MIN_PART_BYTES = 1 << 20
_MAX_PART_BYTES = 32 << 20
_UNIT_BYTES = 64 << 10

Progress = Callable[[int, int], None]


async def rewrite(
    contents: Contents,
    directory: Path,
    *,
    trust: Trust,
    budget_bytes: int,
    progress: Progress,
    format: Format = DISTCP,
) -> CheckpointInfo:
    """Save what ``contents`` hold as the checkpoint ``directory``, with its step, notes and attached files.

    Args:
        contents: stay the caller's to close.
        format: as for an engine.
        budget_bytes: what is in memory at most of tensors that are plain bytes; one that takes more is in
            memory by itself. Other leaves are in memory together.
        progress: told how many bytes were read and written, and of how many.
    Raises: SaveError, of which CheckpointExistsError is a kind; as for reading.
    """
    pool_bytes = max(budget_bytes // 2, 4 * _MIN_PART_BYTES)
    # whole blocks of checksums, as StagingOptions wants them
    part_bytes = min(pool_bytes // 4 // _UNIT_BYTES * _UNIT_BYTES, _MAX_PART_BYTES)
    with _Scratch(contents, directory.parent, progress) as scratch:
        state = await scratch.fill(trust, budget_bytes // 2)
        async with CheckpointEngine(
            directory.parent,
            staging=StagingOptions(budget_bytes=pool_bytes, part_bytes=part_bytes),
            coordination=Coordination(mode="local"),
            trust=trust,
            observer=scratch,
            format=format,
        ) as engine:
            response = await engine.save(
                state,
                step=contents.info.step,
                checkpoint_id=directory.name,
                notes=contents.info.notes,
                files={name: await contents.attached(name) for name in contents.info.files},
            )
            return await response.upload_completion


async def write_torch_save(
    contents: Contents, path: Path, *, trust: Trust, budget_bytes: int, progress: Progress
) -> None:
    """Write what ``contents`` hold as one file of ``torch.save``, which appears whole, or not at all; else as
    ``rewrite``. Raises: OSError; as for reading."""
    with _Scratch(contents, path.parent, progress) as scratch:
        state = await scratch.fill(trust, budget_bytes)
        await anyio.to_thread.run_sync(_save_file, state, path, scratch)


def _save_file(state: Mapping[str, Any], path: Path, scratch: _Scratch) -> None:
    file = NewFile(path)
    try:
        with io.BufferedWriter(_Appending(file, scratch)) as writing:
            torch.save(dict(state), writing)
        file.publish()
    finally:
        file.close()


class _Appending(io.RawIOBase):
    """A file as torch.save writes to one: piece by piece, from its start."""

    def __init__(self, file: NewFile, scratch: _Scratch) -> None:
        self._file = file
        self._scratch = scratch
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, content: Buffer) -> int:
        view = memoryview(content)
        self._file.write(self._position, view.cast("B"))
        self._position += view.nbytes
        self._scratch.wrote(self._position)
        return view.nbytes


class _Scratch:
    """A file without a name that holds tensors as they lie in memory. Owns it, and its mapping. An Observer,
    so that what a save has written does not stay in memory."""

    def __init__(self, contents: Contents, directory: Path, progress: Progress) -> None:
        self._contents = contents
        self._directory = directory
        self._progress = progress
        self._memory: mmap.mmap | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._tied: dict[object, torch.Tensor] = {}
        self._offset = 0
        self._nbytes = 0
        self._read_bytes = 0

    def __enter__(self) -> _Scratch:
        self._nbytes = sum(_room(meta, self._contents.strides.get(name)) for name, meta in self._plain())
        if self._nbytes:
            # beside the target, where room is asked for anyway: the system's own place for such files may be
            # memory
            with tempfile.TemporaryFile(dir=self._directory) as file:
                # now: a mapping of a disk that fills up would be a signal, not an error
                os.posix_fallocate(file.fileno(), 0, self._nbytes)
                # the mapping keeps the file, which has no name that a killed process could leave
                self._memory = mmap.mmap(file.fileno(), self._nbytes)
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()
        self._tied.clear()
        if self._memory is not None:
            with contextlib.suppress(BufferError):  # a failed save's frames may hold tensors still
                self._memory.close()

    def _plain(self) -> Iterator[tuple[str, TensorStorageMetadata]]:
        for name, meta in self._contents.names.items():
            if isinstance(meta, TensorStorageMetadata):
                yield name, meta

    async def fill(self, trust: Trust, budget_bytes: int) -> dict[str, Any]:
        """The structure that was saved, its plain tensors in the file. Raises: as for reading."""
        threads = BlockingThreads("dcp_async-rewrite", 2)
        try:
            services = LoadServices(
                threads=threads,
                stager=Stager(),
                io_concurrency=2,
                timeout=Timeouts().storage,
                trust=trust,
                most_at_once=max(budget_bytes // 8, _MIN_PART_BYTES),
            )
            state = await read_outline(self._contents, services, self._placed)
            # in the order of the files; of those that share their bytes the first one
            names = [name for name in tensor_names(self._contents, None) if name in self._tensors]
            for batch, _ in batches(self._contents, names, max(budget_bytes // 2, 1)):
                values = await read_names(self._contents, services, batch, device=_CPU, writes=None)
                await anyio.to_thread.run_sync(self._copy, values)
        finally:
            threads.shutdown()
        return state

    def _placed(self, name: str, meta: TensorStorageMetadata) -> torch.Tensor:
        """A tensor in the file for ``name``; for names that share their bytes, one."""
        is_one = len(meta.chunks) == 1
        location = self._contents.locations.get((name, meta.chunks[0].offsets)) if is_one else None
        strides = self._contents.strides.get(name)
        # tied names stay tied. No bytes, and views of the same ones, are at one place whatever their shapes
        key = (location, meta.size, meta.properties.dtype, strides) if location else name
        if key not in self._tied:
            nbytes = _extent(meta, strides) * meta.properties.dtype.itemsize
            flat = torch.empty(0, dtype=meta.properties.dtype, device=_CPU)
            if nbytes:
                assert self._memory is not None
                whole = memoryview(self._memory)[self._offset : self._offset + nbytes]
                flat = torch.frombuffer(whole, dtype=meta.properties.dtype)
                self._offset += _aligned(nbytes)
            shape = tuple(meta.size)
            tensor = flat.view(shape) if strides is None else flat.as_strided(shape, strides)
            self._tied[key] = self._tensors[name] = tensor
        return self._tied[key]

    def _copy(self, values: dict[str, torch.Tensor]) -> None:
        # no_grad is a thread's own, and this thread is anyio's
        with torch.no_grad():
            for name in list(values):
                # one after another: the batch goes while it is copied
                value = values.pop(name)
                self._tensors[name].copy_(value)
                self._read_bytes += value.nbytes
        self._let_go()
        self._progress(self._read_bytes, 2 * self._nbytes)

    def _let_go(self) -> None:
        # the system could take the pages back at any time, but until then they count as this process's memory
        if self._memory is not None:
            self._memory.madvise(mmap.MADV_DONTNEED)

    def on_event(self, event: Event) -> None:
        """A part was written."""
        if isinstance(event, SaveProgress):
            self.wrote(event.written_bytes)

    def wrote(self, nbytes: int) -> None:
        """So many bytes were written from here."""
        self._let_go()
        # what is written has headers, padding and leaves on top of what was counted
        self._progress(min(self._read_bytes + nbytes, 2 * self._nbytes), 2 * self._nbytes)


def _extent(meta: TensorStorageMetadata, strides: tuple[int, ...] | None) -> int:
    """How many elements of memory a tensor reaches over."""
    shape = tuple(meta.size)
    if strides is None or 0 in shape:
        return meta.size.numel()
    return 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))


def _room(meta: TensorStorageMetadata, strides: tuple[int, ...] | None) -> int:
    return _aligned(_extent(meta, strides) * meta.properties.dtype.itemsize)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
