"""A save proves itself: what it is about to publish is read by the reader that will have to read it.

Enters: the bytes of `.metadata` and of a manifest, and what the plan says of each name. Leaves: nothing, or a
ProofError that names what differs. Pure. Invariant: whatever encodes, decodes or pickles otherwise than we
believe, a newer torch above all, fails the save and not the resume. Once per plan; docs/adr/0014.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from .._geometry import Offsets
from .._names import UID_DIGITS, FileKey, file_of
from ..errors import LoadError
from ..formats import (
    PLAIN_DTYPES,
    Manifest,
    ManifestError,
    ManifestHead,
    MetadataTemplate,
    Place,
    decode_manifest,
    decode_metadata,
    encode_manifest,
    leaf_names,
    locations_of,
    tensor_frame,
    transforms_of,
    tree_from_json,
)
from ..info import JSON
from ..trust import Trust, UntrustedGlobal, load_item

_UID = "0" * UID_DIGITS
_NAME = "proof"


class ProofError(ValueError):
    """What would be published is not what the plan says."""

    def __init__(self, differs: str) -> None:
        super().__init__(
            f"what was about to be published does not read back as it was planned: {differs}. Nothing was "
            "published. If a planner of your own is in use, it says what is not so; if not, this release and "
            f"torch {torch.__version__} do not fit together: use one that it was tested with, and report this"
        )


@dataclass(frozen=True, slots=True)
class Promise:
    """What a plan says of names that lie alike."""

    names: Sequence[str]
    size: Offsets | None
    """None of what is no tensor."""
    dtype: torch.dtype | None
    boxes: Sequence[tuple[Offsets | None, Offsets]]
    """(offsets, shape) of the chunks; what is no tensor has one without offsets."""
    rows: Iterable[Sequence[Place | None]]
    """Per name, where each chunk lies."""


@dataclass(frozen=True, slots=True)
class Promised:
    """What a plan says of all that it publishes."""

    names: Iterable[Promise]
    tree: JSON
    strides: Mapping[str, tuple[int, ...]]
    exotic: Sequence[str]


def prove(template: MetadataTemplate, manifest_json: str, promised: Promised) -> dict[FileKey, int]:
    """Check `.metadata` and the manifest's constant part. Gives, per file, how long it must be.

    Raises: ProofError.
    """
    names, ends = _prove_metadata(template, promised)
    head = ManifestHead(
        checkpoint_id=_NAME,
        uid=_UID,
        step=0,
        time=0.0,
        world_size=1,
        torch_version=torch.__version__,
        files=(),
        notes={},
    )
    manifest = _decoded(encode_manifest(**head, metadata=b"", constant=manifest_json))
    if manifest.structure != promised.tree or manifest.strides != promised.strides:
        raise ProofError("the manifest has another structure or other strides")
    if list(manifest.exotic) != list(promised.exotic):
        raise ProofError(f"the manifest's list of tensors in rooms is {manifest.exotic}")
    # the two are written apart, and a load goes by both
    leaves = leaf_names(tree_from_json(manifest.structure))
    if len(leaves) != len(names) or not names.issuperset(leaves):
        odd = sorted(names.symmetric_difference(leaves)) or ["a name occurs twice"]
        raise ProofError(f"structure and .metadata have other names: {_told(odd)}")
    return ends


def _prove_metadata(template: MetadataTemplate, promised: Promised) -> tuple[set[str], dict[FileKey, int]]:
    try:
        metadata = decode_metadata(template.render(_UID))
        locations: Mapping[tuple[str, Any], tuple[str, int, int]] = locations_of(_NAME, metadata)
        transforms = transforms_of(_NAME, metadata)
    except UntrustedGlobal as error:
        raise ProofError(f".metadata names {error.name}") from error
    except (ValueError, LoadError) as error:
        raise ProofError(f".metadata can't be read ({error})") from error
    # whoever reads an item with a descriptor decompresses it, and we compress nothing
    if transforms:
        raise ProofError(f"{next(iter(transforms))[0]} would be read as compressed")
    entries = metadata.state_dict_metadata
    seen: set[str] = set()
    num_places = 0
    ends: dict[FileKey, int] = {}
    name_of = cache(lambda key: file_of(key, _UID))
    for promise in promised.names:
        is_alike = _comparison(promise)
        if promise.dtype in PLAIN_DTYPES and promise.size is not None:
            prove_item(promise.dtype, len(promise.size))
        seen.update(promise.names)
        num_places += len(promise.boxes) * len(promise.names)
        for name, row in zip(promise.names, promise.rows, strict=True):
            if not is_alike(entries.get(name)):
                raise ProofError(f"{name} is {_described(entries.get(name))}, not {_promised(promise)}")
            for (offsets, _), place in zip(promise.boxes, row, strict=True):
                assert place is not None  # or nothing would have been encoded
                file, offset, length = place
                if (location := locations.get((name, offsets))) != (name_of(file), offset, length):
                    raise ProofError(f"{name} at {offsets} lies in {location}, not in {place}")
                if ends.get(file, 0) < offset + length:
                    ends[file] = offset + length
    if seen != entries.keys():
        raise ProofError(f".metadata has other names: {_told(sorted(seen ^ entries.keys()))}")
    # each promised place was found: what is left over is more than was planned
    if num_places != len(locations):
        raise ProofError(f".metadata has {len(locations)} places for {num_places} items")
    return seen, ends


@lru_cache(maxsize=256)
def prove_item(dtype: torch.dtype, dims: int) -> None:
    """Check that a tensor's item is one to the reader of items. Once in a process for what is alike. Raises:
    ProofError."""
    # two elements per dimension, so that a wrong order of them shows, unless that would get large
    shape = (2,) * dims if dims <= 4 else (1,) * dims
    nbytes = math.prod(shape) * dtype.itemsize
    # of other bytes than 0 and 1 a bool may make anything
    payload = bytes(nbytes) if dtype is torch.bool else bytes(number % 251 for number in range(nbytes))
    head, tail = tensor_frame(dtype, shape)
    try:
        # without any permission: nobody should have to trust what we wrote ourselves
        value = load_item(io.BytesIO(head + payload + tail), Trust())
    except UntrustedGlobal as error:
        raise ProofError(f"an item of {dtype} names {error.name}") from error
    except Exception as error:  # whatever torch's reader raises
        raise ProofError(f"an item of {dtype} can't be read ({type(error).__name__}: {error})") from error
    if not isinstance(value, torch.Tensor) or (value.dtype, tuple(value.shape)) != (dtype, shape):
        raise ProofError(f"an item of {dtype} {shape} reads as {value!r:.200}")
    if bytes(value.reshape(-1).view(torch.uint8).tolist()) != payload:
        raise ProofError(f"an item of {dtype} {shape} reads as other bytes")


def _comparison(promise: Promise) -> Callable[[Any], bool]:
    """Whether an entry of `.metadata` says the same; what it shares with the one before is compared once."""
    size, dtype, boxes = promise.size, promise.dtype, dict(promise.boxes)
    known: dict[int, object] = {}

    def is_chunk(chunk: Any) -> bool:
        # chunks are shared between tensors, so most of them were compared before
        if known.get(id(chunk)) is not chunk:
            if boxes.get(chunk.offsets) != chunk.sizes:
                return False
            known[id(chunk)] = chunk
        return True

    def is_tensor(entry: Any) -> bool:
        return (
            type(entry) is TensorStorageMetadata
            and entry.size == size
            and entry.properties.dtype is dtype
            and len(entry.chunks) == len(boxes)
            and all(map(is_chunk, entry.chunks))
            and (len(boxes) < 2 or len({chunk.offsets for chunk in entry.chunks}) == len(boxes))
        )

    return is_tensor if size is not None else lambda entry: type(entry) is BytesStorageMetadata


def _described(entry: Any) -> str:
    if type(entry) is not TensorStorageMetadata:
        return "missing" if entry is None else "no tensor"
    chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    return f"{entry.properties.dtype} {tuple(entry.size)} in chunks {chunks!r:.200}"


def _promised(promise: Promise) -> str:
    if promise.size is None:
        return "no tensor"
    return f"{promise.dtype} {promise.size} in chunks {list(promise.boxes)!r:.200}"


def _told(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _decoded(raw: bytes) -> Manifest:
    try:
        return decode_manifest(raw)
    except ManifestError as error:
        raise ProofError(f"the manifest can't be read: {error}") from error


def prove_head(head: ManifestHead, ends: Mapping[FileKey, int]) -> None:
    """Check what differs between the saves of one plan: the manifest's head, and that each file is there
    and as long as its items need.

    Raises: ProofError.
    """
    read = _decoded(
        # with an empty structure: the real one grows with the state, and was proven with the plan
        encode_manifest(**head, metadata=b"", constant='"structure":null,"strides":{},"exotic":[]')
    )
    for field, meant in head.items():
        if getattr(read, field) != meant:
            raise ProofError(f"the manifest's {field} reads as {getattr(read, field)!r:.200}")
    entries = {entry.name: entry for entry in head["files"]}
    for file, end in ends.items():
        entry = entries.get(file_of(file, head["uid"]))
        if entry is None or entry.nbytes < end:
            whose = f"rank {file}" if isinstance(file, int) else f"the public file {file[1]}"
            raise ProofError(f"the items of {whose} end at {end}, its file is {entry}")
