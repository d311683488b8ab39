"""capture(): takes hold of a trainer's state.

Enters: a mapping of Statefuls, tensors, containers and picklable leaves. Leaves: a Captured:
parallel lists in the state's order, tensors by reference, everything else by value. Runs in the caller's
thread and in one piece, so a data pipeline can't advance between the model's snapshot and its own. Invariant:
a Captured refers to live tensors only until its save has staged them.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .._geometry import Offsets
from ..formats import Tree, build
from ..trust import Trust, load_item
from .asking import Given, ask_in_order
from .capture_cache import CacheHit, CaptureCache
from .containers import ATOMS, CaptureError
from .flat_state import FlatState
from .flatten import flatten
from .layouts import as_dtensors
from .leaf_storages import Fetch
from .leaves import LeafPickler, LeafRules
from .sharding import Piece, Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What a plan depends on, but for the lengths of leaves, which change. Compared list by list, in C."""

    order: list[str]
    """Every leaf's name in the order of the state, which is the order of its mappings' keys."""
    tensor_names: list[str]
    """The stored tensors' names."""
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...] | None]
    """None where the tensor is row-major."""
    leaf_names: list[str]
    exotic: list[tuple[int, str, tuple[int, ...]]]
    """Which leaves are tensors that go through ``torch.save``: (leaf, what `.metadata` says of it, size)."""
    containers: list[tuple[str, str, int, int]]
    odd_keys: list[tuple[str, bytes]]
    ties: list[tuple[str, int]]
    """Names that share the bytes of an earlier tensor."""
    shards: dict[int, Shard]
    """Which tensors are pieces of distributed ones, and where they lie in those."""
    bare: list[tuple[str, torch.dtype, Offsets]]
    """Distributed tensors of which nothing lies here."""
    pieces: dict[str, Piece]
    """Which leaves are pieces of distributed tensors."""

    @property
    def names(self) -> list[str]:
        """Every name: of stored tensors, of ties, of leaves, of what lies on other ranks only."""
        ties, bare = (name for name, _ in self.ties), (name for name, *_ in self.bare)
        return list(dict.fromkeys([*self.tensor_names, *ties, *self.leaf_names, *bare]))


@dataclass(frozen=True, slots=True)
class KnownStructure:
    """A structure that was captured before. Whoever wants the next capture to be fast keeps it."""

    structure: Structure
    cache: CaptureCache
    """How a state of this structure is captured without going over it anew."""


@dataclass(slots=True, kw_only=True)
class Captured:
    """A state at one moment: tensors by reference, everything else by value. Its lists are
    shared and never changed; ``release`` alone takes them away."""

    known: KnownStructure
    tree: Tree
    """None if the structure equals the one that was given to ``capture``."""
    tensors: list[torch.Tensor]
    leaf_items: list[bytes]
    """Each leaf's item, not padded."""
    optimizers: list[Optimizer]
    live: dict[str, Any]
    """Name -> leaf and distributed tensor, for DCP's planner."""
    dtensors: dict[str, DTensor]
    """Those of ``live`` whose local part, as it is, is among ``tensors``."""
    pointers: list[int] | None
    """Address of each tensor; None unless the bytes there are its elements and the CPU reads them."""

    @property
    def structure(self) -> Structure:
        """How the state is built; the very one that was given to ``capture`` if it equals that."""
        return self.known.structure

    @property
    def is_new(self) -> bool:
        """Whether the structure differs from the one that was given to ``capture``."""
        return self.tree is not None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors) + sum(map(len, self.leaf_items))

    def flat(self) -> dict[str, Any]:
        """Name -> leaf, as DCP's planner takes it."""
        structure = self.structure
        leaves = dict(zip(structure.tensor_names, self.tensors, strict=True))
        leaves |= {name: self.tensors[index] for name, index in structure.ties}
        pieces = structure.pieces  # the tensors that they are of are there
        return leaves | {name: value for name, value in self.live.items() if name not in pieces}

    def distributed_parts(self) -> frozenset[int]:
        """Which tensors are local parts of distributed ones."""
        return frozenset(index for index, name in enumerate(self.structure.tensor_names) if name in self.live)

    def nested(self) -> Any:
        """The state as DCP hands it to planners: containers as they were, states in place of Statefuls,
        plain and distributed tensors by reference, everything else as it was when it was captured. Only of
        a new structure."""
        values = self.flat()
        for name, item in zip(self.structure.leaf_names, self.leaf_items, strict=True):
            # what can change was pickled in save(), so its item says what it was then
            if name in values and (type(values[name]) not in ATOMS or is_exotic(values[name])):
                values[name] = load_item(io.BytesIO(item), _OWN)
        return build(self.tree, values.__getitem__, _as_it_is)

    def share(self, tensors: Sequence[int], leaves: Sequence[int]) -> Captured:
        """What one rank writes, in the order in which it does; itself if that is everything in its own
        order."""
        is_all = len(tensors) == len(self.tensors) and len(leaves) == len(self.leaf_items)
        # compared in C, since it is so in each save of a single rank
        if is_all and tensors == list(range(len(tensors))):
            return self
        pointers = self.pointers
        return replace(
            self,
            tensors=[self.tensors[index] for index in tensors],
            pointers=pointers and [pointers[index] for index in tensors],
            leaf_items=[self.leaf_items[index] for index in leaves],
        )

    def release(self) -> None:
        """Drop every reference to the trainer's tensors."""
        # the structure and the addresses stay: they hold no tensor
        self.tensors = []
        self.optimizers = []
        self.leaf_items = []
        self.live = {}
        self.dtensors = {}
        self.tree = None


