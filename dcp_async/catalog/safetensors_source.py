"""A directory of safetensors files, as Hugging Face's models are, opened as if it were a checkpoint.

Enters: a LocalStorage and a name below its root. Leaves: Contents whose items are the bare bytes of tensors.
Invariant: headers and index are checked before anything is told of them; nothing is unpickled, so files may
lie behind links of their owner's, as in Hugging Face's cache.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import xxhash
from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import BlockingThreads, collection_paused
from .._names import FIRST_RANK_METADATA, METADATA
from ..errors import CheckpointNotFoundError, CorruptCheckpointError
from ..formats import LENGTH_BYTES, HeaderError, decode_header, files_of_index, header_bytes, join_files
from ..info import CheckpointInfo, VerifyReport
from ..storage import LocalReader, LocalStorage
from .contents import Contents
from .verification import Verification

SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_INDEX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Model:
    """What a path names that leads to safetensors files and not to a checkpoint."""

    root: str
    name: str
    """The directory below ``root`` that the files lie in."""
    only: str | None
    """The one file that is meant; None for the directory's model."""


def model_at(path: str) -> Model | None:
    """The model that ``path``, a directory or a file, leads to; None if it may be a checkpoint. Looks at the
    file system."""
    path = os.path.abspath(os.path.expanduser(path))
    # not what the file is a link to: in Hugging Face's cache that has neither the name nor the neighbours
    if path.endswith(SUFFIX) and not os.path.isdir(path):
        root, name = os.path.split(os.path.realpath(os.path.dirname(path)))
        return Model(root, name, os.path.basename(path))
    try:
        names = set(os.listdir(path))
    except OSError:  # whoever opens it says what is wrong
        return None
    if names & {METADATA, FIRST_RANK_METADATA} or not any(name.endswith(SUFFIX) for name in names):
        return None
    root, name = os.path.split(os.path.realpath(path))
    return Model(root, name, None)


class SafetensorsOpener:
    """In place of an Opener, for what holds no `.metadata`. Owns nothing."""

    def __init__(
        self,
        storage: LocalStorage,
        threads: BlockingThreads,
        metadata_of: Callable[[str], Awaitable[Metadata]],
        *,
        timeout: float,
        model: Model,
    ) -> None:
        """
        Args:
            timeout: seconds that a call in a thread may take.
            model: what of the directory is meant.
        """
        self._storage = storage
        self._threads = threads
        self._metadata_of = metadata_of
        self._timeout = timeout
        self._only = model.only

    async def open(self, name: str) -> Contents:
        """Read the headers of all files of ``name``, which stay open.

        Raises: CheckpointNotFoundError if it holds none; CorruptCheckpointError for what can't be believed.
        """
        try:
            reader = await self._storage.open(name)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"there is no directory {name!r}", checkpoint_id=name) from error
        try:
            return await self._contents(name, reader)
        except BaseException:
            await reader.close()
            raise

    async def _contents(self, name: str, reader: LocalReader) -> Contents:
        digest, num_bytes = xxhash.xxh3_64(), 0
        files, weights = await self._files(name, reader)
        listed = {}
        for file in files:
            try:
                nbytes = await reader.size(file)
                first = await _read(reader, file, 0, min(LENGTH_BYTES, nbytes))
                raw = await _read(reader, file, LENGTH_BYTES, header_bytes(first, nbytes))
                listed[file] = await self._threads.run(decode_header, raw, nbytes)
            except HeaderError as error:
                raise _damaged(name, file, error) from error
            digest.update(raw)
            num_bytes += nbytes
        try:
            with collection_paused():
                metadata, locations = join_files(listed, weights)
        except HeaderError as error:
            raise _damaged(name, "its index", error) from error
        return Contents(
            info=CheckpointInfo(
                checkpoint_id=name,
                step=None,
                time=0.0,
                nbytes=num_bytes,
                num_files=len(files),
                world_size=None,
                torch_version=None,
                producer="safetensors",
                _metadata=self._metadata_of,
            ),
            reader=reader,
            metadata=metadata,
            digest=digest.hexdigest(),
            manifest=None,
            locations=locations,
            transforms={},
            exotic=frozenset(),
            strides={},
            digests={},
            image_bytes={},
            bare=frozenset(files),
        )

    async def _files(self, name: str, reader: LocalReader) -> tuple[Sequence[str], dict[str, str] | None]:
        """The files that make up the model, and what an index says of them."""
        names = await reader.names()
        if self._only is not None:
            if self._only not in names:
                raise CheckpointNotFoundError(f"there is no {self._only!r} in {name!r}", checkpoint_id=name)
            return [self._only], None
        indexes = [file for file in names if file.endswith(_INDEX_SUFFIX)]
        plain = [file for file in names if file.endswith(SUFFIX)]
        if f"model{_INDEX_SUFFIX}" in indexes:
            indexes = [f"model{_INDEX_SUFFIX}"]
        elif f"model{SUFFIX}" in plain:
            return [f"model{SUFFIX}"], None
        if len(indexes) > 1:
            raise CorruptCheckpointError(
                f"{name!r} has several models, {', '.join(indexes[:3])}; open one of its files by its own "
                "path",
                checkpoint_id=name,
            )
        if not indexes:
            if not plain:
                raise CheckpointNotFoundError(f"{name!r} has no safetensors files", checkpoint_id=name)
            return plain, None
        index = indexes[0]
        try:
            nbytes = await reader.size(index)
            if nbytes > _INDEX_BYTES:
                raise HeaderError(f"it is {nbytes} bytes long, which no index is")
            weights = await self._threads.run(files_of_index, await _read(reader, index, 0, nbytes))
            files = sorted(set(weights.values()))
            if missing := [file for file in files if file not in names]:
                raise HeaderError(f"it names {missing[0]}, which is not there")
        except HeaderError as error:
            raise _damaged(name, index, error) from error
        return files, weights

    async def metadata(self, name: str) -> Metadata:
        """What ``name`` holds. Raises: as ``open``."""
        contents = await self.open(name)
        await contents.close()
        return contents.metadata

    async def describe(self, name: str) -> CheckpointInfo:
        """What ``name`` is. Raises: as ``open``."""
        contents = await self.open(name)
        await contents.close()
        return contents.info

    async def is_current(self, contents: Contents) -> bool:
        """Always: nobody replaces a model by a commit that could be told."""
        return True

    async def step(self, name: str) -> int | None:
        """None: a model tells no step."""
        return None

    async def verify(self, name: str, *, io_concurrency: int) -> VerifyReport:
        """Read all of it; no checksum says whether it is whole. Raises: as ``open``."""
        contents = await self.open(name)
        try:
            verification = Verification(
                name,
                contents.reader,
                self._threads,
                io_concurrency=io_concurrency,
                timeout=self._timeout,
            )
            return await verification.run_bare(contents)
        finally:
            await contents.close()


def _damaged(name: str, file: str, error: HeaderError) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{name!r}: {file}: {error}; nothing was loaded", checkpoint_id=name)


async def _read(reader: LocalReader, file: str, offset: int, nbytes: int) -> bytes:
    content = bytearray(nbytes)
    if nbytes:
        await reader.read_into(file, [(offset, memoryview(content))])
    return bytes(content)
