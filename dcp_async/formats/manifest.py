"""The manifest: what stock's `.metadata` has no place for. JSON, with a digest of itself at its end.

Enters and leaves: a Manifest. Invariant: the valid manifest of a checkpoint is the one that names the digest
of its `.metadata`, so a manifest without its `.metadata` (or the other way round) is never taken for a
checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NotRequired, TypedDict, Unpack

import xxhash

from .._names import attached_file, why_not_attachable
from ..info import JSON
from .manifest_fields import (
    DECODER,
    HEX,
    MAX_INT,
    Fields,
    ManifestError,
    leading_fields,
    manifest_errors,
    parsed,
    shown,
)

MANIFEST_VERSION = 2
"""What this release reads up to. It writes 1 unless there are public names, as releases before did."""


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
    public_name: str = ""
    """What others know it by: then it is as such a file has to be, and its footer lies elsewhere."""
    footer_file: str = ""
    footer_offset: int = 0
    """Where that is."""

    def to_json(self) -> dict[str, JSON]:
        fields: dict[str, JSON] = {"name": self.name, "nbytes": self.nbytes, "digest": self.digest}
        if self.public_name:
            fields |= {
                "public_name": self.public_name,
                "footer_file": self.footer_file,
                "footer_offset": self.footer_offset,
            }
        return fields


def attached_digest(content: bytes | bytearray) -> str:
    """The checksum of an attached file."""
    return xxhash.xxh3_64_hexdigest(content)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachedEntry:
    """One file that was attached with ``save(files=...)``."""

    name: str
    """What it is called; where it lies follows from that and the uid."""
    nbytes: int
    digest: str
    """``attached_digest`` of its bytes."""


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
    """The tree that was saved, as ``tree_to_json`` encodes it; ``tree_from_json`` checks it, once it is asked
    for."""
    strides: Mapping[str, tuple[int, ...]]
    """Original strides, in elements, of tensors that were not row-major."""
    exotic: tuple[str, ...]
    """Tensors stored as ``torch.save`` bytes in a room, not as raw payload."""
    notes: Mapping[str, JSON] = field(default_factory=dict)
    attached: tuple[AttachedEntry, ...] = ()

    @property
    def attached_files(self) -> dict[str, AttachedEntry]:
        """What is attached, by the names of the files that hold it."""
        return {attached_file(self.uid, entry.name): entry for entry in self.attached}


def structure_json(structure: JSON, strides: Mapping[str, tuple[int, ...]], exotic: tuple[str, ...]) -> str:
    """The part of a manifest that stays the same from save to save, encoded once per plan; ``structure`` as
    ``tree_to_json`` encodes it."""
    parts = {"structure": structure, "strides": strides, "exotic": exotic}
    # without its braces: it is put behind the head of each save
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
    attached: NotRequired[tuple[AttachedEntry, ...]]


def encode_manifest(*, metadata: bytes, constant: str, **head: Unpack[ManifestHead]) -> bytes:
    """The manifest's bytes; ``constant`` comes from ``structure_json``."""
    files = [file.to_json() for file in head["files"]]
    fields = {
        "format": "dcp_async",
        # releases that know no public names look for each footer behind its file, and would call it damaged
        "version": 2 if any(file.public_name for file in head["files"]) else 1,
        **head,
        "metadata_digest": xxhash.xxh3_64_hexdigest(metadata),
        "files": files,
        "notes": dict(head["notes"]),
    }
    # left out where there is nothing: the manifest is the one that releases before it wrote
    fields.pop("attached", None)
    if head.get("attached"):
        fields["attached"] = [
            {"name": entry.name, "nbytes": entry.nbytes, "digest": entry.digest} for entry in head["attached"]
        ]
    # the tree last, so that a reader who wants the step stops in front of it
    body = (json.dumps(fields, separators=(",", ":"))[:-1] + "," + constant).encode()
    # over the bytes as they are: one JSON has many spellings
    return body + b',"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}'


# 16 hex digits are an xxh3_64
_TAIL = len(b',"digest":"') + 16 + len(b'"}')


def decode_manifest(raw: bytes) -> Manifest:
    """Raises: ManifestError, NewerVersionError."""
    # first: only of a whole one may be said that a newer release wrote it
    _check_digest(raw)
    with manifest_errors():
        fields = Fields(parsed(raw))
        # before the other fields, which a newer version may lack or name otherwise
        _check_version(fields)
        return _manifest(
            fields,
            structure=fields.found["structure"],
            strides=_strides(fields.found["strides"]),
            exotic=_texts(fields.found["exotic"], "exotic"),
        )


def _manifest(
    fields: Fields, *, structure: JSON, strides: Mapping[str, tuple[int, ...]], exotic: tuple[str, ...]
) -> Manifest:
    return Manifest(
        checkpoint_id=fields.text("checkpoint_id"),
        uid=fields.text("uid", HEX),
        step=fields.step(),
        time=fields.seconds("time"),
        world_size=fields.integer("world_size", 1),
        torch_version=fields.text("torch_version"),
        metadata_digest=fields.text("metadata_digest", HEX),
        files=_files(fields.found["files"]),
        structure=structure,
        strides=strides,
        exotic=exotic,
        notes=Fields(fields.found["notes"]).found,
        attached=_attached(fields.found.get("attached", [])),
    )


