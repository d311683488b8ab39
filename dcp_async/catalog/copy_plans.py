"""What has to be copied of a checkpoint, and by which checksums each byte of it is judged on the way.

Enters: a reader. Leaves: a CopyPlan, which a storage can carry out that knows no format. Invariant: every
byte of every file is covered by a checksum of the save, or is known beforehand, as footers are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from .._concurrency import BlockingThreads, run_blocking
from ..errors import CorruptCheckpointError
from ..formats import BLOCK_BYTES, AttachedEntry, FileEntry, Manifest, attached_digest, block_digests
from ..storage import CopyChunk, CopyPlan, Reader
from .decoding import manifest_and_bytes, read_raw
from .file_checks import footer_of, open_files

_CHUNK_BYTES = 8 << 20
"""A multiple of a block."""


@dataclass(slots=True, kw_only=True)
class _Proof:
    """What proves the bytes of one file."""

    nbytes: int
    image_bytes: int = 0
    digests: array[int] = field(default_factory=lambda: array("Q"))
    """Checksums of the blocks of its first ``image_bytes``."""
    known: list[tuple[int, bytes]] = field(default_factory=list)
    """Stretches of it by their offsets. What neither covers is zeros."""

    def is_whole(self, start: int, memory: memoryview) -> bool:
        """Whether ``memory`` is what the file has from ``start``, the start of a block, on."""
        stop = start + len(memory)
        image_stop = min(stop, max(start, self.image_bytes))
        blocks = block_digests(memory[: image_stop - start]) if image_stop > start else array("Q")
        if blocks != self.digests[start // BLOCK_BYTES : start // BLOCK_BYTES + len(blocks)]:
            return False
        expected = bytearray(stop - image_stop)
        for offset, content in self.known:
            low, high = max(offset, image_stop), min(offset + len(content), stop)
            if low < high:
                expected[low - image_stop : high - image_stop] = content[low - offset : high - offset]
        return memory[image_stop - start :] == expected


async def copy_plan_of(
    name: str,
    reader: Reader,
    threads: BlockingThreads,
    *,
    timeout: float,  # noqa: ASYNC109  # see run_blocking
) -> CopyPlan | None:
    """How ``name`` is copied from ``reader``; None if stock wrote it.

    Raises: CorruptCheckpointError; LoadError if a newer release wrote it; StorageError.
    """
    raw = await read_raw(reader)
    manifest, content = await manifest_and_bytes(name, reader, raw)
    if manifest is None:
        return None
    sizes = await open_files(name, reader, manifest)
    proofs: dict[str, _Proof] = {}
    for entry in manifest.files:
        await _add_data(name, reader, entry, proofs)
    for file, attached in manifest.attached_files.items():
        proofs[file] = await _attached_proof(name, reader, file, attached, threads, timeout)
    assert sizes.keys() <= proofs.keys()

    def chunks() -> Iterator[CopyChunk]:
        for file, proof in proofs.items():
            yield from _chunks_of(file, proof)

    return CopyPlan(
        uid=manifest.uid,
        time=manifest.time,
        metadata=raw[None],
        manifest=content,
        lengths={file: proof.nbytes for file, proof in proofs.items()},
        chunks=chunks,
        public_names=_public_names(manifest),
    )


def _public_names(manifest: Manifest) -> dict[str, str]:
    return {entry.public_name: entry.name for entry in manifest.files if entry.public_name}


async def _add_data(name: str, reader: Reader, entry: FileEntry, proofs: dict[str, _Proof]) -> None:
    footer = await footer_of(name, reader, entry.name, entry.nbytes, entry)
    proof = _Proof(nbytes=entry.nbytes, image_bytes=footer.image_bytes, digests=footer.digests)
    proofs[entry.name] = proof
    if not entry.public_name:
        proof.known.append((footer.image_bytes, footer.encode()))
        return
    # of several files the checksums lie in one
    if entry.footer_file not in proofs:
        proofs[entry.footer_file] = _Proof(nbytes=await reader.size(entry.footer_file))
    proofs[entry.footer_file].known.append((entry.footer_offset, footer.encode()))


async def _attached_proof(
    name: str,
    reader: Reader,
    file: str,
    entry: AttachedEntry,
    threads: BlockingThreads,
    timeout: float,  # noqa: ASYNC109  # see run_blocking
) -> _Proof:
    """Reads it: its checksum is that of the whole, and chunks are judged one by one."""
    content = bytearray(entry.nbytes)
    await reader.read_into(file, [(0, memoryview(content))])

    def digests() -> array[int] | None:
        return block_digests(memoryview(content)) if attached_digest(content) == entry.digest else None

    blocks = await run_blocking(threads, timeout, digests)
    if blocks is None:
        raise CorruptCheckpointError(
            f"checkpoint {name!r}: {file}, which holds {entry.name!r}, does not match its checksum",
            checkpoint_id=name,
        )
    return _Proof(nbytes=entry.nbytes, image_bytes=entry.nbytes, digests=blocks)


def _chunks_of(file: str, proof: _Proof) -> Iterator[CopyChunk]:
    for start in range(0, proof.nbytes, _CHUNK_BYTES):

        def is_whole(memory: memoryview, start: int = start) -> bool:
            return proof.is_whole(start, memory)

        yield CopyChunk(file, start, min(start + _CHUNK_BYTES, proof.nbytes), is_whole)
