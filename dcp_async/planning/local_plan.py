"""What one rank has to save, as plain data that travels to the coordinator: no tensor, no class of anybody's.

Enters: a Captured whose structure is new. Leaves: a LocalPlan. Invariant: what ranks of one layout have in
common is the same bytes on all of them, so the coordinator decodes it, and looks at it, once; what is a
rank's own is a few numbers per distinct form of a tensor, not per tensor.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Sequence
from typing import Any, TypedDict, cast

import torch
import xxhash
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .._geometry import Offsets, is_dense
from ..formats import tree_to_json
from ..info import JSON
from ..state import Captured, Structure
from ..trust import dumps, loads

Kind = tuple[str, str, bool]
"""(dtype, layout, requires_grad), as torch names them."""
Mesh = tuple[int, ...]
"""The job's ranks of a DTensor's device mesh, ascending."""

_LEVEL = 1
"""zlib's: names repeat themselves, so its fastest makes them ten times shorter (docs/scale.md)."""


class Tensors(TypedDict):
    """Pieces of tensors. Indices refer to the lists of the rank's own ``Structure``."""

    names: list[str]
    """In the order of ``Structure.tensor_names``."""
    form_of: bytes
    """array("I"): per piece, its index in ``forms``."""
    forms: list[tuple[Kind, Offsets]]
    """(kind, global size); pieces of one form also lie at the same offsets in their tensors."""
    strides: dict[int, tuple[int, ...]]
    """Piece -> strides, of whole tensors that are dense but not row-major."""
    ties: list[tuple[str, int]]
    bare: list[tuple[str, Kind, Offsets]]
    """(name, kind, global size) of distributed tensors of which nothing lies here."""


class Leaves(TypedDict):
    """Everything else."""

    names: list[str]
    exotic: dict[int, tuple[Kind, Offsets]]
    """Leaf -> kind and size, of tensors that go through ``torch.save``."""
    pieces: dict[int, tuple[str, Offsets, Offsets]]
    """Leaf -> (name, global size, offsets), of those that are pieces of distributed tensors."""


class LocalPlan(TypedDict):
    """What one rank has to save. Plain data: it travels."""

    tensors: bytes
    """A packed ``Tensors``."""
    boxes: list[tuple[Offsets, Offsets]]
    """Per form, (offsets, shape) of this rank's pieces."""
    meshes: list[Mesh | None]
    """Per form, the mesh of the DTensors that its pieces belong to, where they do."""
    leaves: bytes
    """A packed ``Leaves``."""
    hashes: bytes
    """array("Q"), a hash of each leaf's bytes."""
    tree: bytes
    """A packed tree, as ``tree_to_json`` encodes it."""


