"""capture() and restore(): between a trainer's state and flat lists of tensors and pickled leaves.

Enters: a mapping of Statefuls, tensors, containers and picklable leaves. Leaves: parallel lists in one order,
named as DCP's ``flatten_state_dict`` names them. Both run in the caller's thread and in one piece, so a data
pipeline can't advance between the model's snapshot and its own. Invariant: a Captured refers to live tensors
only until its save has staged them.
Source: torch/distributed/checkpoint/_traverse.py.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from .formats.distcp import SECTOR_BYTES
from .formats.structure import JSON, MAPPING_KINDS, list_node, mapping_node
from .formats.zip_item import PLAIN_DTYPES, object_item, pad_item, slot_bytes

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class CaptureError(ValueError):
    """The state can't be saved as it is; the message names the leaf."""


class RNGState:
    """A Stateful that brings the random number generators back to where they were: torch's, Python's, and
    numpy's if it is used."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if "numpy" in sys.modules:
            state["numpy"] = sys.modules["numpy"].random.get_state()
        if torch.accelerator.is_available():
            device = torch.accelerator.current_device_index()
            state["accelerator"] = torch.get_device_module().get_rng_state(device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"].cpu())
        random.setstate(state["python"])
        if "numpy" in state and "numpy" in sys.modules:
            sys.modules["numpy"].random.set_state(state["numpy"])
        if "accelerator" in state and torch.accelerator.is_available():
            device = torch.accelerator.current_device_index()
            torch.get_device_module().set_rng_state(state["accelerator"].cpu(), device)


def is_stateful(value: object) -> bool:
    """DCP's ``Stateful``, looked up on the type: the protocol's own isinstance costs microseconds per
    leaf."""
    cls = type(value)
    return hasattr(cls, "state_dict") and hasattr(cls, "load_state_dict") and not isinstance(value, type)


def _is_terminal(values: list[Any]) -> bool:
    """Whether DCP pickles this list whole: it does unless a tensor or a mapping is in it."""
    for entry in values:
        if isinstance(entry, (torch.Tensor, Mapping)) or is_stateful(entry):
            return False
        if isinstance(entry, list) and not _is_terminal(entry):
            return False
    return True


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes can be copied raw; others go through ``torch.save``. A conjugate or negative view is
    resolved by the copy itself. Nested tensors are told apart later: asking each tensor would be felt."""
    return type(tensor) in PLAIN_TENSORS and tensor.layout is torch.strided and tensor.dtype in PLAIN_DTYPES


