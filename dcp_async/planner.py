"""From a captured structure to a compiled plan: DCP's planners, our layout, the bytes of `.metadata`.

Enters: a Captured whose structure is new. Leaves: a CompiledPlan that any number of saves of this structure
share. Invariant: a plan is a pure function of structure and options and holds arrays and bytes, no tensor and
no object per item.
Source: torch/distributed/checkpoint/planner.py (the order of calls), default_planner.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import xxhash
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from .formats.distcp import FileLayout, plan_file
from .formats.manifest import structure_json
from .formats.metadata import MetadataTemplate, metadata_template
from .formats.structure import Tree, children_of, kind_of
from .state import Captured, Structure
from .walk import CaptureError

_RESOLVERS = ("resolve_data", "lookup_object", "transform_object")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningOptions:
    """How a save is planned."""

    save: Callable[[], SavePlanner] = DefaultSavePlanner
    """Makes the planner of one plan: a factory, because a planner keeps state between its calls."""
    cache: bool = True
    """Reuse the plan while the structure stays the same. Off costs a full plan on every save."""

    def __post_init__(self) -> None:
        if not callable(self.save):
            raise ValueError(
                f"PlanningOptions(save=...) takes a class or function that makes planners, not {self.save!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledPlan:
    """Everything about a save that does not change while the structure does not."""

    structure: Structure
    digest: str
    """Tells two plans apart; ranks compare it."""
    layout: FileLayout
    """Of this rank's file; item i is tensor i of the structure, then its leaves."""
    metadata: MetadataTemplate
    manifest_json: str
    """The manifest's constant part."""


class Draft(Protocol):
    """One rank's part of a plan, before the ranks agree."""

    message: Any
    """What the coordinator needs of it."""

    def merge(self, messages: Sequence[Any]) -> list[Any]:
        """All ranks' messages -> each rank's answer. The coordinator's part."""

    def compile(self, answer: Any) -> CompiledPlan:
        """Lay out this rank's file."""


def draft_plan(captured: Captured, options: PlanningOptions, *, rank: int, is_coordinator: bool) -> Draft:
    """Begin a plan; ``captured`` holds its leaves by name. Raises CaptureError."""
    if options.save is DefaultSavePlanner:
        return DefaultDraft(captured, rank)
    return PlannerDraft(captured, options.save(), rank, is_coordinator)


class DefaultDraft:
    """What DCP's default planner would plan, without its objects per item: ten times faster for many tensors.

    Objects that are equal are shared, so pickle stores each once and `.metadata` is half as long.
    """

    def __init__(self, captured: Captured, rank: int) -> None:
        self._captured = captured
        self._rank = rank
        self.message = captured.structure

    def merge(self, messages: Sequence[Structure]) -> list[None]:
        return [None] * len(messages)

    def compile(self, answer: None) -> CompiledPlan:
        assert self._captured.flat is not None
        structure, flat = self._captured.structure, self._captured.flat
        properties: dict[tuple[Any, ...], TensorProperties] = {}
        chunks: dict[torch.Size, tuple[torch.Size, ChunkStorageMetadata]] = {}
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        indices: list[MetadataIndex] = []
        opaque = BytesStorageMetadata()
        for name, leaf in flat.items():
            if not isinstance(leaf, torch.Tensor) or leaf.is_nested:
                entries[name] = opaque
                indices.append(MetadataIndex(name))
                continue
            size = leaf.size()
            if size not in chunks:
                origin = torch.Size([0] * len(size))
                chunks[size] = (origin, ChunkStorageMetadata(offsets=origin, sizes=size))
            origin, chunk = chunks[size]
            kind = (leaf.dtype, leaf.layout, leaf.requires_grad)
            if kind not in properties:
                properties[kind] = TensorProperties(dtype=kind[0], layout=kind[1], requires_grad=kind[2])
            entries[name] = TensorStorageMetadata(properties[kind], chunk.sizes, [chunk])
            indices.append(MetadataIndex(name, origin, 0))
        assert list(flat) == structure.names
        return _compile(self._captured, Metadata(state_dict_metadata=entries), indices, self._rank)


