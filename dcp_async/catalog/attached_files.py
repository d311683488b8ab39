"""What lies in a checkpoint's directory beside its data: files that were attached to it, and other people's.

Enters: a reader, and what a manifest says. Leaves: what is wrong with attached files, and which names are
nobody's of ours. Invariant: a file is as long as it was promised before memory for it is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import xxhash

from .._names import METADATA, owned_file, rank_of_metadata
from ..errors import StorageError
from ..formats import AttachedEntry, FileEntry
from ..storage import Listing, Reader

_CHUNK_BYTES = 1 << 20


async def what_is_wrong(reader: Reader, file: str, entry: AttachedEntry) -> str:
    """Why ``file`` is not what was attached; "" if it is. Raises StorageError."""
    nbytes = await reader.size(file)
    if nbytes != entry.nbytes:
        return f"it has {nbytes} bytes instead of {entry.nbytes}"
    hasher, memory = xxhash.xxh3_64(), memoryview(bytearray(min(nbytes, _CHUNK_BYTES)))
    for start in range(0, nbytes, _CHUNK_BYTES):
        part = memory[: min(_CHUNK_BYTES, nbytes - start)]
        await reader.read_into(file, [(start, part)])
        hasher.update(part)
    return "" if hasher.hexdigest() == entry.digest else "its bytes do not match their checksum"


async def foreign_names(
    reader: Reader,
    data_files: Collection[str],
    entries: Iterable[FileEntry],
    attached: Mapping[str, AttachedEntry],
) -> tuple[str, ...]:
    """The names there that are none of the checkpoint's; none if the storage can't tell. Raises
    StorageError.

    Args:
        data_files: the names that `.metadata` and the manifest have for data files.
        entries: those of the manifest, some of which others know by further names.
        attached: by the names of the files that hold it.
    """
    if not isinstance(reader, Listing):
        return ()
    # of files in other directories, what leads there
    ours = {METADATA, *(file.partition("/")[0] for file in data_files)}
    by_name = {entry.name: entry for entry in attached.values()}
    public = {entry.public_name: entry.nbytes for entry in entries if entry.public_name}
    foreign = []
    for name in await reader.names():
        if name in ours or owned_file(name) is not None or rank_of_metadata(name) is not None:
            continue
        try:
            if name in by_name:
                is_ours = await what_is_wrong(reader, name, by_name[name]) == ""
            else:
                # by its length alone: all of its bytes were read by its other name
                is_ours = name in public and await reader.size(name) == public[name]
        except StorageError:  # a directory, a link, closed to this process
            is_ours = False
        if not is_ours:
            foreign.append(name)
    return tuple(foreign)
