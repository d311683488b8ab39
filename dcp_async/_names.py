"""File names on disk: written here, and recognised here.

A save's own files bear its uid, 16 hexadecimal digits, so that two saves of one name, and stock's, are told
apart by names alone (docs/reference/on-disk-format.md).
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal, NamedTuple, TypeAlias

METADATA = ".metadata"
"""What makes a directory a checkpoint."""
FIRST_RANK_METADATA = "__0.metadata"
"""What makes one a checkpoint of stock's ``use_collectives=False``."""
REMOVED = ".metadata-removed"
"""What is left of a removed checkpoint's `.metadata` until the last of its files has gone."""
UID_DIGITS = 16
ATTACHED_NAME_BYTES = 255 - len(".attached--") - UID_DIGITS
"""What of the 255 bytes that file systems take is left to the name of what is attached."""

Kind: TypeAlias = Literal["data", "manifest", "attached", "temporary", "copy", "lease"]
_KINDS: tuple[Kind, ...] = ("data", "manifest", "attached", "temporary", "copy", "lease")

_UID = f"[0-9a-f]{{{UID_DIGITS}}}"
# [0-9], not \d, which takes the digits of every script: no file that somebody else named may look like ours
_DATA_FILE = rf"__[0-9]+_[0-9]+-(?P<data>{_UID})\.(distcp|blob|digests|pieces)"
_MANIFEST = rf"manifest-(?P<manifest>{_UID})\.json"
_OWNED = re.compile(
    rf"{_DATA_FILE}|{_MANIFEST}|\.attached-(?P<attached>{_UID})-(?P<name>.+)|\.copy-(?P<copy>{_UID})-.+"
    rf"|\.metadata-(?P<temporary>{_UID})\.tmp|\.lease-(?P<lease>{_UID})",
    re.DOTALL,
)
_PUBLISHED = re.compile(rf"{_DATA_FILE}|{_MANIFEST}".encode())
_STOCK_DATA = re.compile(r"__[0-9]+_[0-9]+\.distcp")
_RANK_METADATA = re.compile(r"__([0-9]+)\.metadata")
_ANY_MANIFEST = re.compile(r"manifest-.*\.json", re.DOTALL)
# ours, stock's, and by what a directory is taken for another kind of checkpoint
_RESERVED = re.compile(r"__.*|manifest-.*\.json|.*\.distcp|.*\.safetensors(\.index\.json)?", re.DOTALL)
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


def last_number(name: str) -> int | None:
    """The step that a name tells: its last digits."""
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else None


def data_file(rank: int, number: int, uid: str) -> str:
    """One of a rank's files of items."""
    return f"__{rank}_{number}-{uid}.distcp"


def blob_file(number: int, uid: str) -> str:
    """One of the files that have a public name besides, which nobody looks for by its ending."""
    return f"__0_{number}-{uid}.blob"


def digests_file(uid: str) -> str:
    """The checksums of the blobs."""
    return f"__0_0-{uid}.digests"


def pieces_file(rank: int, uid: str) -> str:
    """A rank's loose bytes of blobs, until the commit."""
    return f"__{rank}_0-{uid}.pieces"


FileKey: TypeAlias = int | tuple[Literal["blob"], int]
"""A file of items: the number of a blob, or a rank, of its one file of DCP's items."""


def file_of(key: FileKey, uid: str) -> str:
    """The name of the file that ``key`` stands for."""
    return data_file(key, 0, uid) if isinstance(key, int) else blob_file(key[1], uid)


def is_blob(name: str) -> bool:
    """Whether ``blob_file`` may have made ``name``."""
    return name.endswith(".blob") and owned_file(name) is not None


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


def attached_file(uid: str, name: str) -> str:
    """What was attached to one save as ``name``. Hidden, so that nothing that globs finds it twice."""
    return f".attached-{uid}-{name}"


def attached_name(file: str) -> str:
    """The name of what is attached as ``file``."""
    match = _OWNED.fullmatch(file)
    return "" if match is None else match["name"] or ""


def attached_copy(uid: str, name: str) -> str:
    """A copy of what was attached, before it gets its ``name``."""
    return f".copy-{uid}-{name}"


def folded_name(name: str) -> str:
    """What file systems that know no case or no accents may take ``name`` for."""
    # twice: folding a character's case may take it apart again
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def why_not_attachable(name: str) -> str:
    """Why no file can be attached as ``name``, wherever the checkpoint is copied to; "" if one can."""
    if not name or name.startswith(".") or set(name) & set('/\\:*?"<>|'):
        return 'a plain name is not empty, does not begin with a dot and has none of / \\ : * ? " < > |'
    if name[-1] in ". ":
        return "some file systems drop a dot or blank at the end"
    if any(ord(char) < 32 or 127 <= ord(char) < 160 or char in "\u2028\u2029" for char in name):
        return "it has a line break or another control"
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "it has a lone surrogate, which is no character"
    if length > ATTACHED_NAME_BYTES:
        return f"it takes {length} bytes, and {ATTACHED_NAME_BYTES} at most fit"
    if _RESERVED.fullmatch(folded_name(name)):
        return "checkpoints have files of their own of such names"
    return ""


def owned_file(name: str) -> OwnedFile | None:
    """What ``name`` is to one save of ours; None if it is none of ours."""
    match = _OWNED.fullmatch(name)
    if match is None:
        return None
    for kind in _KINDS:
        if match[kind] is not None:
            return OwnedFile(kind, match[kind])
    raise AssertionError(f"{name!r} matches no kind")


def is_manifest(name: str) -> bool:
    """Whether ``name`` is that of a manifest, whoever wrote it."""
    return _ANY_MANIFEST.fullmatch(name) is not None


def is_stock_data(name: str) -> bool:
    """Whether ``name`` is that of a data file as stock names them."""
    return _STOCK_DATA.fullmatch(name) is not None


def rank_of_metadata(name: str) -> int | None:
    """Whose ``name`` is, if it is one rank's metadata, as stock writes it without collectives."""
    match = _RANK_METADATA.fullmatch(name)
    return None if match is None else int(match[1])
