"""The walk over a state: its leaves as flat lists in one order, named as DCP's ``flatten_state_dict`` names
them.

Enters: a mapping of Statefuls, tensors, containers and picklable leaves. Leaves: a Walk, which refers to the
live objects. Invariant: each ``state_dict()`` is called exactly once: in the mapping's order by a process
that saves alone, in one order on all ranks by several (order.py).
Source: torch/distributed/checkpoint/_traverse.py.
"""

from __future__ import annotations

import concurrent.futures
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from .._foreign import ENDINGS, user_code, words
from .._geometry import Offsets
from ..formats import (
    PLAIN_DTYPES,
    Tree,
    kind_of_stateful,
    list_node,
    mapping_kind,
    mapping_node,
    pickled_key,
    text_of,
)
from .checkpointable import is_checkpointable
from .depth import MAX_DEPTH, why_too_deep
from .optimizers import stepped_by
from .sharding import LayoutCache, Piece, Shard, is_sharded, sharded
from .stateful import AppState, PerRank, RNGState, is_stateful
from .tensor_memory import is_in_bounds, lack_of_memory
from .wrapped import is_wrapper

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_SCALARS = frozenset({int, float, str, bool, bytes, complex, type(None)})

Given = dict[tuple[str, int], tuple[Any, Any]]
"""(name, id of a Stateful) -> (it, what it gave) of those that were asked before the walk, in the order of
asking. One that gives another shares its name with that."""


UNASKED: Any = object()
"""In place of what a Stateful would have given, had it been asked."""


class CaptureError(ValueError):
    """The state can't be saved as it is; the message names the leaf."""


class _TooDeepError(Exception):
    """Containers lie in one another without end, or nearly; says where the walk gave up."""


def is_terminal(values: list[Any]) -> bool:
    """Whether DCP pickles this list whole: it does unless a tensor or a mapping is in it."""
    if _SCALARS.issuperset(map(type, values)):  # an optimizer's list of parameters is long
        return True
    return _is_terminal(values, {})


