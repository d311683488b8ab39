"""flatten(): the leaves of a state as flat lists in one order, named as DCP's ``flatten_state_dict`` names
them.

Enters: a mapping of Statefuls, tensors, containers and picklable leaves. Leaves: a FlatState. Invariant: each
``state_dict()`` is called exactly once: in the mapping's order by a process that saves alone, in one order on
all ranks by several (asking.py).
Source: torch/distributed/checkpoint/_traverse.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .._foreign import ENDINGS, words
from ..formats import (
    Tree,
    kind_of_stateful,
    list_node,
    mapping_kind,
    mapping_node,
    pickled_key,
    text_of,
)
from .asking import UNASKED, Given, snapshot
from .containers import CaptureError, Kind, is_plain, kind_of_value
from .depth import MAX_DEPTH, why_too_deep
from .flat_state import Extent, FlatState
from .optimizers import stepped_by
from .sharding import LayoutCache, Piece, Shard, is_sharded, sharded
from .stateful import FromRank, PerRank, is_stateful
from .wrapped import is_wrapper


class _TooDeepError(Exception):
    """Containers lie in one another without end, or nearly; says where flattening gave up."""


def _is_stable(key: object) -> bool:
    """Whether the ``str()`` of a key is the same in another process."""
    if isinstance(key, tuple):
        return all(map(_is_stable, key))
    # in the order of hashes, which are seeded; a tensor's text depends on print options
    if isinstance(key, (frozenset, torch.Tensor)):
        return False
    # object's own text has an address in it
    return type(key).__repr__ is not object.__repr__ or type(key).__str__ is not object.__str__


class _Flattener:
    """Goes over a state once, in its own order."""

    def __init__(
        self,
        rank: int,
        given: Given,
        check_key: Callable[[str, object, bytes], None] | None,
        ask: Callable[[str, Any], Any],
        wants_tree: bool,
        is_load: bool,
    ) -> None:
        self._wants_tree = wants_tree
        self._is_load = is_load
        self.flat = FlatState(rank=rank, asked=[name for name, _ in given])
        self.where = ""
        """The name that it has come to."""
        self._own = PerRank.key(rank)
        self._given = given
        self._check_key = check_key
        self._ask = ask
        self._layouts: LayoutCache = {}
        self._depth = 0
        self._num_objects = 0
        self._is_own = False
        """Whether it is inside of what is PerRank or FromRank."""
        self._is_from_rank = False
        """Whether it is inside of what is FromRank."""

    def visit_root(self, state: Mapping[str, Any]) -> None:
        kind = mapping_kind(state)
        self.flat.containers.append(("", kind, len(state), 0))
        entries: list[tuple[Any, Tree]] = []
        for key, value in state.items():
            if not isinstance(key, str):
                raise CaptureError(f"the state's keys must be str; {key!r} is a {type(key).__name__}")
            name = text_of(key)
            if type(key) is not str:
                self._note_odd_key(name, key)
            node = self._visit(name, value)
            if self._wants_tree:
                entries.append((key, node))
        if self._wants_tree:
            self.flat.tree = mapping_node(kind, entries)

    def _visit(self, name: str, value: Any) -> Tree:
        """Take in ``value``, which lies at ``name``; gives its node of the tree."""
        self.where = name
        match kind_of_value(value, is_own=self._is_own):
            case Kind.TENSOR:
                self._visit_tensor(name, value)
                return None
            case Kind.OWN:
                self.flat.own[name] = value
                # one level more, as if the caller had put it into a PerRank: names are the same either way
                self._enter(name, "dict", 1)
                begun = self._begin_object()
                node = self._visit_stateful(f"{name}.{self._own}", value)
                self._end_object(name, begun)
                self._depth -= 1
                return mapping_node("dict", [(self._own, node)])
            case Kind.STATEFUL:
                return self._visit_stateful(name, value)
            case Kind.MAPPING:
                return self._visit_mapping(name, value, mapping_kind(value))
            case Kind.FROM_RANK:
                return self._visit_from_rank(name, value)
            case Kind.PER_RANK:
                if self._is_from_rank:
                    raise CaptureError(
                        f"{name}: PerRank is every rank's, and lies in FromRank, which is one's; put it "
                        "beside that"
                    )
                self.flat.per_rank[name] = value
                self._enter(name, "dict", 1)
                around, self._is_own = self._is_own, True
                begun = self._begin_object()
                node = self._visit(f"{name}.{self._own}", value.value)
                self._end_object(name, begun)
                self._is_own = around
                self._depth -= 1
                return mapping_node("dict", [(self._own, node)])
            case Kind.LIST:
                self._enter(name, "list", len(value))
                children: list[Tree] = []
                for index, entry in enumerate(value):  # a comprehension would be a call more on the stack
                    children.append(self._visit(f"{name}.{index}", entry))
                self._depth -= 1
                return list_node(children)
            case Kind.LEAF:
                self._visit_leaf(name, value)
                return None

    def _visit_from_rank(self, name: str, value: FromRank) -> Tree:
        if self._is_own:
            raise CaptureError(
                f"{name}: FromRank lies inside of PerRank or another FromRank, which says already whose it "
                "is; put it beside that"
            )
        self.flat.from_rank[name] = value
        if not self._is_load and value.rank != self.flat.rank:
            return None  # whatever is there is in the tree of the rank that has it
        # as in PerRank: generators in it are this rank's, and their name needs no rank
        self._is_own = self._is_from_rank = True
        node = self._visit(name, value.value)
        self._is_own = self._is_from_rank = False
        return node

    def _visit_leaf(self, name: str, value: Any) -> None:
        if isinstance(value, tuple) and any(map(is_stateful, value)):
            raise CaptureError(
                f"{name}: a tuple is pickled whole, so the objects in it would not be asked for their "
                "state_dict(); use a list or a dict"
            )
        flat = self.flat
        flat.order.append(name)
        flat.leaf_names.append(name)
        flat.leaves.append(value)

    def _visit_tensor(self, name: str, tensor: torch.Tensor) -> None:
        flat = self.flat
        flat.order.append(name)
        if is_plain(tensor):
            flat.tensor_names.append(name)
            flat.tensors.append(tensor)
        elif is_sharded(tensor):
            self._visit_sharded(name, tensor)
        else:
            flat.leaf_names.append(name)
            flat.leaves.append(tensor)

    def _visit_sharded(self, name: str, tensor: torch.Tensor) -> None:
        if self._is_from_rank:
            raise CaptureError(
                f"{name}: ranks hold a {type(tensor).__name__} together, and FromRank would save one rank's "
                "part of it; put it beside that"
            )
        try:
            distributed = sharded(name, tensor, self._layouts)
        except (ValueError, RuntimeError) as error:
            raise CaptureError(f"{name}: a {type(tensor).__name__} can't be saved: {error}") from error
        flat = self.flat
        flat.distributed[name] = tensor
        for shard, local in distributed.pieces:
            if is_wrapper(local):
                # without what its class keeps beside the values, scales for one, its bytes mean nothing
                piece = Piece(name, shard or Shard(distributed.size, (0,) * len(distributed.size)))
                flat.pieces[piece.leaf] = piece
                flat.leaf_names.append(piece.leaf)
                flat.leaves.append(local)
                continue
            if not is_plain(local):
                raise CaptureError(
                    f"{name}: the local part of this {type(tensor).__name__} is a {type(local).__name__} of "
                    f"{local.dtype}, {local.layout}, which has no bytes that could be cut; convert it first"
                )
            if shard is not None:
                flat.shards[len(flat.tensors)] = shard
            flat.tensor_names.append(name)
            flat.tensors.append(local)
        if not distributed.pieces:
            # named all the same: where no rank holds a piece of it, `.metadata` still says what it is
            flat.bare.append((name, distributed.dtype, distributed.size))

    def _visit_stateful(self, name: str, stateful: Any) -> Tree:
        flat = self.flat
        flat.optimizers += stepped_by(stateful)
        if (asked := (name, id(stateful))) in self._given:
            _, inner = self._given.pop(asked)
        else:
            inner = self._ask(name, stateful)
            flat.asked.append(name)
        flat.statefuls.append((name, stateful, inner))
        begun = self._begin_object()
        if inner is UNASKED:
            self._end_object(name, begun)
            return None
        self._descend(name)
        if isinstance(inner, Mapping) and not is_stateful(inner):
            node = self._visit_mapping(name, inner, kind_of_stateful(mapping_kind(inner)))
        else:
            node = self._visit(name, inner)
            if isinstance(inner, PerRank) and node is not None:  # the only other mapping that a node tells
                node = [kind_of_stateful(node[0]), node[1]]
        self._end_object(name, begun)
        self._depth -= 1
        return node

    def _begin_object(self) -> tuple[int, int]:
        """Where an object begins: the leaves and the objects before it."""
        self._num_objects += 1
        return len(self.flat.order), self._num_objects

    def _end_object(self, name: str, begun: tuple[int, int]) -> None:
        first_leaf, number = begun
        objects = range(number, self._num_objects + 1)
        known = self.flat.extents.get(name)
        if known is not None and known.objects.start not in objects:
            self.flat.same_name = name
        self.flat.extents[name] = Extent(range(first_leaf, len(self.flat.order)), objects)

    def _visit_mapping(self, name: str, mapping: Mapping[Any, Any], kind: str) -> Tree:
        self._enter(name, kind, len(mapping))
        flat = self.flat
        # looked up once: a mapping may hold tens of thousands of tensors
        order, tensor_names, tensors = flat.order, flat.tensor_names, flat.tensors
        entries: list[list[Any]] = []
        for key, value in mapping.items():
            if type(key) is str:
                below = f"{name}.{key}"
            else:
                below = f"{name}.{text_of(key)}"
                self._note_odd_key(below, key)
            # inlined: the common case of a large state
            if isinstance(value, torch.Tensor) and is_plain(value):
                order.append(below)
                tensor_names.append(below)
                tensors.append(value)
                if self._wants_tree:  # one more object each, for the garbage collector to go over
                    entries.append([key, None])
            else:
                node = self._visit(below, value)
                if self._wants_tree:
                    entries.append([key, node])
        self._depth -= 1
        return [kind, entries]

    def _descend(self, name: str) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _TooDeepError(name)

    def _enter(self, name: str, kind: str, size: int) -> None:
        self._descend(name)
        flat = self.flat
        num_leaves = len(flat.tensor_names) + len(flat.leaf_names) + len(flat.bare)
        flat.containers.append((name, kind, size, num_leaves))

    def _note_odd_key(self, below: str, key: object) -> None:
        """Note a key that is no str, or is of a class that extends it; ``below`` is named by it."""
        if not _is_stable(key):
            raise CaptureError(
                f"{below}: a key of type {type(key).__name__} has another str() in each process, and names "
                "are made of that; use a str, an int, or a tuple of these"
            )
        try:
            raw = pickled_key(key)
        except Exception as error:  # pickling runs the key's own code, which may raise anything
            raise CaptureError(
                f"{below}: a key of type {type(key).__name__} can't be pickled ({error}); use a str or an int"
            ) from error
        # at save, by name: a load that can't read the key comes too late
        if raw is not None and self._check_key is not None:
            self._check_key(below, key, raw)
        # 1 and "1" have one name: without this a structure would equal one whose manifest says otherwise
        self.flat.odd_keys.append((below, repr(key).encode() if raw is None else raw))


def flatten(
    state: Mapping[str, Any],
    rank: int,
    given: Given | None = None,
    *,
    check_key: Callable[[str, object, bytes], None] | None = None,
    ask: Callable[[str, Any], Any] = snapshot,
    wants_tree: bool = True,
    is_load: bool = False,
) -> FlatState:
    """Every leaf of ``state``; each Stateful is asked once, in the mapping's order, but for those that have
    ``given`` theirs already.

    Args:
        check_key: raises CaptureError for a key, of that name and pickle, that a load would refuse.
        ask: asks a Stateful at a name, or gives UNASKED.
        wants_tree: whether ``FlatState.tree`` is needed; only a save writes it down.
        is_load: whether what is FromRank is gone into on every rank, since all load it.
    Raises: CaptureError.
    """
    if not isinstance(state, Mapping):
        raise CaptureError(f"the state must be a mapping of names to values, not a {type(state).__name__}")
    flattener = _Flattener(rank, given or {}, check_key, ask, wants_tree, is_load)
    try:
        flattener.visit_root(state)
    except (_TooDeepError, RecursionError) as error:
        raise CaptureError(_why_too_deep(state, flattener, error)) from None
    except (CaptureError, *ENDINGS):
        raise
    except BaseException as error:  # mappings and tensors of the trainer's own may raise anything
        raise CaptureError(_unreadable(flattener, error)) from error
    return flattener.flat


def _why_too_deep(state: Mapping[str, Any], flattener: _Flattener, error: Exception) -> str:
    try:
        # only now: telling a circle from depth means to keep every container met in mind
        return why_too_deep(state, flattener.flat.statefuls, str(error))
    except ENDINGS:
        raise
    except BaseException as second:  # it looks at the trainer's own mappings once more
        return _unreadable(flattener, second)


def _unreadable(flattener: _Flattener, error: BaseException) -> str:
    return f"{flattener.where or 'the state'}: it can't be looked at ({words(error)})"
