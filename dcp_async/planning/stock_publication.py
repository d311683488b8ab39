"""What is published of a plan that stock's protocol made: its Metadata, and where ranks wrote its items.

Enters: the Metadata of a planner of DCP's, and a WrittenItem for each item. Leaves: a Publication. Pure.
Invariant: what `.metadata` says of a tensor is what was written of it, whatever a plan said that was cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, Metadata, TensorStorageMetadata

from ..formats import (
    DISTCP,
    Group,
    ItemKey,
    Place,
    structure_json,
    tree_from_paths,
    tree_to_json,
    usable_paths,
)
from .conflicts import ConflictError
from .global_plan import Publication
from .self_proof import Promise, Promised, prove


@dataclass(frozen=True, slots=True)
class WrittenItem:
    """What a rank wrote for one WriteItem. Plain data: it travels."""

    place: Place
    dtype: torch.dtype | None
    """None of what is no tensor."""
    is_exotic: bool
    """Whether it is a tensor that went through ``torch.save``."""


_Alike = tuple[STORAGE_TYPES, list[str], list[list[Place]]]
"""(entry, names that it holds for, per name where its chunks lie)."""


def stock_publication(metadata: Metadata, written: Mapping[ItemKey, WrittenItem]) -> Publication:
    """What is published of ``metadata``, whose items lie where ``written`` says.

    Raises: ConflictError if the plan made no rank write an item, or ranks wrote chunks of other dtypes;
        ProofError.
    """
    names = list(metadata.state_dict_metadata)
    paths = usable_paths(metadata)
    tree = tree_to_json(tree_from_paths(paths, names))
    exotic: list[str] = []
    groups: dict[object, _Alike] = {}
    for name, entry in metadata.state_dict_metadata.items():
        items = list(_items(name, entry, written))
        entry = _as_written(name, entry, items)
        # equal entries are encoded once
        _, members, rows = groups.setdefault(_key(entry), (entry, [], []))
        members.append(name)
        rows.append([item.place for item in items])
        if any(item.is_exotic for item in items):
            exotic.append(name)
    template = DISTCP.index([Group(*group) for group in groups.values()], paths)
    constant = structure_json(tree, {}, tuple(exotic))
    promised = Promised(_promises(groups.values()), tree, {}, exotic)
    return Publication(template, constant, prove(template, constant, promised))


def _items(name: str, entry: STORAGE_TYPES, written: Mapping[ItemKey, WrittenItem]) -> Iterator[WrittenItem]:
    keys: list[torch.Size | None] = [None]
    if isinstance(entry, TensorStorageMetadata):
        keys = [chunk.offsets for chunk in entry.chunks]
    for offsets in keys:
        item = written.get((name, offsets))
        if item is None:
            where = "" if offsets is None else f" at {tuple(offsets)}"
            raise ConflictError(f"{name}: the planner made no rank write it{where}")
        yield item


def _as_written(name: str, entry: STORAGE_TYPES, items: Sequence[WrittenItem]) -> STORAGE_TYPES:
    """``entry`` with the dtype that was written: a plan that stock cached may tell another, since the cache
    takes tensors of another dtype for the same."""
    if not isinstance(entry, TensorStorageMetadata) or not items:
        return entry
    dtypes = {item.dtype for item in items}
    if len(dtypes) > 1 or None in dtypes:
        raise ConflictError(f"{name}: ranks wrote chunks of {', '.join(sorted(map(str, dtypes)))}")
    dtype = dtypes.pop()
    if dtype is None or dtype is entry.properties.dtype:
        return entry
    # a copy: the planner keeps its own for later saves
    return replace(entry, properties=replace(entry.properties, dtype=dtype))


def _key(entry: STORAGE_TYPES) -> object:
    if not isinstance(entry, TensorStorageMetadata):
        return None
    told = entry.properties
    # as plain values: DCP's own classes compare, but have no hash
    chunks = tuple((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
    return (
        told.dtype,
        told.layout,
        told.requires_grad,
        told.memory_format,
        told.pin_memory,
        tuple(entry.size),
        chunks,
    )


def _promises(groups: Iterable[_Alike]) -> Iterator[Promise]:
    for entry, names, rows in groups:
        if isinstance(entry, TensorStorageMetadata):
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            yield Promise(names, tuple(entry.size), entry.properties.dtype, boxes, rows)
        else:
            yield Promise(names, None, None, [(None, ())], rows)
