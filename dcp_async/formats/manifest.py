"""The manifest: what stock's `.metadata` has no place for. JSON, with a digest of itself at its end.

Enters and leaves: a Manifest. Invariant: the valid manifest of a checkpoint is the one that names the digest
of its `.metadata`, so a manifest without its `.metadata` (or the other way round) is never taken for a
checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

import xxhash

from .structure import JSON

MANIFEST_VERSION = 1


class ManifestError(ValueError):
    """A manifest that is damaged or was written by a newer release."""


class NewerVersionError(ManifestError):
    """A whole manifest of a version that this release does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One data file."""

    name: str
    """File name in the checkpoint's directory."""
    nbytes: int
    """Its length."""
    digest: str
    """Checksum of its footer's table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint is, beyond DCP's metadata."""

    checkpoint_id: str
    uid: str
    step: int | None
    time: float
    world_size: int
    torch_version: str
    metadata_digest: str
    """xxh3_64 of the bytes of `.metadata`."""
    files: tuple[FileEntry, ...]
    structure: JSON
    """The tree that was saved, as ``tree_to_json`` encodes it."""
    strides: Mapping[str, tuple[int, ...]]
    """Original strides, in elements, of tensors that were not row-major."""
    exotic: tuple[str, ...]
    """Tensors stored as ``torch.save`` bytes in a slot, not as raw payload."""
    notes: Mapping[str, JSON] = field(default_factory=dict)


def structure_json(structure: JSON, strides: Mapping[str, tuple[int, ...]], exotic: tuple[str, ...]) -> str:
    """The part of a manifest that stays the same from save to save, encoded once per plan; ``structure`` as
    ``tree_to_json`` encodes it."""
    parts = {"structure": structure, "strides": strides, "exotic": exotic}
    return json.dumps(parts, separators=(",", ":"))[1:-1]


class ManifestHead(TypedDict):
    """What differs between the saves of one plan; the fields of ``Manifest``."""

    checkpoint_id: str
    uid: str
    step: int | None
    time: float
    world_size: int
    torch_version: str
    files: tuple[FileEntry, ...]
    notes: Mapping[str, JSON]


def encode_manifest(*, metadata: bytes, constant: str, **head: Unpack[ManifestHead]) -> bytes:
    """The manifest's bytes; ``constant`` comes from ``structure_json``."""
    files = [{"name": file.name, "nbytes": file.nbytes, "digest": file.digest} for file in head["files"]]
    fields = {
        "format": "dcp_async",
        "version": MANIFEST_VERSION,
        **head,
        "metadata_digest": xxhash.xxh3_64_hexdigest(metadata),
        "files": files,
        "notes": dict(head["notes"]),
    }
    body = (json.dumps(fields, separators=(",", ":"))[:-1] + "," + constant).encode()
    return body + b',"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}'


_TAIL = len(b',"digest":"') + 16 + len(b'"}')


def decode_manifest(raw: bytes) -> Manifest:
    """Raises: ManifestError, NewerVersionError."""
    body, tail = raw[:-_TAIL], raw[-_TAIL:]
    if tail != b',"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}':
        raise ManifestError("it does not match its own checksum")
    try:
        parts: dict[str, Any] = json.loads(raw)
        if parts["format"] != "dcp_async":
            raise ManifestError(f"its format is {parts['format']!r}, not 'dcp_async'")
        if parts["version"] > MANIFEST_VERSION:
            raise NewerVersionError(
                f"it has format version {parts['version']}; this release reads up to {MANIFEST_VERSION}"
            )
        step = parts["step"]
        if not (step is None or type(step) is int) or not isinstance(parts["time"], (int, float)):
            raise ManifestError(f"its step is {step!r}")
        return Manifest(
            checkpoint_id=parts["checkpoint_id"],
            uid=parts["uid"],
            step=parts["step"],
            time=parts["time"],
            world_size=parts["world_size"],
            torch_version=parts["torch_version"],
            metadata_digest=parts["metadata_digest"],
            files=tuple(FileEntry(**file) for file in parts["files"]),
            structure=parts["structure"],
            strides={name: tuple(stride) for name, stride in parts["strides"].items()},
            exotic=tuple(parts["exotic"]),
            notes=parts["notes"],
        )
    except ManifestError:
        raise
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ManifestError(f"it lacks what a manifest holds: {error}") from error