def _is_terminal(values: list[Any], known: dict[int, list[Any]]) -> bool:
    """``known``: those that are; a list may refer to another any number of times."""
    for entry in values:
        if isinstance(entry, (torch.Tensor, Mapping, PerRank)) or is_stateful(entry):
            return False
        if isinstance(entry, list) and id(entry) not in known:
            if not (_SCALARS.issuperset(map(type, entry)) or _is_terminal(entry, known)):
                return False
            known[id(entry)] = entry  # not before: one that lies in itself has to end in a RecursionError
    return True


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes can be copied raw; others go through ``torch.save``. A conjugate or negative view is
    resolved by the copy itself. Nested tensors are told apart later: asking each tensor would be felt."""
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.layout is torch.strided
        and tensor.dtype in PLAIN_DTYPES
        and not is_checkpointable(tensor)
    )


def _is_stable(key: object) -> bool:
    """Whether the ``str()`` of a key is the same in another process."""
    if isinstance(key, tuple):
        return all(map(_is_stable, key))
    if isinstance(key, (frozenset, torch.Tensor)):
        return False
    return type(key).__repr__ is not object.__repr__ or type(key).__str__ is not object.__str__


@dataclass(slots=True)
class Walk:
    """The leaves of a state, in DCP's order and by DCP's names."""

    order: list[str] = field(default_factory=list)
    """Every leaf's name, tensors included, as the walk met them: mappings keep the order of their keys."""
    tensor_names: list[str] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    shards: dict[int, Shard] = field(default_factory=dict)
    """Index of a tensor that is a piece of a distributed one -> where it lies in that."""
    bare: list[tuple[str, torch.dtype, Offsets]] = field(default_factory=list)
    """(name, dtype, global size) of distributed tensors of which nothing lies here."""
    distributed: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name -> distributed tensor."""
    pieces: dict[str, Piece] = field(default_factory=dict)
    """Name of a leaf that is a piece of a distributed tensor -> where it lies in that."""
    kept: list[int] = field(default_factory=list)
    """Which of the tensors ``separate_ties`` has left, if there were ties."""
    ties: list[tuple[str, int]] = field(default_factory=list)
    """(name, index of the tensor that has the same bytes) of tensors that occur again; filled by
    ``separate_ties``."""
    leaf_names: list[str] = field(default_factory=list)
    leaves: list[Any] = field(default_factory=list)
    """Everything that is no plain tensor: pickled."""
    containers: list[tuple[str, str, int, int]] = field(default_factory=list)
    """(prefix, kind, size, leaves before it) of each container: with the names this is the whole
    structure."""
    odd_keys: list[tuple[str, bytes]] = field(default_factory=list)
    """Mapping keys that are no str: (name below the key, what tells it from another of that name)."""
    optimizers: list[Optimizer] = field(default_factory=list)
    statefuls: list[tuple[str, Any, Any]] = field(default_factory=list)
    """(prefix, the Stateful, what its state_dict() gave, or UNASKED)."""
    rank: int = 0
    """This process's, for what is PerRank."""
    per_rank: dict[str, PerRank] = field(default_factory=dict)
    own: dict[str, RNGState] = field(default_factory=dict)
    """Name -> what is each rank's own by itself."""
    given: Given = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Names of the Statefuls in the order in which they were asked."""
    check_key: Callable[[str, object, bytes], None] | None = None
    """Raises CaptureError for a key, of that name and pickle, that a load would refuse."""
    at: str = ""
    """Where the walk is."""
    ask: Callable[[str, Any], Any] | None = None
    """Asks a Stateful at a name, or gives UNASKED; None asks each."""
    _layouts: LayoutCache = field(default_factory=dict)
    _depth: int = 0
    _is_own: bool = False
    """Whether the walk is inside of what is PerRank."""

    def visit(self, name: str, value: Any) -> None:
        """Walk ``value``, which lies at ``name``."""
        self.at = name
        if isinstance(value, torch.Tensor):
            self.order.append(name)
            if is_plain(value):
                self.tensor_names.append(name)
                self.tensors.append(value)
            elif is_sharded(value):
                self._visit_sharded(name, value)
            else:
                self.leaf_names.append(name)
                self.leaves.append(value)
        elif isinstance(value, RNGState) and not self._is_own:
            self.own[name] = value
            self._enter(name, "dict", 1)
            self._visit_stateful(f"{name}.{PerRank.key(self.rank)}", value)
        elif is_stateful(value):
            self._visit_stateful(name, value)
        elif isinstance(value, Mapping):
            self._visit_mapping(name, value)
        elif isinstance(value, PerRank):
            self.per_rank[name] = value
            self._enter(name, "dict", 1)
            around, self._is_own = self._is_own, True
            self.visit(f"{name}.{PerRank.key(self.rank)}", value.value)
            self._is_own = around
            self._depth -= 1
        elif isinstance(value, list) and not is_terminal(value):
            self._enter(name, "list", len(value))
            for index, entry in enumerate(value):
                self.visit(f"{name}.{index}", entry)
            self._depth -= 1
        elif isinstance(value, tuple) and any(map(is_stateful, value)):
            raise CaptureError(
                f"{name}: a tuple is pickled whole, so the objects in it would not be asked for their "
                "state_dict(); use a list or a dict"
            )
        else:
            self.order.append(name)
            self.leaf_names.append(name)
            self.leaves.append(value)

    def shapes(self) -> list[torch.Size]:
        """The shapes of ``tensors``; nested ones, which have none, become leaves."""
        try:
            return [tensor.shape for tensor in self.tensors]
        except RuntimeError:  # asking each tensor before would be felt
            self._demote_nested()
            return [tensor.shape for tensor in self.tensors]

    def _demote_nested(self) -> None:
        nested = [index for index, tensor in enumerate(self.tensors) if tensor.is_nested]
        self.leaf_names += [self.tensor_names[index] for index in nested]
        self.leaves += [self.tensors[index] for index in nested]
        self._keep(sorted(set(range(len(self.tensors))) - set(nested)))

    def _keep(self, indices: list[int]) -> None:
        """Forget all tensors but these."""
        self.shards = {new: self.shards[old] for new, old in enumerate(indices) if old in self.shards}
        self.tensor_names = [self.tensor_names[index] for index in indices]
        self.tensors = [self.tensors[index] for index in indices]

    def addresses(self) -> list[int]:
        """Where each tensor lies. Raises CaptureError for one that has no memory at all."""
        try:
            return list(map(torch.Tensor.data_ptr, self.tensors))
        except RuntimeError:  # it only looks like a plain tensor, as inside of a vmap
            self._refuse_without_memory()
            raise

    def check_memory(self, shapes: Sequence[torch.Size]) -> None:
        """Raises CaptureError for a tensor whose memory ends before its last element: copying it would read
        what is not its own."""
        if not is_in_bounds(self.tensors, shapes):
            self._refuse_without_memory()

    def _refuse_without_memory(self) -> None:
        for name, tensor in zip(self.tensor_names, self.tensors, strict=True):
            if (lack := lack_of_memory(tensor)) is not None:
                raise CaptureError(f"{name}: {lack}")

    def separate_ties(self, addresses: Sequence[int]) -> bool:
        """Keep one of each group of tensors that are the same view of the same memory: it is stored once.

        Says whether there were any.
        """
        if len(set(addresses)) == len(addresses):
            return False
        first: dict[tuple[Any, ...], int] = {}
        kept: list[int] = []
        for at, tensor in enumerate(self.tensors):
            # an empty tensor has no memory to share
            memory = addresses[at] if tensor.numel() else id(tensor)
            lazy = (tensor.is_conj(), tensor.is_neg())
            shape = (tensor.shape, tensor.stride(), self.shards.get(at))
            index = first.setdefault((tensor.device, memory, tensor.dtype, lazy, shape), len(kept))
            if index == len(kept):
                kept.append(at)
            else:
                self.ties.append((self.tensor_names[at], index))
        self._keep(kept)
        self.kept = kept
        return bool(self.ties)

    def _visit_sharded(self, name: str, tensor: torch.Tensor) -> None:
        try:
            found = sharded(name, tensor, self._layouts)
        except (ValueError, RuntimeError) as error:
            raise CaptureError(f"{name}: a {type(tensor).__name__} can't be saved: {error}") from error
        self.distributed[name] = tensor
        for shard, local in found.pieces:
            if is_wrapper(local):
                piece = Piece(name, shard or Shard(found.size, (0,) * len(found.size)))
                self.pieces[piece.leaf] = piece
                self.leaf_names.append(piece.leaf)
                self.leaves.append(local)
                continue
            if not is_plain(local):
                raise CaptureError(
                    f"{name}: the local part of this {type(tensor).__name__} is a {type(local).__name__} of "
                    f"{local.dtype}, {local.layout}, which has no bytes that could be cut; convert it first"
                )
            if shard is not None:
                self.shards[len(self.tensors)] = shard
            self.tensor_names.append(name)
            self.tensors.append(local)
        if not found.pieces:
            self.bare.append((name, found.dtype, found.size))

    def _visit_stateful(self, name: str, stateful: Any) -> None:
        self.optimizers += stepped_by(stateful)
        if (asked := (name, id(stateful))) in self.given:
            _, inner = self.given.pop(asked)
        else:
            inner = self.ask(name, stateful) if self.ask else snapshot(name, stateful)
            self.asked.append(name)
        self.statefuls.append((name, stateful, inner))
        if inner is UNASKED:
            return
        self._descend(name)
        if isinstance(inner, Mapping) and not is_stateful(inner):
            self._visit_mapping(name, inner, kind_of_stateful(mapping_kind(inner)))
        else:
            self.visit(name, inner)
        self._depth -= 1

    def _descend(self, name: str) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _TooDeepError(name)

    def _enter(self, name: str, kind: str, size: int) -> None:
        self._descend(name)
        leaves = len(self.tensor_names) + len(self.leaf_names) + len(self.bare)
        self.containers.append((name, kind, size, leaves))

    def visit_odd_key(self, below: str, key: object) -> None:
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
        if raw is not None and self.check_key is not None:
            self.check_key(below, key, raw)
        self.odd_keys.append((below, repr(key).encode() if raw is None else raw))

    def _visit_mapping(self, name: str, mapping: Mapping[Any, Any], kind: str | None = None) -> None:
        self._enter(name, kind or mapping_kind(mapping), len(mapping))
        order, tensor_names, tensors = self.order, self.tensor_names, self.tensors
        for key, value in mapping.items():
            if type(key) is str:
                below = f"{name}.{key}"
            else:
                below = f"{name}.{text_of(key)}"
                self.visit_odd_key(below, key)
            if isinstance(value, torch.Tensor) and is_plain(
                value
            ):  # inlined: the common case of a large state
                order.append(below)
                tensor_names.append(below)
                tensors.append(value)
            else:
                self.visit(below, value)
        self._depth -= 1


def snapshot(name: str, stateful: Any) -> Any:
    """What the ``state_dict()`` of ``stateful``, which lies at ``name``, gives. Raises CaptureError."""
    try:
        is_ours = isinstance(stateful, (AppState, RNGState))
        with user_code("state_dict", stateful, name):
            inner = stateful._snapshot() if is_ours else stateful.state_dict()
    except ENDINGS:
        raise
    except BaseException as error:  # the trainer's own code, which may raise anything
        raise CaptureError(
            f"{name}: {type(stateful).__name__}.state_dict() failed ({words(error)})"
        ) from error
    if (
        inspect.isawaitable(inner)
        or inspect.isasyncgen(inner)
        or isinstance(inner, concurrent.futures.Future)
    ):
        if inspect.iscoroutine(inner):
            inner.close()
        raise asynchronous_error(name, stateful)
    return inner


def asynchronous_error(name: str, stateful: object) -> CaptureError:
    """For a ``state_dict()`` that would have to be awaited."""
    return CaptureError(
        f"{name}: {type(stateful).__name__}.state_dict() is asynchronous; a snapshot must be taken "
        "in one piece, so give the state an object whose state_dict() returns a plain dict"
    )


def walk_state(
    state: Mapping[str, Any],
    rank: int,
    given: Given | None = None,
    check_key: Callable[[str, object, bytes], None] | None = None,
    ask: Callable[[str, Any], Any] | None = None,
) -> Walk:
    """Visit every leaf of ``state``; calls each Stateful's ``state_dict()`` once, in the mapping's order, but
    for those that have ``given`` theirs already. ``ask`` does it in another way, see Walk."""
    if not isinstance(state, Mapping):
        raise CaptureError(f"the state must be a mapping of names to values, not a {type(state).__name__}")
    given = given or {}
    walk = Walk(rank=rank, given=given, asked=[name for name, _ in given], check_key=check_key, ask=ask)
    walk.containers.append(("", mapping_kind(state), len(state), 0))
    try:
        for key, value in state.items():
            if not isinstance(key, str):
                raise CaptureError(f"the state's keys must be str; {key!r} is a {type(key).__name__}")
            name = text_of(key)
            if type(key) is not str:
                walk.visit_odd_key(name, key)
            walk.visit(name, value)
    except (_TooDeepError, RecursionError) as error:
        raise CaptureError(_why_too_deep(state, walk, error)) from None
    except (CaptureError, *ENDINGS):
        raise
    except BaseException as error:  # mappings and tensors of the trainer's own may raise anything
        raise CaptureError(f"{walk.at or 'the state'}: it can't be looked at ({words(error)})") from error
    return walk


def _why_too_deep(state: Mapping[str, Any], walk: Walk, error: Exception) -> str:
    try:
        return why_too_deep(state, walk.statefuls, str(error))
    except ENDINGS:
        raise
    except BaseException as second:  # it looks at the trainer's own mappings once more
        return f"{walk.at or 'the state'}: it can't be looked at ({words(second)})"


def duplicate_name(names: Sequence[str]) -> str | None:
    """A name that occurs twice, if one does: DCP's dotted names do not tell {"a.b": x} from {"a": {"b":
    x}}."""
    if len(set(names)) == len(names):
        return None
    return next(name for name, count in Counter(names).items() if count > 1)


def structure_of(state: Mapping[str, Any], walk: Walk) -> Tree:
    """The tree of containers, for the manifest."""
    inner = {id(stateful): captured for _, stateful, captured in walk.statefuls}

    def node(value: Any, *, is_own: bool = False) -> Tree:
        """``is_own``: it lies inside of what is PerRank. Loops, since each comprehension would be a call more
        on the stack."""
        if isinstance(value, torch.Tensor):
            return None
        if isinstance(value, RNGState) and not is_own:
            return mapping_node("dict", [(PerRank.key(walk.rank), node_of_stateful(inner[id(value)]))])
        if is_stateful(value):
            return node_of_stateful(inner[id(value)], is_own=is_own)
        if isinstance(value, Mapping):
            entries: list[tuple[Any, Tree]] = []
            for key, entry in value.items():
                entries.append((key, node(entry, is_own=is_own)))
            return mapping_node(mapping_kind(value), entries)
        if isinstance(value, PerRank):
            return mapping_node("dict", [(PerRank.key(walk.rank), node(value.value, is_own=True))])
        if isinstance(value, list) and not is_terminal(value):
            children: list[Tree] = []
            for entry in value:
                children.append(node(entry, is_own=is_own))  # noqa: PERF401  # see above
            return list_node(children)
        return None

    def node_of_stateful(given: Any, *, is_own: bool = False) -> Tree:
        made = node(given, is_own=is_own)
        if made is None or isinstance(given, list) or is_stateful(given):
            return made
        return [kind_of_stateful(made[0]), made[1]]

    return mapping_node(mapping_kind(state), ((key, node(value)) for key, value in state.items()))