@dataclass(slots=True)
class Walk:
    """The leaves of a state, in DCP's order and by DCP's names."""

    tensor_names: list[str] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    ties: list[tuple[str, int]] = field(default_factory=list)
    """(name, index of the tensor that has the same bytes) of tensors that occur again; filled by
    ``separate_ties``."""
    leaf_names: list[str] = field(default_factory=list)
    leaves: list[Any] = field(default_factory=list)
    """Everything that is no plain tensor: pickled."""
    containers: list[tuple[str, str, int, int]] = field(default_factory=list)
    """(prefix, kind, size, leaves before it) of each container: with the names this is the whole
    structure."""
    odd_keys: list[tuple[str, object]] = field(default_factory=list)
    """Mapping keys that are no str: (name below the key, key)."""
    optimizers: list[Optimizer] = field(default_factory=list)
    statefuls: list[tuple[str, Any, Any]] = field(default_factory=list)
    """(prefix, the Stateful, what its state_dict() gave)."""

    def visit(self, name: str, value: Any) -> None:
        """Walk ``value``, which lies at ``name``."""
        if isinstance(value, torch.Tensor):
            if _is_plain(value):
                self.tensor_names.append(name)
                self.tensors.append(value)
            else:
                self.leaf_names.append(name)
                self.leaves.append(value)
        elif is_stateful(value):
            self._visit_stateful(name, value)
        elif isinstance(value, Mapping):
            self._visit_mapping(name, value)
        elif isinstance(value, list) and not _is_terminal(value):
            self._enter(name, "list", len(value))
            for index, entry in enumerate(value):
                self.visit(f"{name}.{index}", entry)
        else:
            self.leaf_names.append(name)
            self.leaves.append(value)

    def demote_nested(self) -> None:
        """Move tensors without a shape of their own to the leaves."""
        nested = {id(tensor) for tensor in self.tensors if tensor.is_nested}
        pairs = list(zip(self.tensor_names, self.tensors, strict=True))
        self.leaf_names += [name for name, tensor in pairs if id(tensor) in nested]
        self.leaves += [tensor for tensor in self.tensors if id(tensor) in nested]
        self.tensor_names = [name for name, tensor in pairs if id(tensor) not in nested]
        self.tensors = [tensor for tensor in self.tensors if id(tensor) not in nested]

    def separate_ties(self) -> None:
        """Keep one of each group of tensors that are the same view of the same memory: it is stored once."""
        if len({tensor.data_ptr() for tensor in self.tensors}) == len(self.tensors):
            return
        first: dict[tuple[Any, ...], int] = {}
        names, tensors = self.tensor_names, self.tensors
        self.tensor_names, self.tensors = [], []
        for name, tensor in zip(names, tensors, strict=True):
            # an empty tensor has no memory to share
            memory = tensor.data_ptr() if tensor.numel() else id(tensor)
            lazy = (tensor.is_conj(), tensor.is_neg())
            key = (tensor.device, memory, tensor.dtype, tensor.shape, tensor.stride(), lazy)
            index = first.setdefault(key, len(self.tensors))
            if index == len(self.tensors):
                self.tensor_names.append(name)
                self.tensors.append(tensor)
            else:
                self.ties.append((name, index))

    def _visit_stateful(self, name: str, stateful: Any) -> None:
        if isinstance(stateful, Optimizer):
            self.optimizers.append(stateful)
        try:
            inner = stateful.state_dict()
        except (Exception, CheckpointException) as error:  # the trainer's own code, which may raise anything
            kind = type(error).__name__
            raise CaptureError(
                f"{name}: {type(stateful).__name__}.state_dict() failed ({kind}: {error})"
            ) from error
        if inspect.isawaitable(inner):
            if inspect.iscoroutine(inner):
                inner.close()
            raise CaptureError(
                f"{name}: {type(stateful).__name__}.state_dict() is asynchronous; a snapshot must be taken "
                "in one piece, so give the state an object whose state_dict() returns a plain dict"
            )
        self.statefuls.append((name, stateful, inner))
        self.visit(name, inner)

    def _enter(self, name: str, kind: str, size: int) -> None:
        self.containers.append((name, kind, size, len(self.tensor_names) + len(self.leaf_names)))

    def _visit_mapping(self, name: str, mapping: Mapping[Any, Any]) -> None:
        self._enter(name, MAPPING_KINDS.get(type(mapping), "dict"), len(mapping))
        tensor_names, tensors = self.tensor_names, self.tensors
        for key, value in mapping.items():
            below = f"{name}.{key}"
            if type(key) is not str:
                if not isinstance(key, (str, int, float, bool, type(None))):
                    raise CaptureError(
                        f"{below}: a key of type {type(key).__name__} has no place here; use str or int"
                    )
                self.odd_keys.append((below, key))
            if isinstance(value, torch.Tensor) and _is_plain(
                value
            ):  # inlined: the common case of a large state
                tensor_names.append(below)
                tensors.append(value)
            else:
                self.visit(below, value)


def walk_state(state: Mapping[str, Any]) -> Walk:
    """Visit every leaf of ``state``; calls each Stateful's ``state_dict()`` once, in the mapping's order."""
    walk = Walk()
    walk.containers.append(("", "root", len(state), 0))
    for key, value in state.items():
        if not isinstance(key, str):
            raise CaptureError(f"the state's keys must be str; {key!r} is a {type(key).__name__}")
        walk.visit(key, value)
    return walk


def duplicate_name(names: list[str]) -> str | None:
    """A name that occurs twice, if one does: DCP's dotted names do not tell {"a.b": x} from {"a": {"b":
    x}}."""
    if len(set(names)) == len(names):
        return None
    return next(name for name, count in Counter(names).items() if count > 1)


