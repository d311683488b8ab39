"""capture(): takes hold of a trainer's state, and finds out what a load may fill.

Enters: a mapping of Statefuls, tensors, containers and picklable leaves. Leaves: a Captured (or Targets):
parallel lists in the walk's order, tensors by reference, everything else by value. Runs in the caller's
thread and in one piece, so a data pipeline can't advance between the model's snapshot and its own. Invariant:
a Captured refers to live tensors only until its save has staged them.
"""

from __future__ import annotations

import inspect
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .formats.distcp import SECTOR_BYTES
from .formats.structure import Tree
from .formats.zip_item import object_item, pad_item, slot_bytes
from .stateful import AppState
from .walk import CaptureError, Walk, duplicate_name, structure_of, walk_state


def pickle_leaf(name: str, value: Any) -> bytes:
    """The bytes of a leaf's item, not padded. Raises CaptureError that names it."""
    try:
        if type(value) in (int, float, str, bool, bytes, type(None)):
            return object_item(pickle.dumps(value, protocol=2))
        stream = io.BytesIO()
        torch.save(_detached(value) if isinstance(value, torch.Tensor) else value, stream)
        return stream.getvalue()
    except Exception as error:  # pickling runs the leaf's own code, which may raise anything
        raise CaptureError(
            f"{name}: a {type(value).__qualname__} can't be pickled ({type(error).__name__}: {error}); "
            "leave it out of the state or give it a state_dict()"
        ) from error


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    detached = tensor.detach()
    # a subclass without __torch_function__ would come out as a plain tensor
    return detached if type(detached) is type(tensor) else tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What a plan depends on: equal structures have equal layouts. Compared list by list, in C."""

    tensor_names: list[str]
    """Of the tensors that are stored."""
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...] | None]
    """None where the tensor is row-major."""
    leaf_names: list[str]
    exotic: list[tuple[int, str]]
    """Which leaves are tensors that go through ``torch.save``, and what `.metadata` says of each."""
    slots: list[int]
    """Length of each leaf's slot."""
    containers: list[tuple[str, str, int, int]]
    odd_keys: list[tuple[str, type, object]]
    ties: list[tuple[str, int]]
    """Names that share the bytes of an earlier tensor."""

    @property
    def names(self) -> list[str]:
        """Every name: of stored tensors, of ties, of leaves."""
        return [*self.tensor_names, *(name for name, _ in self.ties), *self.leaf_names]


@dataclass(slots=True, kw_only=True)
class Captured:
    """A state at one moment: tensors by reference, everything else by value."""

    structure: Structure
    tree: Tree
    """None if the structure equals the one that was given to ``capture``."""
    flat: dict[str, Any] | None
    """Name -> leaf for DCP's planner; None likewise."""
    tensors: list[torch.Tensor]
    leaf_items: list[bytes]
    """Each leaf's item, not padded."""
    optimizers: list[Optimizer]
    versions: list[int | None] | None = None
    """Version counters at capture, with ``overlap=True``; None for a tensor that was copied aside."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors) + sum(map(len, self.leaf_items))

    def release(self) -> None:
        """Drop every reference to the trainer's tensors."""
        self.tensors = []
        self.flat = None
        self.optimizers = []
        self.leaf_items = []
        self.tree = None


def is_exotic(leaf: object) -> bool:
    """Whether a leaf is a tensor to `.metadata`. A nested tensor is not: it has no size to be named there."""
    return isinstance(leaf, torch.Tensor) and not leaf.is_nested


def meta_error(name: str) -> CaptureError:
    """For a tensor without bytes."""
    return CaptureError(f"{name} is on the meta device and has no bytes to save; materialise it first")


def capture(state: Mapping[str, Any], previous: Structure | None) -> Captured:
    """Take hold of ``state``; what can't be saved is found here, before anything is written.

    Args: ``previous`` is the structure that the compiled plan belongs to.
    Raises: CaptureError; whatever a ``state_dict()`` raises.
    """
    walk = _walk(state)
    shapes = walk.shapes()
    names = walk.tensor_names
    if walk.separate_ties():
        shapes = walk.shapes()
    items = [pickle_leaf(name, value) for name, value in zip(walk.leaf_names, walk.leaves, strict=True)]
    structure = _structure(walk, shapes, items, previous)
    tree: Tree = None
    flat: dict[str, Any] | None = None
    if structure != previous:
        _check_unique(names + walk.leaf_names)
        tree = structure_of(state, walk)
        flat = dict(zip(walk.tensor_names, walk.tensors, strict=True))
        flat |= {name: walk.tensors[index] for name, index in walk.ties}
        flat |= zip(walk.leaf_names, walk.leaves, strict=True)
    return Captured(
        structure=structure,
        tree=tree,
        flat=flat,
        tensors=walk.tensors,
        leaf_items=items,
        optimizers=walk.optimizers,
    )


