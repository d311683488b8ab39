"""What the coordinator hands to the storage: `.metadata` and its manifest, as bytes.

Enters: a Publication, and what each rank wrote. Leaves: a Release. Pure: no I/O. Invariant: the manifest was
read back before anything is published.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from .._names import attached_file, digests_file
from ..formats import AttachedEntry, FileEntry, ManifestHead, encode_manifest, footer_bytes
from ..info import JSON
from ..planning import Publication, prove_head
from ..storage import NamingTransaction, Transaction
from .attachments import Told
from .public_files import File


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One checkpoint, ready to be published."""

    metadata: bytes
    manifest: bytes
    sizes: Mapping[str, int]
    """File -> length, of all that was written."""
    public_names: Mapping[str, str]
    """What others know some of them by -> file."""
    time: float
    num_files: int
    """How many of them are data files."""
    nbytes: int
    """Length of those."""
    attached: dict[str, int]
    """Name -> length, of what is attached."""

    async def publish(self, transaction: Transaction, *, replace: bool) -> None:
        """Make it a checkpoint. Raises: as ``Transaction.commit``."""
        if self.public_names:
            # what can't give them was refused when the engine opened
            naming = cast(NamingTransaction, transaction)
            await naming.commit(self.metadata, self.manifest, replace=replace, public_names=self.public_names)
        else:
            await transaction.commit(self.metadata, self.manifest, replace=replace)


def make_release(
    publication: Publication,
    written: Sequence[File],
    attached: Told,
    *,
    checkpoint_id: str,
    uid: str,
    world_size: int,
    step: int | None,
    notes: Mapping[str, JSON],
) -> Release:
    """``written``: the data files of all ranks; ``attached``: what they attached. Raises ProofError."""
    metadata = publication.metadata.render(uid)
    # once, so that the manifest says what the caller is told
    now = time.time()
    files = tuple(_entry(uid, file) for file in written)
    head = ManifestHead(
        checkpoint_id=checkpoint_id,
        uid=uid,
        step=step,
        time=now,
        world_size=world_size,
        torch_version=torch.__version__,
        files=files,
        notes=notes,
        attached=tuple(
            AttachedEntry(name=name, nbytes=nbytes, digest=digest)
            for name, (nbytes, digest) in attached.items()
        ),
    )
    sizes = _sizes(files)
    # what is read back wrongly fails the save now, not the resume in a week
    prove_head(head, publication.ends)
    manifest = encode_manifest(**head, metadata=metadata, constant=publication.manifest_json)
    return Release(
        metadata=metadata,
        manifest=manifest,
        sizes=sizes | {attached_file(uid, name): nbytes for name, (nbytes, _) in attached.items()},
        public_names={file.public_name: file.name for file in files if file.public_name},
        time=now,
        num_files=len(files),
        nbytes=sum(sizes.values()),
        attached={name: nbytes for name, (nbytes, _) in attached.items()},
    )


def _entry(uid: str, file: File) -> FileEntry:
    entry = FileEntry(name=file.name, nbytes=file.nbytes, digest=file.digest)
    if not file.public_name:
        return entry
    return replace(
        entry,
        public_name=file.public_name,
        footer_file=digests_file(uid),
        footer_offset=file.footer_offset,
    )


def _sizes(files: Sequence[FileEntry]) -> dict[str, int]:
    sizes = {file.name: file.nbytes for file in files}
    for file in files:
        if file.public_name:
            end = file.footer_offset + footer_bytes(file.nbytes)
            sizes[file.footer_file] = max(sizes.get(file.footer_file, 0), end)
    return sizes
