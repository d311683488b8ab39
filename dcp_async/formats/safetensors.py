"""SafetensorsFormat: weights as files that safetensors and transformers load, everything else beside them.

Enters: names, dtypes and shapes of whole tensors. Leaves: PublicFiles. Pure. Invariant: a header is a
function of what enters, so all of a file is known but its payload before a byte moves, and on one rank as on
many.

    model.safetensors     length | header, JSON, blanks to 64 bytes | PAYLOAD PAYLOAD ... without a gap
    ...                   more of them, and an index of their names, past ``max_shard_bytes``
    .distcp               each rank's: leaves, and tensors of dtypes or names that such files can't hold

Source: https://github.com/huggingface/safetensors (the format, and how it notes tied names).
"""

from __future__ import annotations

import json
import logging
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from .base import PublicFiles, PublicTensor
from .distcp import DistcpFormat
from .safetensors_header import DTYPE_NAMES, LENGTH_BYTES, MAX_HEADER_BYTES

logger = logging.getLogger(__name__)

_ALIGN = 64
"""Where the first payload begins; those behind it, longest elements first, lie at multiples of their own."""
_RESERVED = "__metadata__"
_MAX_NAME_BYTES = 200
"""File systems take 255; what follows the name needs the others."""
_SHARD_BYTES = 5_000_000_000
"""As huggingface_hub splits."""