def make_local_plan(captured: Captured, previous: LocalPlan | None) -> LocalPlan:
    """What ``captured`` has to save. ``previous`` is that of its structure, if that is not new."""
    structure = captured.structure
    hashes = array("Q", leaf_hashes(captured)).tobytes()
    if not captured.is_new:
        assert previous is not None
        # values are no part of a structure, so of an old one only the hashes are new
        return {**previous, "hashes": hashes}
    kinds: dict[tuple[torch.dtype, torch.layout, bool], Kind] = {}
    forms: dict[tuple[Kind, Offsets, Offsets, Offsets, Mesh | None], int] = {}
    form_of = array("I")
    meshes = _Meshes(captured)
    for index, (tensor, shape) in enumerate(zip(captured.tensors, structure.shapes, strict=True)):
        local = tuple(shape)
        shard = structure.shards.get(index)
        size, offsets = (shard.size, shard.offsets) if shard else (local, (0,) * len(local))
        key = (tensor.dtype, tensor.layout, tensor.requires_grad)
        # torch's objects are turned into text once per kind, not once per tensor
        kind = kinds.get(key) or kinds.setdefault(key, _kind(tensor))
        form = (kind, size, offsets, local, meshes.mesh_of(index))
        form_of.append(forms.setdefault(form, len(forms)))
    # without boxes and meshes, which differ from rank to rank: these bytes are equal on ranks of one layout,
    # and the coordinator decodes equal bytes once
    tensors = Tensors(
        names=structure.tensor_names,
        form_of=form_of.tobytes(),
        forms=[(kind, size) for kind, size, *_ in forms],
        strides=_dense_strides(structure),
        ties=structure.ties,
        bare=[(name, (_text(dtype), "strided", False), size) for name, dtype, size in structure.bare],
    )
    exotic = {
        index: (_kind(captured.live[structure.leaf_names[index]]), size)
        for index, _, size in structure.exotic
    }
    pieces = {
        index: (piece.name, piece.shard.size, piece.shard.offsets)
        for index, name in enumerate(structure.leaf_names)
        if (piece := structure.pieces.get(name)) is not None
    }
    return LocalPlan(
        tensors=_pack(tensors),
        boxes=[(offsets, shape) for _, _, offsets, shape, _ in forms],
        meshes=[mesh for *_, mesh in forms],
        leaves=_pack(Leaves(names=structure.leaf_names, exotic=exotic, pieces=pieces)),
        hashes=hashes,
        # as text: pickle takes four calls of C per level, and a tree may be deep
        tree=_pack(json.dumps(tree_to_json(captured.tree))),
    )


class _Meshes:
    """Finds the mesh of a piece; each mesh is looked at once."""

    def __init__(self, captured: Captured) -> None:
        self._names = captured.structure.tensor_names
        self._live = captured.live
        self._known: dict[int, tuple[DeviceMesh, Mesh]] = {}
        self._has_any = any(isinstance(value, DTensor) for value in captured.live.values())

    def mesh_of(self, index: int) -> Mesh | None:
        if not self._has_any:
            return None
        tensor = self._live.get(self._names[index])
        if not isinstance(tensor, DTensor):
            return None
        mesh = tensor.device_mesh
        if id(mesh) not in self._known:  # kept beside, so that its id is not used again
            self._known[id(mesh)] = (mesh, tuple(sorted(mesh.mesh.flatten().tolist())))
        return self._known[id(mesh)][1]


def _pack(lists: object) -> bytes:
    return zlib.compress(dumps(lists), _LEVEL)


def _unpack(raw: bytes) -> Any:
    return loads(zlib.decompress(raw))


def unpack_tensors(raw: bytes) -> Tensors:
    """What ``LocalPlan.tensors`` holds."""
    return cast(Tensors, _unpack(raw))


def unpack_leaves(raw: bytes) -> Leaves:
    """What ``LocalPlan.leaves`` holds."""
    return cast(Leaves, _unpack(raw))


def unpack_tree(raw: bytes) -> JSON:
    """What ``LocalPlan.tree`` holds."""
    return cast(JSON, json.loads(_unpack(raw)))


def _dense_strides(structure: Structure) -> dict[int, tuple[int, ...]]:
    return {
        index: tuple(stride)
        for index, (stride, shape) in enumerate(zip(structure.strides, structure.shapes, strict=True))
        # slices and expanded tensors come back row-major: their strides ask for memory that nobody saved
        if stride is not None and index not in structure.shards and is_dense(shape, stride)
    }


def leaf_hashes(captured: Captured) -> list[int]:
    """A hash of each leaf's bytes: what ranks share must be the same everywhere."""
    return [xxhash.xxh3_64_intdigest(item) for item in captured.leaf_items]


def group_hashes(hashes: Sequence[int], groups: Sequence[Sequence[int]]) -> list[str]:
    """One hash per group of leaves."""
    return [
        # one hash per group, so that a later save's message does not grow with the number of leaves
        xxhash.xxh3_64_hexdigest(json.dumps([hashes[index] for index in group]).encode())
        for group in groups
    ]


def _text(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _kind(tensor: torch.Tensor) -> Kind:
    return _text(tensor.dtype), _text(tensor.layout), tensor.requires_grad