def _walk(state: Mapping[str, Any]) -> Walk:
    if not isinstance(state, Mapping):
        raise CaptureError(f"the state must be a mapping of names to values, not a {type(state).__name__}")
    return walk_state(state)


def _check_unique(names: list[str]) -> None:
    if twice := duplicate_name(names):
        raise CaptureError(f"two leaves have the name {twice!r}; rename one of their keys")


def _structure(
    walk: Walk, shapes: list[torch.Size], items: Sequence[bytes], previous: Structure | None
) -> Structure:
    """What the layout of ``walk``'s tensors and its leaves' ``items`` depends on."""
    # a slot only grows: a counter that shrinks by a digit must not move every offset behind it
    floor = dict(zip(previous.leaf_names, previous.slots, strict=True)) if previous else {}
    exotic = [(index, leaf) for index, leaf in enumerate(walk.leaves) if is_exotic(leaf)]
    for name, leaf in zip(walk.leaf_names, walk.leaves, strict=True):
        if isinstance(leaf, torch.Tensor) and leaf.is_meta:
            raise meta_error(name)
    return Structure(
        tensor_names=walk.tensor_names,
        dtypes=[tensor.dtype for tensor in walk.tensors],
        shapes=shapes,
        strides=[None if tensor.is_contiguous() else tensor.stride() for tensor in walk.tensors],
        leaf_names=walk.leaf_names,
        exotic=[
            (index, f"{leaf.dtype} {leaf.layout} {leaf.size()} {leaf.requires_grad}")
            for index, leaf in exotic
        ],
        slots=[
            max(slot_bytes(len(item), SECTOR_BYTES), floor.get(name, 0))
            for name, item in zip(walk.leaf_names, items, strict=True)
        ],
        containers=walk.containers,
        odd_keys=walk.odd_keys,
        ties=walk.ties,
    )


def padded_items(captured: Captured) -> Iterator[bytes]:
    """Each leaf's item, grown to its slot."""
    for item, slot in zip(captured.leaf_items, captured.structure.slots, strict=True):
        yield pad_item(item, slot)


@dataclass(frozen=True, slots=True)
class OpenMapping:
    """A mapping of a Stateful that takes what was saved below it and is not there."""

    owner: type
    """The Stateful's."""
    is_optimizer_state: bool
    """Whether it also takes what was saved in another form than is there."""


@dataclass(slots=True, kw_only=True)
class Targets:
    """Where a load puts what it reads."""

    walk: Walk
    tensors: dict[str, torch.Tensor]
    """Name -> tensor to fill in place, plain or not."""
    leaves: set[str]
    """Names of other leaves: replaced."""
    open_mappings: dict[str, OpenMapping]
    """Mappings that take what was saved below them, by name."""
    prefixes: set[str]
    """Top-level names of the state."""
    device: torch.device
    """Where tensors are made that take the place of those on the meta device."""


def capture_targets(state: Mapping[str, Any]) -> Targets:
    """Find out what ``state`` can take. Calls each ``state_dict()`` once. Raises CaptureError."""
    walk = _walk(state)
    walk.shapes()  # which sorts nested tensors out
    _check_unique(walk.tensor_names + walk.leaf_names)
    tensors = dict(zip(walk.tensor_names, walk.tensors, strict=True))
    leaves = set()
    for name, leaf in zip(walk.leaf_names, walk.leaves, strict=True):
        if is_lazy(leaf):
            raise CaptureError(
                f"{name} is uninitialized and has no shape; run the lazy module once, then load into it"
            )
        if is_exotic(leaf):
            tensors[name] = leaf
        else:
            leaves.add(name)
    open_mappings: dict[str, OpenMapping] = {}
    for prefix, stateful, _ in walk.statefuls:
        if inspect.iscoroutinefunction(stateful.load_state_dict):
            raise CaptureError(
                f"{prefix}: {type(stateful).__name__}.load_state_dict() is asynchronous and would not be "
                "awaited; give the state an object that takes its state in one piece"
            )
        for name, kind, size, _ in walk.containers:
            if kind != "list" and size == 0 and (name == prefix or name.startswith(f"{prefix}.")):
                open_mappings[name] = OpenMapping(type(stateful), False)
        if isinstance(stateful, Optimizer):
            open_mappings[f"{prefix}.state"] = OpenMapping(type(stateful), True)
        elif isinstance(stateful, AppState):
            open_mappings[f"{prefix}.optim.state"] = OpenMapping(type(stateful), True)
    device = torch.get_default_device()
    return Targets(
        walk=walk,
        tensors=tensors,
        leaves=leaves,
        open_mappings=open_mappings,
        prefixes=set(state),
        device=torch.device("cpu") if device.type == "meta" else device,
    )
