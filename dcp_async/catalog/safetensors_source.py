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
    StoredTensor,
    decode_header,
    files_of_index,
    header_bytes,
    join_files,
    may_be_quantised,
)
from ..info import VerifyReport
from ..storage import LocalPlace, LocalReader
from .contents import Contents
from .source_opener import SourceOpener
from .verification import Verification

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_INDEX_BYTES = 64 << 20
_CONFIG = "config.json"


def is_model_file(name: str) -> bool:
    """Whether ``name`` is that of a safetensors file, or of an index of some."""
    return name.endswith((_SUFFIX, _INDEX_SUFFIX))


class SafetensorsOpener(SourceOpener):
    """Opens what holds no `.metadata`, but safetensors files: by the headers of all of them."""

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
            timeout: as for SourceOpener.
            only: the one file of the directory that is meant, or the index that says which; None for all of
                the model that lies there.
        """
        super().__init__(place, threads, metadata_of, timeout=timeout)
        self._only = only

    async def contents(self, name: str, reader: LocalReader) -> Contents:
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
            info=self.info(name, nbytes=num_bytes, num_files=len(files), producer="safetensors"),
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

    async def verified(self, verification: Verification, contents: Contents) -> VerifyReport:
        # no checksum says whether it is whole
        return await verification.run_bare(contents)


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
