"""What one rank has to save, as plain data that travels to the coordinator: no tensor, no class of anybody's.

Enters: a Captured whose structure is new. Leaves: an Offer. It is compact (parallel lists, each distinct
dtype once), because the coordinator receives one from every rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
import xxhash

from .formats.structure import JSON, tree_to_json
from .state import Captured

Kind = tuple[str, str, bool]
"""(dtype, layout, requires_grad), as torch names them."""


class Offer(TypedDict):
    """One rank's part. Indices refer to the lists of the rank's own ``Structure``."""

    names: list[str]
    """Of pieces of tensors, in the order of ``Structure.tensor_names``."""
    kinds: list[Kind]
    """The distinct ones."""
    kind_of: list[int]
    """Per piece, its place in ``kinds``."""
    shapes: list[tuple[int, ...]]
    """Of the pieces."""
    shards: dict[int, tuple[tuple[int, ...], tuple[int, ...]]]
    """Piece -> (global size, offsets); others are whole."""
    ties: list[tuple[str, int]]
    bare: list[tuple[str, Kind, tuple[int, ...]]]
    """(name, kind, global size) of distributed tensors of which nothing lies here."""
    leaves: list[str]
    hashes: list[int]
    """Of each leaf's bytes."""
    exotic: dict[int, tuple[Kind, tuple[int, ...]]]
    """Leaf -> kind and size, of tensors that go through ``torch.save``."""
    strides: dict[int, tuple[int, ...]]
    """Piece -> strides, of whole tensors that are dense but not row-major."""
    tree: JSON


def make_offer(captured: Captured, previous: Offer | None) -> Offer:
    """What ``captured`` has to save. ``previous`` is the offer of its structure, if that is not new."""
    structure = captured.structure
    if not captured.is_new:
        assert previous is not None
        return {**previous, "hashes": leaf_hashes(captured)}
    kinds: dict[Kind, int] = {}
    kind_of = [kinds.setdefault(_kind(tensor), len(kinds)) for tensor in captured.tensors]
    exotic = {
        index: (_kind(captured.live[structure.leaf_names[index]]), size)
        for index, _, size in structure.exotic
    }
    strides = {
        index: tuple(stride)
        for index, (stride, shape) in enumerate(zip(structure.strides, structure.shapes, strict=True))
        if stride is not None and index not in structure.shards and is_dense(shape, stride)
    }
    return Offer(
        names=structure.tensor_names,
        kinds=list(kinds),
        kind_of=kind_of,
        shapes=[tuple(shape) for shape in structure.shapes],
        shards={index: (shard.size, shard.offsets) for index, shard in structure.shards.items()},
        ties=structure.ties,
        bare=[(name, (_text(dtype), "strided", False), size) for name, dtype, size in structure.bare],
        leaves=structure.leaf_names,
        hashes=leaf_hashes(captured),
        exotic=exotic,
        strides=strides,
        tree=tree_to_json(captured.tree),
    )


def leaf_hashes(captured: Captured) -> list[int]:
    """A hash of each leaf's bytes: what ranks share must be the same everywhere."""
    return [xxhash.xxh3_64_intdigest(item) for item in captured.leaf_items]


def group_hashes(hashes: Sequence[int], groups: Sequence[Sequence[int]]) -> list[str]:
    """One hash per group of leaves."""
    return [
        xxhash.xxh3_64_hexdigest(json.dumps([hashes[index] for index in group]).encode()) for group in groups
    ]


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor fills its memory once, in whatever order; slices and expanded tensors do not."""
    expected = 1
    for stride, extent in sorted(zip(strides, shape, strict=True)):
        if extent != 1:
            if stride != expected:
                return False
            expected *= extent
    return True


def _text(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _kind(tensor: torch.Tensor) -> Kind:
    return _text(tensor.dtype), _text(tensor.layout), tensor.requires_grad