class PlannerDraft:
    """A plan by DCP's protocol, for planners of the user's."""

    def __init__(self, captured: Captured, planner: SavePlanner, rank: int, is_coordinator: bool) -> None:
        assert captured.flat is not None
        for method in _RESOLVERS:
            if getattr(type(planner), method, None) is not getattr(DefaultSavePlanner, method):
                raise CaptureError(
                    f"{type(planner).__name__} overrides {method}(), which replaces the data item by item; "
                    "this release copies tensors as they are. Transform the state before save(), "
                    "or use a planner that overrides the plan only"
                )
        self._captured = captured
        self._planner = planner
        # stock's own cache lives on the class and takes tensors of another dtype for the same; ours does not
        planner.__dict__["_enable_plan_caching"] = False
        self._rank = rank
        # flattened already: planner_data comes from our own walk
        planner.set_up_planner(captured.flat, None, is_coordinator)
        self.message = planner.create_local_plan()

    def merge(self, messages: Sequence[SavePlan]) -> list[tuple[SavePlan, Metadata]]:
        plans, metadata = self._planner.create_global_plan(list(messages))
        return [(plan, metadata) for plan in plans]

    def compile(self, answer: tuple[SavePlan, Metadata]) -> CompiledPlan:
        plan, metadata = answer
        structure = self._captured.structure
        items = {item.index.fqn: item for item in self._planner.finish_plan(plan).items}
        _check_items(structure, items)
        return _compile(self._captured, metadata, [items[name].index for name in structure.names], self._rank)


def _compile(
    captured: Captured, metadata: Metadata, indices: Sequence[MetadataIndex], rank: int
) -> CompiledPlan:
    """Lay out the file and encode what stays the same; ``indices`` in the order of ``structure.names``."""
    structure = captured.structure
    layout = plan_file(
        [(dtype, tuple(shape)) for dtype, shape in zip(structure.dtypes, structure.shapes, strict=True)],
        structure.slots,
    )
    stored = len(structure.tensor_names)
    items = [
        *range(stored),
        *(index for _, index in structure.ties),
        *range(stored, len(layout.item_offsets)),
    ]
    places = {
        index: (rank, layout.item_offsets[item], layout.item_bytes[item])
        for index, item in zip(indices, items, strict=True)
    }
    strides = {
        name: stride
        for name, stride, shape in zip(
            structure.tensor_names, structure.strides, structure.shapes, strict=True
        )
        if stride is not None and is_dense(shape, stride)
    }
    exotic = tuple(structure.leaf_names[index] for index, _ in structure.exotic)
    paths = planner_paths(captured.tree)
    return CompiledPlan(
        structure=structure,
        digest=structure_digest(structure),
        layout=layout,
        metadata=metadata_template(dataclasses.replace(metadata, planner_data=paths), places),
        manifest_json=structure_json(captured.tree, strides, exotic),
    )


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor fills its memory once, in whatever order; slices and expanded tensors do not."""
    expected = 1
    for stride, extent in sorted(zip(strides, shape, strict=True)):
        if extent != 1:
            if stride != expected:
                return False
            expected *= extent
    return True


def _check_items(structure: Structure, items: Mapping[str, WriteItem]) -> None:
    names = structure.names
    if items.keys() != set(names):
        lost = sorted(set(names) - items.keys())[:3]
        added = sorted(items.keys() - set(names))[:3]
        raise CaptureError(
            f"the planner left out {lost} and added {added}; this release writes what the state holds"
        )
    tensors = len(structure.tensor_names) + len(structure.ties)
    exotic = {tensors + index for index, _ in structure.exotic}
    for index, name in enumerate(names):
        is_tensor = items[name].type is not WriteItemType.BYTE_IO
        if is_tensor != (index < tensors or index in exotic):
            raise CaptureError(f"{name}: the planner and the state disagree on whether it is a tensor")


def planner_paths(tree: Tree) -> dict[str, tuple[str | int, ...]]:
    """DCP's ``planner_data``: name -> path, as its ``flatten_state_dict`` gives it (str for keys, int in
    lists)."""
    paths: dict[str, tuple[str | int, ...]] = {}

    def visit(node: Tree, name: str, path: tuple[str | int, ...]) -> None:
        kind = kind_of(node)
        if kind is None:
            paths[name] = path
        for key, child in children_of(node):
            part = key if kind == "list" else str(key)
            visit(child, f"{name}.{part}" if path else part, (*path, part))

    visit(tree, "", ())
    return paths


def structure_digest(structure: Structure) -> str:
    """A digest of everything that a layout depends on, 16 hex digits."""
    digest = xxhash.xxh3_64()
    for part in (
        structure.tensor_names,
        structure.dtypes,
        structure.shapes,
        structure.strides,
        structure.leaf_names,
        structure.exotic,
        structure.slots,
        structure.containers,
        structure.odd_keys,
        structure.ties,
    ):
        digest.update(repr(part).encode())
    return digest.hexdigest()
