"""What the coordinator hands to the storage: `.metadata` and its manifest, as bytes.

Enters: a Publication, and what each rank wrote. Leaves: a Release. Pure: no I/O. Invariant: the manifest was
read back before anything is published.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..formats import FileEntry, ManifestHead, encode_manifest
from ..info import JSON
from ..planning import Publication, prove_head
from .file_writer import File


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One checkpoint, ready to be published."""

    metadata: bytes
    manifest: bytes
    sizes: Mapping[str, int]
    """File -> length, of all data files."""
    time: float


def make_release(
    publication: Publication,
    entries: Sequence[File | None],
    *,
    checkpoint_id: str,
    uid: str,
    step: int | None,
    notes: Mapping[str, JSON],
) -> Release:
    """``entries``: per rank, what it wrote, if anything. Raises ProofError."""
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
    )
    # what is read back wrongly fails the save now, not the resume in a week
    prove_head(head, publication.ends, ranks)
    manifest = encode_manifest(**head, metadata=metadata, constant=publication.manifest_json)
    return Release(
        metadata=metadata,
        manifest=manifest,
        sizes={file.name: file.nbytes for file in files},
        time=now,
    )