_OWN = Trust(unsafe=True)
"""Nothing is at stake: this process pickled it."""


def _as_it_is(key: Any) -> Any:
    return key


def is_exotic(leaf: object) -> bool:
    """Whether a leaf is a tensor to `.metadata`. A nested tensor is not: it has no size to be named there."""
    return isinstance(leaf, torch.Tensor) and not leaf.is_nested


def meta_error(name: str) -> CaptureError:
    """For a tensor without bytes."""
    return CaptureError(f"{name} is on the meta device and has no bytes to save; materialise it first")


def capture(
    state: Mapping[str, Any],
    previous: KnownStructure | None,
    *,
    rank: int = 0,
    world_size: int = 1,
    rules: LeafRules | None = None,
    fetch: Fetch | None = None,
) -> Captured:
    """Take hold of ``state``; what can't be saved is found here, before anything is written.

    Args:
        previous: the structure that the compiled plan belongs to, as an earlier capture left it.
        rank: this process's, of ``world_size``; several ask their Statefuls in one order.
        rules: which leaves a load would admit; None for no check.
        fetch: brings to the host what of the leaves lies on devices; None where none is in use.
    Raises: CaptureError; whatever a ``state_dict()`` raises.
    """
    given: Given = {}
    if previous is not None:
        # a miss costs no second `state_dict()`: what was asked on the way is in `given`
        captured = _from_cache(state, previous, given, LeafPickler(rules, fetch))
        if captured is not None:
            return captured
    # a process alone has nobody to agree with on an order: flatten() asks as it goes, and a pass is saved
    if world_size > 1:
        ask_in_order(state, rank, given)
    # a tree has an object per tensor, for the garbage collector to go over, and most structures are known
    flat = flatten(
        state,
        rank,
        given,
        check_key=rules.check_key if rules else None,
        wants_tree=previous is None,
    )
    for name, value in flat.from_rank.items():
        if value.rank >= world_size:
            raise CaptureError(f"{name}: FromRank(..., {value.rank}), and there are {world_size} ranks")
    return _captured(state, flat, previous, LeafPickler(rules, fetch))


def _captured(
    state: Mapping[str, Any], flat: FlatState, previous: KnownStructure | None, pickler: LeafPickler
) -> Captured:
    """The capture of a state that was flattened anew."""
    shapes = flat.shapes()
    addresses = flat.addresses()
    # kept from before ties are taken out: the cache goes over a state as it is
    every_tensor, every_leaf, every_name = flat.tensors, flat.leaves, flat.tensor_names
    stored = addresses
    if flat.separate_ties(addresses):
        shapes = flat.shapes()
        stored = [addresses[index] for index in flat.kept]
    # here, in the caller's thread: the trainer may change a leaf as soon as it has its call back
    items = pickler.items(flat.leaf_names, flat.leaves)
    structure = _structure(flat, shapes)
    tree: Tree = None
    is_new = previous is None or structure != previous.structure
    if is_new:  # names of a structure that is known were looked at when it was new
        check_unique(flat, every_name)
        tree = flat.tree if previous is None else _tree(state, flat)
    known = KnownStructure(structure, CaptureCache()) if previous is None or is_new else previous
    # staging copies by address: where a storage was freed, as FSDP1 does, it would read foreign memory
    if not known.cache.is_in_bounds(flat.tensors, stored):
        flat.check_memory(shapes)
        known.cache.in_bounds = stored
    raw = _is_raw(flat.tensors)
    known.cache.record(state, flat, every_tensor, every_leaf, raw=raw)
    return Captured(
        known=known,
        tree=tree,
        tensors=flat.tensors,
        leaf_items=items,
        optimizers=flat.optimizers,
        live=flat.distributed | dict(zip(flat.leaf_names, flat.leaves, strict=True)),
        dtensors=as_dtensors(flat.distributed),
        pointers=stored if raw else None,
    )


