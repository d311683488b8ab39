"""Safetensors files as others write them: their header, checked, and what a directory of them holds.

Enters: bytes of headers and of an index, all of them somebody else's. Leaves: DCP's Metadata with the place
of each tensor's bytes, or HeaderError. Pure: JSON is all that is decoded. Invariant: what is believed of a
file fits its length, to the byte and without holes.
Source: https://github.com/huggingface/safetensors (the format), torch's hf_storage.py (sharding information).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

LENGTH_BYTES = 8
"""What stands before the header: its length, little endian."""
MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""
_MAX_DIMS = 64
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
# of this torch alone: older releases lack some of these
DTYPE_NAMES: dict[torch.dtype, str] = {
    getattr(torch, name): kind for kind, name in _DTYPES.items() if hasattr(torch, name)
}
"""What a header calls the dtypes of this torch."""
_SHARDING = "DCP_SHARDING_INFO"
"""Where torch's HuggingFaceStorageWriter says which part of a tensor a file holds."""


class HeaderError(ValueError):
    """A header or an index that is damaged, or lies."""


class AmbiguousNameError(ValueError):
    """Several files hold a tensor of one name, and no index says which is meant."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of one file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    """Its bytes, counted from the file's first."""
    offsets: tuple[int, ...] | None
    """Where it begins in the whole tensor; None if it is all of it."""


def header_bytes(first: bytes, file_bytes: int) -> int:
    """Length of the header that follows ``first``, the first 8 bytes of a file. Raises HeaderError."""
    if len(first) < LENGTH_BYTES:
        raise HeaderError("the file is too short for a header")
    (length,) = struct.unpack("<Q", first)
    # before so much memory is asked for: a file may say anything here
    if length > min(file_bytes - LENGTH_BYTES, MAX_HEADER_BYTES):
        raise HeaderError(f"its header would take {length} bytes of the {file_bytes} that the file has")
    return int(length)


def decode_header(raw: bytes, file_bytes: int) -> list[StoredTensor]:
    """The tensors that the header ``raw`` of a file of ``file_bytes`` lists, by offset. Raises
    HeaderError."""
    entries = parse_mapping(raw, "its header")
    extra = entries.pop("__metadata__", {})
    sharding = _sharding(extra)
    begin = LENGTH_BYTES + len(raw)
    tensors = sorted(
        (_tensor(name, entry, begin, sharding.get(name)) for name, entry in entries.items()),
        # by their ends too: an empty tensor begins where the next one does
        key=lambda tensor: (tensor.start, tensor.stop),
    )
    end = begin
    for tensor in tensors:
        # the format has no holes, so that no file can be one of another kind as well
        if tensor.start != end:
            what = "overlaps the one before it" if tensor.start < end else f"leaves a hole at byte {end}"
            raise HeaderError(f"{tensor.name!r} begins at byte {tensor.start} and {what}")
        end = tensor.stop
    if end != file_bytes:
        raise HeaderError(f"its header describes {end} bytes, the file has {file_bytes}")
    return tensors


def parse_mapping(raw: bytes, what: str) -> dict[str, Any]:
    """The JSON mapping ``raw``, called ``what`` in errors. Raises HeaderError."""

    # json takes the last of two, other readers the first: they would load different tensors
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise HeaderError(f"{what} has a key twice")
        return made

    try:
        # decoded here, since json would take bytes for UTF-16 or UTF-32 too, which the format does not have
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{what} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise HeaderError(f"{what} is no mapping")
    return value


def _sharding(extra: Any) -> dict[str, tuple[int, ...]]:
    """Name -> where its part begins, as torch's writer of shards notes it."""
    if not isinstance(extra, dict) or _SHARDING not in extra:
        return {}
    if not isinstance(extra[_SHARDING], str):
        raise HeaderError("its sharding information is no text")
    # JSON can escape half a surrogate pair, which can't be encoded
    places = parse_mapping(extra[_SHARDING].encode(errors="replace"), "its sharding information")
    offsets_of = {}
    for name, entry in places.items():
        offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
        offsets_of[name] = _numbers(offsets, f"the offsets of {name!r}")
    return offsets_of


def _numbers(value: Any, what: str) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) > _MAX_DIMS
        # True is an int too; and two of them have to add up to an int64, as torch.Size has it
        or not all(type(number) is int and 0 <= number < 1 << 62 for number in value)
    ):
        raise HeaderError(f"{what} are no list of sizes")
    return tuple(value)


