"""A directory of safetensors files, as Hugging Face's models are, opened as if it were a checkpoint.

Enters: the place of a directory. Leaves: Contents whose items are the bare bytes of tensors.
Invariant: headers and index are checked before anything is told of them; nothing is unpickled, so files may
lie behind links of their owner's, as in Hugging Face's cache.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import xxhash
from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import BlockingThreads, collection_paused
from ..errors import CheckpointNotFoundError, CorruptCheckpointError, LoadError
from ..formats import (
    LENGTH_BYTES,
    AmbiguousNameError,
    HeaderError,
    ManifestGist,
    StoredTensor,
    decode_header,
    files_of_index,
    header_bytes,
    join_files,
    may_be_quantised,
)
from ..info import CheckpointInfo, VerifyReport
from ..storage import LocalPlace, LocalReader
from .contents import Contents
from .verification import Progress, Verification

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_INDEX_BYTES = 64 << 20
_CONFIG = "config.json"


def is_model_file(name: str) -> bool:
    """Whether ``name`` is that of a safetensors file, or of an index of some."""
    return name.endswith((_SUFFIX, _INDEX_SUFFIX))


class SafetensorsOpener:
    """In place of an Opener, for what holds no `.metadata`. Owns nothing."""

    def __init__(
        self,
        place: LocalPlace,
        threads: BlockingThreads,
        metadata_of: Callable[[str], Awaitable[Metadata]],
        *,
        timeout: float,
        only: str | None,
    ) -> None:
        """
        Args:
            timeout: seconds that a call in a thread may take.
            only: the one file of the directory that is meant, or the index that says which; None for all of
                the model that lies there.
        """
        self._place = place
        self._threads = threads
        self._metadata_of = metadata_of
        self._timeout = timeout
        self._only = only

    async def open(self, name: str) -> Contents:
        """Read the headers of all files of ``name``, which stay open.

        Raises: CheckpointNotFoundError if it holds none; CorruptCheckpointError for what can't be believed.
        """
        try:
            reader = await self._place.open(name)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"there is no directory {name!r}", checkpoint_id=name) from error
        try:
            return await self._contents(name, reader)
        except BaseException:
            await reader.close()
            raise

    async def _contents(self, name: str, reader: LocalReader) -> Contents:
        files, weights = await self._files(name, reader)
        listed, digest, num_bytes = await self._headers(name, reader, files)
        try:
            with collection_paused():
                metadata, locations = join_files(listed, weights)
        except AmbiguousNameError as error:
            raise LoadError(
                f"{name!r} has no index and more than one model: {error}; name one file by its own path",
                checkpoint_id=name,
            ) from error
        except HeaderError as error:
            raise _damaged(name, "its files" if weights is None else "its index", error) from error
        # raw: whoever asks for plain values is told what is wrong with it, and nobody else
        config = await self._config(reader) if may_be_quantised(metadata.state_dict_metadata) else None
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
            digest=digest,
            manifest=None,
            locations=locations,
            transforms={},
            exotic=frozenset(),
            strides={},
            digests={},
            image_bytes={},
            bare=frozenset(files),
            config=config,
            open_ended=frozenset(
                tensor.name for tensors in listed.values() for tensor in tensors if tensor.offsets is not None
            ),
        )

    async def _headers(
        self, name: str, reader: LocalReader, files: Sequence[str]
    ) -> tuple[dict[str, list[StoredTensor]], str, int]:
        """(what each of ``files`` holds, checksum of all headers, bytes of all files)."""
        # by the headers alone: nothing vouches for payload, and ranks compare what they see by this
        digest, num_bytes = xxhash.xxh3_64(), 0
        listed = {}
        for file in files:
            try:
                nbytes = await reader.size(file)
                first = await _read(reader, file, 0, min(LENGTH_BYTES, nbytes))
                raw = await _read(reader, file, LENGTH_BYTES, header_bytes(first, nbytes))
                # not on the loop: of a large model's files this may be megabytes of JSON
                listed[file] = await self._threads.run(decode_header, raw, nbytes)
            except HeaderError as error:
                raise _damaged(name, file, error) from error
            digest.update(raw)
            num_bytes += nbytes
        return listed, digest.hexdigest(), num_bytes

    async def _files(self, name: str, reader: LocalReader) -> tuple[Sequence[str], dict[str, str] | None]:
        """The files that make up the model, and what an index says of them."""
        names = await reader.names()
        file = _main_file(name, names) if self._only is None else self._only
        if file is None:
            if not (plain := [file for file in names if file.endswith(_SUFFIX)]):
                raise CheckpointNotFoundError(f"{name!r} has no safetensors files", checkpoint_id=name)
            return plain, None
        if file not in names:
            raise CheckpointNotFoundError(f"there is no file {file!r} for {name!r}", checkpoint_id=name)
        if not file.endswith(_INDEX_SUFFIX):
            return [file], None
        try:
            nbytes = await reader.size(file)
            # before it is read: a file of this name may be anything
            if nbytes > _INDEX_BYTES:
                raise HeaderError(f"it is {nbytes} bytes long, which no index is")
            weights = await self._threads.run(files_of_index, await _read(reader, file, 0, nbytes))
            files = sorted(set(weights.values()))
            if missing := [file for file in files if file not in names]:
                raise HeaderError(f"it names {missing[0]}, which is not there")
        except HeaderError as error:
            raise _damaged(name, file, error) from error
        return files, weights

    async def _config(self, reader: LocalReader) -> bytes | None:
        """The model's config.json, which tells how its tensors are quantised; None if it has none that could
        be one."""
        if _CONFIG not in await reader.names() or (nbytes := await reader.size(_CONFIG)) > _INDEX_BYTES:
            return None
        return await _read(reader, _CONFIG, 0, nbytes)

    async def metadata(self, name: str) -> Metadata:
        """What ``name`` holds. Raises: as ``open``."""
        return (await self._looked_at(name)).metadata

    async def describe(self, name: str) -> CheckpointInfo:
        """What ``name`` is. Raises: as ``open``."""
        return (await self._looked_at(name)).info

    async def _looked_at(self, name: str) -> Contents:
        """What ``name`` holds, its files closed again."""
        contents = await self.open(name)
        await contents.close()
        return contents

    async def is_current(self, contents: Contents) -> bool:
        """Always: nobody replaces a model by a commit that could be told."""
        return True

    async def gist(self, name: str) -> ManifestGist | None:
        """One without a step: a model tells none."""
        return ManifestGist(None, 0.0, {})

    async def verify(
        self, name: str, *, io_concurrency: int, progress: Progress | None = None
    ) -> VerifyReport:
        """Read all of it; no checksum says whether it is whole. Raises: as ``open``."""
        contents = await self.open(name)
        try:
            verification = Verification(
                name,
                contents.reader,
                self._threads,
                io_concurrency=io_concurrency,
                timeout=self._timeout,
                progress=progress,
            )
            return await verification.run_bare(contents)
        finally:
            await contents.close()


def _main_file(name: str, names: Sequence[str]) -> str | None:
    """The index, or the one file, that stands for the model among ``names``; None if all its files do. Raises
    LoadError."""
    indexes = [file for file in names if file.endswith(_INDEX_SUFFIX)]
    for file in (f"model{_INDEX_SUFFIX}", f"model{_SUFFIX}"):
        if file in names:
            return file
    if len(indexes) > 1:
        raise LoadError(
            f"{name!r} has several models, {', '.join(indexes[:3])}; name one of them by its own path",
            checkpoint_id=name,
        )
    return indexes[0] if indexes else None


def _damaged(name: str, file: str, error: HeaderError) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{name!r}: {file}: {error}; nothing was loaded", checkpoint_id=name)


async def _read(reader: LocalReader, file: str, offset: int, nbytes: int) -> bytes:
    content = bytearray(nbytes)
    if nbytes:
        await reader.read_into(file, [(offset, memoryview(content))])
    return bytes(content)