def structure_of(state: Mapping[str, Any], walk: Walk) -> JSON:
    """The tree of containers, for the manifest."""
    inner = {id(stateful): captured for _, stateful, captured in walk.statefuls}

    def node(value: Any) -> JSON:
        if isinstance(value, torch.Tensor):
            return None
        if is_stateful(value):
            return node(inner[id(value)])
        if isinstance(value, Mapping):
            kind = MAPPING_KINDS.get(type(value), "dict")
            return mapping_node(kind, {key: node(entry) for key, entry in value.items()})
        if isinstance(value, list) and not _is_terminal(value):
            return list_node([node(entry) for entry in value])
        return None

    return mapping_node("dict", {key: node(value) for key, value in state.items()})


def pickle_leaf(name: str, value: Any) -> bytes:
    """The bytes of a leaf's item, not padded. Raises CaptureError that names it."""
    try:
        if type(value) in (int, float, str, bool, bytes, type(None)):
            return object_item(pickle.dumps(value, protocol=2))
        stream = io.BytesIO()
        torch.save(value.detach() if isinstance(value, torch.Tensor) else value, stream)
        return stream.getvalue()
    except Exception as error:  # pickling runs the leaf's own code, which may raise anything
        raise CaptureError(
            f"{name}: a {type(value).__qualname__} can't be pickled ({type(error).__name__}: {error}); "
            "leave it out of the state or give it a state_dict()"
        ) from error


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
    odd_keys: list[tuple[str, object]]
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
    tree: JSON
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


def meta_error(name: str) -> CaptureError:
    """For a tensor without bytes."""
    return CaptureError(f"{name} is on the meta device and has no bytes to save; materialise it first")


def capture(state: Mapping[str, Any], previous: Structure | None) -> Captured:
    """Take hold of ``state``; what can't be saved is found here, before anything is written.

    Args: ``previous`` is the structure that the compiled plan belongs to.
    Raises: CaptureError; whatever a ``state_dict()`` raises.
    """
    if not isinstance(state, Mapping):
        raise CaptureError(f"the state must be a mapping of names to values, not a {type(state).__name__}")
    walk = walk_state(state)
    try:
        shapes = [tensor.shape for tensor in walk.tensors]
    except RuntimeError:  # a nested tensor has none
        walk.demote_nested()
        shapes = [tensor.shape for tensor in walk.tensors]
    # a slot only grows: a counter that shrinks by a digit must not move every offset behind it
    floor = dict(zip(previous.leaf_names, previous.slots, strict=True)) if previous else {}
    items = [pickle_leaf(name, value) for name, value in zip(walk.leaf_names, walk.leaves, strict=True)]
    slots = [
        max(slot_bytes(len(item), SECTOR_BYTES), floor.get(name, 0))
        for name, item in zip(walk.leaf_names, items, strict=True)
    ]
    names = walk.tensor_names
    walk.separate_ties()
    if walk.ties:
        shapes = [tensor.shape for tensor in walk.tensors]
    tensors = walk.tensors
    structure = Structure(
        tensor_names=walk.tensor_names,
        dtypes=[tensor.dtype for tensor in tensors],
        shapes=shapes,
        strides=[None if tensor.is_contiguous() else tensor.stride() for tensor in tensors],
        leaf_names=walk.leaf_names,
        exotic=[
            (index, f"{leaf.dtype} {leaf.layout} {leaf.size() if not leaf.is_nested else 'nested'}")
            for index, leaf in enumerate(walk.leaves)
            if isinstance(leaf, torch.Tensor)
        ],
        slots=slots,
        containers=walk.containers,
        odd_keys=walk.odd_keys,
        ties=walk.ties,
    )
    for name, leaf in zip(walk.leaf_names, walk.leaves, strict=True):
        if isinstance(leaf, torch.Tensor) and leaf.is_meta:
            raise meta_error(name)
    tree: JSON = None
    flat: dict[str, Any] | None = None
    if structure != previous:
        if twice := duplicate_name(names + walk.leaf_names):
            raise CaptureError(f"two leaves have the name {twice!r}; rename one of their keys")
        tree = structure_of(state, walk)
        flat = dict(zip(walk.tensor_names, tensors, strict=True))
        flat |= {name: tensors[index] for name, index in walk.ties}
        flat |= zip(walk.leaf_names, walk.leaves, strict=True)
    return Captured(
        structure=structure,
        tree=tree,
        flat=flat,
        tensors=tensors,
        leaf_items=items,
        optimizers=walk.optimizers,
    )