class ManifestGist(NamedTuple):
    """What puts a checkpoint in order, and what a policy judges it by."""

    step: int | None
    time: float
    notes: Mapping[str, JSON]


def decode_gist(raw: bytes) -> ManifestGist:
    """What is told of each checkpoint under a root: the tree of many tensors, which stands behind it, is not
    decoded.

    Raises: ManifestError, NewerVersionError.
    """
    _check_digest(raw)
    with manifest_errors():
        wanted = frozenset({"format", "version", "step", "time", "notes"})
        fields = Fields(leading_fields(raw.decode(), wanted))
        _check_version(fields)
        return ManifestGist(fields.step(), fields.seconds("time"), Fields(fields.found["notes"]).found)


_TREE = b',"structure":'


def decode_head(raw: bytes) -> Manifest:
    """What stands in front of the tree, of the first bytes of a manifest: for lists of thousands. The tree,
    strides and exotic tensors are left out, and no checksum vouches for the rest.

    Raises: ManifestError, NewerVersionError.
    """
    with manifest_errors():
        fields = Fields(_head(raw))
        _check_version(fields)
        return _manifest(fields, structure=None, strides={}, exotic=())


def _head(raw: bytes) -> Any:
    """Raises ValueError if there is no tree in ``raw``."""
    end = raw.index(_TREE)
    while True:
        try:
            return DECODER.decode(raw[:end].decode() + "}")
        except ManifestError:
            raise
        except ValueError:  # notes may have a field of this name: cut there, it is no JSON
            end = raw.index(_TREE, end + 1)


def _check_digest(raw: bytes) -> None:
    body, tail = raw[:-_TAIL], raw[-_TAIL:]
    if tail != b',"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}':
        raise ManifestError("it does not match its own checksum")


def _check_version(fields: Fields) -> None:
    if (kind := fields.text("format")) != "dcp_async":
        raise ManifestError(f"its format is {kind[:40]!r}, not 'dcp_async'")
    version = fields.integer("version", 1)
    if version > MANIFEST_VERSION:
        raise NewerVersionError(
            f"it has format version {version}; this release reads up to {MANIFEST_VERSION}"
        )


_MAX_DIMS = 64


def _files(value: object) -> tuple[FileEntry, ...]:
    if type(value) is not list:
        raise ManifestError(f"its files are {shown(value)}")
    files = []
    for raw in value:
        entry = Fields(raw)
        nbytes, digest = entry.integer("nbytes", 0), entry.text("digest", HEX)
        if "public_name" not in entry.found:
            files.append(FileEntry(name=_file_name(entry, "name"), nbytes=nbytes, digest=digest))
            continue
        files.append(
            FileEntry(
                name=_file_name(entry, "name"),
                nbytes=nbytes,
                digest=digest,
                public_name=_file_name(entry, "public_name"),
                footer_file=_file_name(entry, "footer_file"),
                footer_offset=entry.integer("footer_offset", 0),
            )
        )
    # two lengths and digests of one file: whichever is taken, the other is wrong
    if len({entry.name for entry in files}) < len(files):
        raise ManifestError("it lists a file twice")
    return tuple(files)


def _attached(value: object) -> tuple[AttachedEntry, ...]:
    if type(value) is not list:
        raise ManifestError(f"what is attached is {shown(value)}")
    entries = []
    for raw in value:
        entry = Fields(raw)
        name = entry.text("name")
        if why_not_attachable(name):  # it is put behind a prefix, and must not lead out of the directory
            raise ManifestError(f"a file attached to it is called {shown(name)}")
        nbytes, digest = entry.integer("nbytes", 0), entry.text("digest", HEX)
        entries.append(AttachedEntry(name=name, nbytes=nbytes, digest=digest))
    if len({entry.name for entry in entries}) < len(entries):
        raise ManifestError("it lists an attached file twice")
    return tuple(entries)


def _file_name(entry: Fields, field: str) -> str:
    name = entry.text(field)
    # it is joined to the checkpoint's directory, and must not lead out of it
    if not name or "/" in name or name in (".", ".."):
        raise ManifestError(f"a file of it is called {shown(name)}")
    return name


def _strides(value: object) -> dict[str, tuple[int, ...]]:
    strides: dict[str, tuple[int, ...]] = {}
    for name, steps in Fields(value).found.items():
        if (
            type(steps) is not list
            or len(steps) > _MAX_DIMS
            or not all(type(step) is int and 0 <= step <= MAX_INT for step in steps)
        ):
            raise ManifestError(f"the strides of {shown(name)} are {shown(steps)} of no integers")
        strides[name] = tuple(steps)
    return strides


def _texts(value: object, what: str) -> tuple[str, ...]:
    if type(value) is not list or not all(type(text) is str for text in value):
        raise ManifestError(f"its {what} is {shown(value)}")
    return tuple(value)