def _tensor(name: str, entry: Any, begin: int, offsets: tuple[int, ...] | None) -> StoredTensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise HeaderError(f"{name!r} lacks its dtype, shape or data_offsets")
    kind = entry["dtype"]
    dtype = getattr(torch, _DTYPES.get(kind, ""), None) if isinstance(kind, str) else None
    if dtype is None:
        raise HeaderError(f"{name!r} is of dtype {kind!r}, which this torch does not have")
    shape = _numbers(entry["shape"], f"the shape of {name!r}")
    span = _numbers(entry["data_offsets"], f"the data_offsets of {name!r}")
    if len(span) != 2 or span[0] > span[1]:
        raise HeaderError(f"the data_offsets of {name!r} are no range")
    if prod(shape) * dtype.itemsize != span[1] - span[0]:
        raise HeaderError(
            f"{name!r} has {span[1] - span[0]} bytes, {list(shape)} of {kind} takes "
            f"{prod(shape) * dtype.itemsize}"
        )
    if offsets is not None and len(offsets) != len(shape):
        raise HeaderError(f"{name!r} has {len(shape)} dimensions, its part begins at {list(offsets)}")
    return StoredTensor(name, dtype, shape, begin + span[0], begin + span[1], offsets)


def files_of_index(raw: bytes) -> dict[str, str]:
    """Tensor -> file, of a ``*.safetensors.index.json``. Raises HeaderError."""
    weights = parse_mapping(raw, "it").get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
        raise HeaderError("it has no weight_map of names to files")
    for file in weights.values():
        # an index is somebody else's, and must not lead out of its directory
        if "/" in file or file in ("", ".", ".."):
            raise HeaderError(f"its weight_map names {file!r}, which is no file beside it")
    return weights


def join_files(
    files: Mapping[str, Sequence[StoredTensor]], weights: Mapping[str, str] | None
) -> tuple[Metadata, dict[tuple[str, Any], tuple[str, int, int]]]:
    """What ``files`` hold together, and where: (name, offsets) -> (file, offset, length). Raises HeaderError;
    AmbiguousNameError without an index.

    Args:
        weights: what the index says of each name; None without one.
    """
    parts: dict[str, list[tuple[str, StoredTensor]]] = {}
    for file, tensors in files.items():
        for tensor in tensors:
            parts.setdefault(tensor.name, []).append((file, tensor))
    for name, file in (weights or {}).items():
        if file not in (where for where, _ in parts.get(name, ())):
            raise HeaderError(f"the index says that {name!r} lies in {file}, which lacks it")
    names: dict[str, TensorStorageMetadata] = {}
    locations: dict[tuple[str, Any], tuple[str, int, int]] = {}
    for name, stored in parts.items():
        # with an index a name in two files is a fault of theirs; without one two models may share a directory
        names[name] = _joined(name, stored, HeaderError if weights is not None else AmbiguousNameError)
        for file, tensor in stored:
            begin = torch.Size(tensor.offsets or (0,) * len(tensor.shape))
            locations[name, begin] = (file, tensor.start, tensor.stop - tensor.start)
    return Metadata(state_dict_metadata=dict(names), storage_data={}), locations


def _joined(
    name: str, stored: Sequence[tuple[str, StoredTensor]], twice: type[ValueError]
) -> TensorStorageMetadata:
    """``twice``: what is raised for whole tensors of one name."""
    first = stored[0][1]
    if len(stored) > 1 and any(tensor.offsets is None for _, tensor in stored):
        files = ", ".join(sorted({file for file, _ in stored})[:3])
        raise twice(f"{name!r} lies in several files: {files}")
    if any((t.dtype, len(t.shape)) != (first.dtype, len(first.shape)) for _, t in stored):
        raise HeaderError(f"the parts of {name!r} are of different dtypes or ranks")
    chunks = [
        ChunkStorageMetadata(
            offsets=torch.Size(tensor.offsets or (0,) * len(tensor.shape)), sizes=torch.Size(tensor.shape)
        )
        for _, tensor in stored
    ]
    if len({chunk.offsets for chunk in chunks}) < len(chunks):
        raise HeaderError(f"two parts of {name!r} begin at one place")
    # torch's writer notes where parts begin, and nowhere how long the whole is
    size = [max(chunk.offsets[dim] + chunk.sizes[dim] for chunk in chunks) for dim in range(len(first.shape))]
    properties = TensorProperties(dtype=first.dtype)
    return TensorStorageMetadata(properties=properties, size=torch.Size(size), chunks=chunks)