def padded_items(captured: Captured) -> Iterator[bytes]:
    """Each leaf's item, grown to its slot."""
    for item, slot in zip(captured.leaf_items, captured.structure.slots, strict=True):
        yield pad_item(item, slot)


@dataclass(slots=True, kw_only=True)
class Targets:
    """Where a load puts what it reads."""

    walk: Walk
    tensors: dict[str, torch.Tensor]
    """Name -> tensor to fill in place, plain or not."""
    leaves: set[str]
    """Names of other leaves: replaced."""
    open_mappings: dict[str, type]
    """Mappings that take what was saved below them: name -> type of the Stateful that they belong to."""
    prefixes: set[str]
    """Top-level names of the state."""


def capture_targets(state: Mapping[str, Any]) -> Targets:
    """Find out what ``state`` can take. Calls each ``state_dict()`` once. Raises CaptureError."""
    if not isinstance(state, Mapping):
        raise CaptureError(f"the state must be a mapping of names to values, not a {type(state).__name__}")
    walk = walk_state(state)
    if twice := duplicate_name(walk.tensor_names + walk.leaf_names):
        raise CaptureError(f"two leaves have the name {twice!r}; rename one of their keys")
    tensors = dict(zip(walk.tensor_names, walk.tensors, strict=True))
    leaves = set()
    for name, leaf in zip(walk.leaf_names, walk.leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            tensors[name] = leaf
        else:
            leaves.add(name)
    open_mappings: dict[str, type] = {}
    for prefix, stateful, _ in walk.statefuls:
        for name, kind, size, _ in walk.containers:
            if (
                kind in ("dict", "odict", "counter")
                and size == 0
                and (name == prefix or name.startswith(f"{prefix}."))
            ):
                open_mappings[name] = type(stateful)
        if isinstance(stateful, Optimizer):
            open_mappings[f"{prefix}.state"] = type(stateful)
    return Targets(
        walk=walk, tensors=tensors, leaves=leaves, open_mappings=open_mappings, prefixes=set(state)
    )


def restore(
    state: Mapping[str, Any], targets: Targets, values: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    """Hand what was read back to ``state``; runs in the caller's thread.

    Args:
        values: name -> new value of a leaf (tensors were filled in place).
        extra: name of an open mapping -> what it takes in addition.
    """
    walk = targets.walk
    captured = {id(stateful): inner for _, stateful, inner in walk.statefuls}

    def merged(name: str, value: Any) -> Any:
        """``value`` with its leaves replaced; containers that change are copied, the trainer's own stay as
        they are."""
        if name in values:
            return values[name]
        if isinstance(value, Mapping):
            updates = {key: merged(f"{name}.{key}", entry) for key, entry in value.items()}
            changed = {key: entry for key, entry in updates.items() if entry is not value[key]} | extra.get(
                name, {}
            )
            if not changed:
                return value
            made = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
            for key, entry in changed.items():  # not update(): a Counter would add
                made[key] = entry
            return made
        if isinstance(value, list):
            entries = [merged(f"{name}.{index}", entry) for index, entry in enumerate(value)]
            return entries if any(new is not old for new, old in zip(entries, value, strict=True)) else value
        return value

    def hand_back(container: Any, key: Any, name: str) -> None:
        value = container[key]
        if name in values:
            container[key] = values[name]
        elif isinstance(value, torch.Tensor):
            return
        elif id(value) in captured:
            cast(Stateful, value).load_state_dict(merged(name, captured[id(value)]))
        elif isinstance(value, Mapping):
            for inner_key in list(value):
                hand_back(value, inner_key, f"{name}.{inner_key}")
        elif isinstance(value, list):
            for index in range(len(value)):
                hand_back(value, index, f"{name}.{index}")

    for key in state:
        hand_back(state, key, key)
