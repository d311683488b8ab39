"""What the coordinator hands to the storage: `.metadata` and its manifest, as bytes.

Enters: a Publication, and what each rank wrote. Leaves: a Release. Pure: no I/O. Invariant: the manifest was
read back before anything is published.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .._names import attached_file
from ..formats import AttachedEntry, FileEntry, ManifestHead, encode_manifest
from ..info import JSON
from ..planning import Publication, prove_head
from .attachments import Told
from .file_writer import File


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One checkpoint, ready to be published."""

    metadata: bytes
    manifest: bytes
    sizes: Mapping[str, int]
    """File -> length, of all that was written."""
    time: float
    num_files: int
    """How many of them are data files."""
    nbytes: int
    """Length of those."""
    attached: dict[str, int]
    """Name -> length, of what is attached."""


def make_release(
    publication: Publication,
    entries: Sequence[File | None],
    attached: Told,
    *,
    checkpoint_id: str,
    uid: str,
    step: int | None,
    notes: Mapping[str, JSON],
) -> Release:
    """``entries``: per rank, what it wrote, if anything; ``attached``: what all of them attached. Raises
    ProofError."""
    metadata = publication.metadata.render(uid)
    now = time.time()
    ranks = [entry and FileEntry(name=entry[0], nbytes=entry[1], digest=entry[2]) for entry in entries]
    files = tuple(entry for entry in ranks if entry is not None)
    head = ManifestHead(
        checkpoint_id=checkpoint_id,
        uid=uid,
        step=step,
        time=now,
        world_size=len(entries),
        torch_version=torch.__version__,
        files=files,
        notes=notes,
        attached=tuple(
            AttachedEntry(name=name, nbytes=nbytes, digest=digest)
            for name, (nbytes, digest) in attached.items()
        ),
    )
    sizes = {file.name: file.nbytes for file in files}
    # what is read back wrongly fails the save now, not the resume in a week
    prove_head(head, publication.ends, ranks)
    manifest = encode_manifest(**head, metadata=metadata, constant=publication.manifest_json)
    return Release(
        metadata=metadata,
        manifest=manifest,
        sizes=sizes | {attached_file(uid, name): nbytes for name, (nbytes, _) in attached.items()},
        time=now,
        num_files=len(sizes),
        nbytes=sum(sizes.values()),
        attached={name: nbytes for name, (nbytes, _) in attached.items()},
    )
