"""What an opened checkpoint holds, as the document that ``show`` prints.

Enters: a path and patterns of names. Leaves: plain values. Invariant: no payload is read.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..catalog import Contents
from ..errors import CheckpointNotFoundError
from ..formats import heads_of
from .opened import catalog_of
from .places import info_document


async def contents_document(path: str, patterns: Sequence[str], *, follow_links: bool) -> dict[str, Any]:
    """Raises CheckpointNotFoundError for a pattern that matches nothing; as for opening."""
    async with catalog_of(path, follow_links=follow_links) as (catalog, name):
        contents = await catalog.open(name)
        try:
            document = _described(contents)
            # asked of the medium: what .metadata promises is another question
            document["files"] = [
                {"name": file, "nbytes": await contents.reader.size(file)}
                for file in dict.fromkeys(file for file, _, _ in contents.locations.values())
            ]
        finally:
            await contents.close()
    # each by itself: of two patterns, a misspelled one would go unnoticed beside one that matches
    for pattern in patterns:
        names = [entry["name"] for kind in ("tensors", "leaves") for entry in document[kind]]
        if not any(matches(name, pattern) for name in names):
            raise CheckpointNotFoundError(f"nothing in {path} is called {pattern!r}")
    for kind in ("tensors", "leaves"):
        document[kind] = [
            entry
            for entry in document[kind]
            if not patterns or any(matches(entry["name"], pattern) for pattern in patterns)
        ]
    return document


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` means ``name`` or what it lies below, as ``keys`` of ``load`` do."""
    return any(head == pattern or fnmatch.fnmatchcase(head, pattern) for head in heads_of(name))


def _described(contents: Contents) -> dict[str, Any]:
    chunks: dict[str, list[dict[str, Any]]] = {}
    for (name, offsets), (file, start, nbytes) in contents.locations.items():
        place = {"offsets": list(offsets or ()), "file": file, "start": start, "stored_bytes": nbytes}
        chunks.setdefault(name, []).append(place)
    tensors, leaves = [], []
    for name, meta in contents.names.items():
        if isinstance(meta, TensorStorageMetadata):
            tensors.append(
                {
                    "name": name,
                    "shape": list(meta.size),
                    "dtype": str(meta.properties.dtype).removeprefix("torch."),
                    "nbytes": math.prod(meta.size) * meta.properties.dtype.itemsize,
                    "chunks": chunks.get(name, []),
                }
            )
        else:
            inside = chunks.get(name, [])
            leaves.append({"name": name, "stored_bytes": sum(place["stored_bytes"] for place in inside)})
    return {"checkpoint": info_document(contents.info), "tensors": tensors, "leaves": leaves}