class _Chosen(NamedTuple):
    """A tensor that goes into a safetensors file."""

    number: int
    name: str
    ties: list[str]
    """Other names of the same bytes."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFormat(DistcpFormat):
    """Writes tensors as ``model.safetensors``, or as ``model-00001-of-0000N.safetensors`` with an index, for
    whoever reads such files; the checkpoint stays one of ours, verified, and restores all that was saved.

    What a safetensors file can't hold (leaves, tensors of a class or dtype of their own) lies in a file
    beside, as under DistcpFormat. Stock DCP does not read such a checkpoint, its HuggingFaceStorageReader
    reads the weights of it. Ranks that save together write the same files as one process that holds
    everything; an engine on a storage where they can't share files refuses it in ``open()``.
    """

    shares_files = True

    def __init__(
        self,
        weights: str | None = None,
        *,
        max_shard_bytes: int = _SHARD_BYTES,
        name: str = "model",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            weights: the part of the state that goes into safetensors files, under names without it:
                ``"model"`` of ``{"model": model, "optim": optim}`` gives names as transformers wants them.
                None for all tensors, under their whole names.
            max_shard_bytes: how many bytes of tensors one file holds; a larger tensor has a file of its own.
            name: what the files' names begin with.
            metadata: text for the files' ``__metadata__``, beside ``format: pt``.
        Raises: TypeError; ValueError for what can't be.
        """
        if weights is not None and (not isinstance(weights, str) or not weights):
            raise ValueError(f"weights={weights!r} must name a part of the state, as 'model', or be None")
        if type(max_shard_bytes) is not int or max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes={max_shard_bytes!r} must be a positive number of bytes")
        # what begins so may pass for one of the checkpoint\'s own files
        if not isinstance(name, str) or not _can_begin_a_file(name):
            raise ValueError(f"name={name!r} must be what file names can begin with, as 'model'")
        # transformers refuses a file whose metadata does not say this
        told = {"format": "pt"} | dict(metadata or {})
        if wrong := [key for key, text in told.items() if type(key) is not str or type(text) is not str]:
            raise TypeError(f"metadata[{wrong[0]!r}] must be text under a text: safetensors keeps no more")
        self._prefix = "" if weights is None else weights.rstrip(".") + "."
        self._max_shard_bytes = max_shard_bytes
        self._name = name
        self._metadata = told

    def __repr__(self) -> str:
        weights = repr(self._prefix[:-1]) if self._prefix else ""
        return f"<SafetensorsFormat {weights or 'all tensors'}>"

    def public_files(self, tensors: Sequence[PublicTensor]) -> PublicFiles | None:
        """Safetensors files first, then the index of them, if they are several.

        Raises: ValueError if no tensor, or none but some that such files can't hold, is of the weights; or if
            one file would hold too many.
        """
        shards = list(self._shards(self._choose(tensors)))
        count = len(shards)
        if not count:
            return None
        names = [f"{self._name}-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        if count == 1:
            names = [f"{self._name}.safetensors"]
        files = PublicFiles(names=names, lengths=[], heads=[], places={})
        for number, shard in enumerate(shards):
            head = encode_header(shard, self._metadata)
            if len(head) > MAX_HEADER_BYTES:
                raise ValueError(
                    f"SafetensorsFormat: the header of {names[number]} would take {len(head)} bytes for "
                    f"{len(shard)} tensors, and readers refuse more than {MAX_HEADER_BYTES}; give a smaller "
                    "max_shard_bytes, or less metadata"
                )
            ends = list(accumulate((tensor.nbytes for tensor in shard), initial=len(head)))
            starts = zip(shard, ends, strict=False)
            files.places.update((tensor.number, (number, start)) for tensor, start in starts)
            files.heads.append(head)
            files.lengths.append(ends[-1])
        if count > 1:
            index = _index_of(dict(zip(names, shards, strict=True)))
            files.names.append(f"{self._name}.safetensors.index.json")
            files.heads.append(index)
            files.lengths.append(len(index))
        return files

    def _choose(self, tensors: Sequence[PublicTensor]) -> list[_Chosen]:
        prefix = self._prefix
        chosen: list[_Chosen] = []
        left_out: list[str] = []
        for number, tensor in enumerate(tensors):
            # a tensor that is tied has the name that the weights know it by, be that its first one or not
            short = [name[len(prefix) :] for name in tensor.names if name.startswith(prefix)]
            if not short:
                continue
            if tensor.dtype in DTYPE_NAMES and all(map(_can_be_a_key, short)):
                chosen.append(_Chosen(number, short[0], short[1:], tensor.dtype, tensor.shape))
            else:
                left_out.append(f"{prefix}{short[0]} ({tensor.dtype})")
        if prefix and not chosen:
            heads = Counter(name.partition(".")[0] for tensor in tensors for name in tensor.names)
            raise ValueError(
                f"SafetensorsFormat(weights={prefix[:-1]!r}): no tensor that such a file can hold lies below "
                f"it; the state has {', '.join(sorted(heads)) or 'no tensors'}"
            )
        if left_out:
            logger.warning(
                "%d tensors can't be in a safetensors file and lie beside it, for dcp_async alone: %s",
                len(left_out),
                # a lone surrogate is no character, and would break the log's own file
                ", ".join(left_out[:3]).encode(errors="backslashreplace").decode(),
            )
        # longest elements first, as safetensors does: then each lies at a multiple of its own, without a gap;
        # by name, or which rank speaks first would decide
        chosen.sort(key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
        return chosen

    def _shards(self, chosen: Sequence[_Chosen]) -> Iterator[list[_Chosen]]:
        shard: list[_Chosen] = []
        nbytes = 0
        for tensor in chosen:
            if shard and nbytes + tensor.nbytes > self._max_shard_bytes:
                yield shard
                shard, nbytes = [], 0
            shard.append(tensor)
            nbytes += tensor.nbytes
        if shard:
            yield shard


def encode_header(tensors: Sequence[_Chosen], metadata: Mapping[str, str]) -> bytes:
    """What stands before the payload of ``tensors``, which follow each other: a length, and JSON."""
    # as safetensors' own save_model() notes names that a file holds under another one; there, too, they give
    # way to other metadata: without its format transformers loads nothing
    tied = {tie: tensor.name for tensor in tensors for tie in tensor.ties}
    entries: dict[str, object] = {_RESERVED: {**tied, **metadata}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # blanks are JSON, and readers skip them
    raw += b" " * (-(LENGTH_BYTES + len(raw)) % _ALIGN)
    return struct.pack("<Q", len(raw)) + raw


def _can_be_a_key(name: str) -> bool:
    # JSON holds any text, but for halves of characters, which a str may have
    return name != _RESERVED and not any("\ud800" <= char <= "\udfff" for char in name)


def _can_begin_a_file(name: str) -> bool:
    # what begins with a dot or "_" may pass for one of the checkpoint's own files; printable: no halves of
    # characters either, which no file system takes
    is_plain = name.isprintable() and "/" not in name and not name.startswith((".", "_"))
    return is_plain and 0 < len(name.encode()) <= _MAX_NAME_BYTES


def _index_of(shards: Mapping[str, Sequence[_Chosen]]) -> bytes:
    weights = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    nbytes = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weights.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"
