"""Whether the data files of a checkpoint are all there, as long as they were, and with whose footers.

Enters: a reader, and what manifest and `.metadata` promise. Leaves: lengths and block checksums, or
CorruptCheckpointError. Invariant: what was checked is open, so that nothing takes it away any more.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping

from ..errors import CorruptCheckpointError
from ..formats import (
    SECTOR_BYTES,
    FileEntry,
    Footer,
    FooterError,
    Manifest,
    footer_bytes,
    footer_span,
    read_trailer,
)
from ..storage import Reader, turn_to_copy

_LONG_FOOTER_BYTES = 1 << 20
"""Only files from 8 GiB on have longer ones."""


async def open_files(name: str, reader: Reader, manifest: Manifest) -> dict[str, int]:
    """File -> length, of all that the manifest names, open from here on.

    Raises: CorruptCheckpointError for one that has another length.
    """
    sizes: dict[str, int] = {}
    lengths = {entry.name: entry.nbytes for entry in manifest.files}
    lengths |= {file: entry.nbytes for file, entry in manifest.attached_files.items()}
    for file, promised in lengths.items():
        nbytes = await reader.size(file)
        why = f"it has {nbytes} bytes instead of {promised}"
        if nbytes != promised and await turn_to_copy(reader, file, why):
            nbytes = await reader.size(file)
        sizes[file] = nbytes
        if nbytes != promised:
            raise _cut_off(name, file, nbytes, promised)
    return sizes


def _cut_off(name: str, file: str, nbytes: int, promised: int) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"checkpoint {name!r}: {file} has {nbytes} bytes instead of {promised}; it was cut off. "
        "Load an older checkpoint",
        checkpoint_id=name,
    )


async def check_files(
    name: str,
    reader: Reader,
    manifest: Manifest | None,
    locations: Iterable[tuple[str, int, int]],
    sizes: Mapping[str, int],
) -> tuple[dict[str, array[int]], dict[str, int]]:
    """Open every file that is not yet (``sizes``), check its size, and fetch the block checksums of ours.

    Gives (file -> checksums of its blocks, file -> length without its footer). Raises CorruptCheckpointError.
    """
    # the furthest byte of each file: one comparison of lengths serves all of its items
    ends: dict[str, int] = {}
    for file, offset, length in locations:
        ends[file] = max(ends.get(file, 0), offset + length)
    entries = {entry.name: entry for entry in manifest.files} if manifest else {}
    digests: dict[str, array[int]] = {}
    image_bytes: dict[str, int] = {}
    for file, end in ends.items():
        # files of stock's, and those in other directories, are named by .metadata alone
        nbytes = sizes[file] if file in sizes else await reader.size(file)
        if nbytes < end:
            raise _cut_off(name, file, nbytes, end)
        image_bytes[file] = nbytes
        entry = entries.get(file)
        if entry is not None:
            footer = await footer_of(name, reader, file, nbytes, entry)
            digests[file] = footer.digests
            image_bytes[file] = footer.image_bytes
        elif manifest is not None and "/" not in file:
            raise CorruptCheckpointError(
                f"checkpoint {name!r}: .metadata names {file}, the manifest does not; "
                "load an older checkpoint",
                checkpoint_id=name,
            )
    return digests, image_bytes


async def footer_of(name: str, reader: Reader, file: str, nbytes: int, entry: FileEntry | None) -> Footer:
    """The footer of ``file``; ``entry`` is None if no manifest tells of it. Raises CorruptCheckpointError."""
    try:
        return await _whole_footer(reader, file, nbytes, entry)
    except FooterError as error:
        where = entry.footer_file if entry is not None and entry.footer_file else file
        problem = error
        if await turn_to_copy(reader, where, str(error)):
            try:
                return await _whole_footer(reader, file, nbytes, entry)
            except FooterError as other:
                problem = other
        raise CorruptCheckpointError(
            f"checkpoint {name!r}: {file}: {problem}; load an older checkpoint", checkpoint_id=name
        ) from problem


async def _whole_footer(reader: Reader, file: str, nbytes: int, entry: FileEntry | None) -> Footer:
    """Raises FooterError."""
    if entry is not None and entry.public_name:
        footer = await _read_apart(reader, nbytes, entry)
    else:
        footer = await _read_footer(reader, file, nbytes)
    # a footer vouches for its own table; that it is this save's, the manifest alone says
    if entry is not None and footer.digest != entry.digest:
        raise FooterError("the footer's table is not the one that the manifest names")
    return footer


async def _read_footer(reader: Reader, file: str, nbytes: int) -> Footer:
    """Raises FooterError."""
    span = footer_span(nbytes)
    if span > _LONG_FOOTER_BYTES:  # a file may only pretend to be so long
        last = bytearray(SECTOR_BYTES)
        await reader.read_into(file, [(nbytes - len(last), memoryview(last))])
        read_trailer(bytes(last), nbytes)
    try:
        raw = bytearray(span)
    except (MemoryError, OverflowError) as error:
        raise FooterError(f"its footer would take {span} bytes") from error
    await reader.read_into(file, [(nbytes - len(raw), memoryview(raw))])
    return Footer.decode(bytes(raw), nbytes)


async def _read_apart(reader: Reader, nbytes: int, entry: FileEntry) -> Footer:
    """The footer of a file of ``nbytes`` that lies in another one. Raises FooterError."""
    length = footer_bytes(nbytes)
    if entry.footer_offset + length > await reader.size(entry.footer_file):
        raise FooterError(f"{entry.footer_file} ends before its checksums do")
    raw = bytearray(length)
    await reader.read_into(entry.footer_file, [(entry.footer_offset, memoryview(raw))])
    # as if it stood behind its file: a footer tells the length of what it is the end of
    return Footer.decode(bytes(raw), nbytes + length)