def _tree(state: Mapping[str, Any], flat: FlatState) -> Tree:
    """The tree of ``state``, which was flattened without; nobody is asked again."""
    given = (inner for _, _, inner in flat.statefuls)  # they are met in the same order
    return flatten(state, flat.rank, ask=lambda _name, _stateful: next(given)).tree


def _is_raw(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the bytes in the memory of all of them are their elements, and the CPU reads them."""
    return (
        all(map(attrgetter("is_cpu"), tensors))
        # lazily negated or conjugated: in memory lies another number than the element is
        and not any(map(torch.Tensor.is_neg, tensors))
        and not any(map(torch.Tensor.is_conj, tensors))
    )


def _from_cache(
    state: Mapping[str, Any], previous: KnownStructure, given: Given, pickler: LeafPickler
) -> Captured | None:
    """The capture of a state that is built as before; None if it is not."""
    try:
        hit = previous.cache.look_up(state, given)
    except RecursionError:  # a list that holds itself now; flatten() says where
        return None
    return _repeated(hit, previous, pickler) if hit is not None else None


def _repeated(hit: CacheHit, previous: KnownStructure, pickler: LeafPickler) -> Captured | None:
    structure = previous.structure
    leaves = dict(zip(structure.leaf_names, hit.leaves, strict=True))
    items = pickler.items(leaves, hit.leaves)
    # guards look at plain tensors alone: of a leaf only the type is known to be as before
    without_bytes = any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in hit.leaves)
    if without_bytes or exotic_leaves(hit.leaves) != structure.exotic:
        return None
    return Captured(
        known=previous,
        tree=None,
        tensors=hit.tensors,
        leaf_items=items,
        optimizers=hit.optimizers,
        live=leaves | hit.dtensors,
        dtensors=hit.dtensors,
        pointers=hit.pointers,
    )


def exotic_leaves(leaves: Sequence[Any]) -> list[tuple[int, str, tuple[int, ...]]]:
    """Those of ``leaves`` that are tensors, as ``Structure.exotic`` lists them."""
    return [
        (index, f"{leaf.dtype} {leaf.layout} {leaf.requires_grad}", tuple(leaf.size()))
        for index, leaf in enumerate(leaves)
        if is_exotic(leaf)
    ]


def check_unique(flat: FlatState, tensor_names: Sequence[str]) -> None:
    """Raises CaptureError for a name that occurs twice: DCP's dotted names do not tell {"a.b": x} from {"a":
    {"b": x}}. ``tensor_names``: of all tensors, ties too."""
    # a distributed tensor has its name among the tensors once per piece that lies here
    whole = [name for name in tensor_names if name not in flat.distributed]
    names = [*whole, *flat.distributed, *flat.leaf_names]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise CaptureError(f"two leaves have the name {twice!r}; rename one of their keys")
    if name := flat.ambiguous_name():
        raise CaptureError(
            f"an object and something beside it have the name {name!r}, since a key has a dot; rename one of "
            "their keys"
        )


def _structure(flat: FlatState, shapes: list[torch.Size]) -> Structure:
    """What the layout of ``flat``'s tensors and leaves depends on."""
    for name, leaf in zip(flat.leaf_names, flat.leaves, strict=True):
        if isinstance(leaf, torch.Tensor) and leaf.is_meta:
            raise meta_error(name)
    one_of_each: dict[torch.Size, torch.Size] = {}  # a garbage collection goes over each that is kept
    return Structure(
        order=flat.order,
        tensor_names=flat.tensor_names,
        dtypes=[tensor.dtype for tensor in flat.tensors],
        shapes=[one_of_each.setdefault(shape, shape) for shape in shapes],
        strides=[None if tensor.is_contiguous() else tensor.stride() for tensor in flat.tensors],
        leaf_names=flat.leaf_names,
        exotic=exotic_leaves(flat.leaves),
        containers=flat.containers,
        odd_keys=flat.odd_keys,
        ties=flat.ties,
        shards=flat.shards,
        bare=flat.bare,
        pieces=flat.pieces,
    )
