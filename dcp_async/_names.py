"""File names on disk: written here, and recognised here.

A save's own files bear its uid, 16 hexadecimal digits, so that two saves of one name, and stock's, are told
apart by names alone (docs/reference/on-disk-format.md).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeAlias

METADATA = ".metadata"
"""What makes a directory a checkpoint."""
FIRST_RANK_METADATA = "__0.metadata"
"""What makes one a checkpoint of stock's ``use_collectives=False``."""
UID_DIGITS = 16

Kind: TypeAlias = Literal["data", "manifest", "temporary", "lease"]

_UID = f"[0-9a-f]{{{UID_DIGITS}}}"
# [0-9], not \d, which takes the digits of every script: no file that somebody else named may look like ours
_DATA_FILE = rf"__[0-9]+_[0-9]+-(?P<data>{_UID})\.distcp"
_MANIFEST = rf"manifest-(?P<manifest>{_UID})\.json"
_OWNED = re.compile(
    rf"{_DATA_FILE}|{_MANIFEST}"
    rf"|\.metadata-(?P<temporary>{_UID})\.tmp|\.lease-(?P<lease>{_UID})"
)
_PUBLISHED = re.compile(rf"{_DATA_FILE}|{_MANIFEST}".encode())
_RANK_METADATA = re.compile(r"__([0-9]+)\.metadata")
_ANY_MANIFEST = re.compile(r"manifest-.*\.json", re.DOTALL)
# eight digits or more: a number that has outgrown them is written out, not cut
_STEP_DIRECTORY = re.compile(r"step-[0-9]{8,}")


class OwnedFile(NamedTuple):
    """What the name of one save's file says."""

    kind: Kind
    uid: str


def step_directory(step: int) -> str:
    """The checkpoint of ``step`` that was given no other name."""
    return f"step-{step:08d}"


def is_step_directory(name: str) -> bool:
    """Whether ``step_directory`` may have made ``name``."""
    return _STEP_DIRECTORY.fullmatch(name) is not None


def data_file(rank: int, number: int, uid: str) -> str:
    """One of a rank's files of items."""
    return f"__{rank}_{number}-{uid}.distcp"


def names_file_of_ours(metadata: bytes) -> bool:
    """Whether a file of ours is named somewhere in ``metadata``, as each of ours names its manifest."""
    return _PUBLISHED.search(metadata) is not None


def manifest_file(uid: str) -> str:
    """The manifest of one save."""
    return f"manifest-{uid}.json"


def temporary_metadata(uid: str) -> str:
    """`.metadata` before it is published."""
    return f".metadata-{uid}.tmp"


def lease_file(uid: str) -> str:
    """The lock of one save."""
    return f".lease-{uid}"


def owned_file(name: str) -> OwnedFile | None:
    """What ``name`` is to one save of ours; None if it is none of ours."""
    match = _OWNED.fullmatch(name)
    if match is None:
        return None
    kind: Kind
    for kind in ("data", "manifest", "temporary", "lease"):
        if match[kind] is not None:
            return OwnedFile(kind, match[kind])
    raise AssertionError(f"{name!r} matches no kind")


def is_manifest(name: str) -> bool:
    """Whether ``name`` is that of a manifest, whoever wrote it."""
    return _ANY_MANIFEST.fullmatch(name) is not None


def rank_of_metadata(name: str) -> int | None:
    """Whose ``name`` is, if it is one rank's metadata, as stock writes it without collectives."""
    match = _RANK_METADATA.fullmatch(name)
    return None if match is None else int(match[1])
