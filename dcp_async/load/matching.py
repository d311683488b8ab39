"""How a state and a checkpoint fit: which names meet, which are missing, unexpected or of another kind.

Enters: Targets and an opened checkpoint's Contents. Leaves: a Match. Pure: no I/O, and nothing of the state
is touched.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from ..catalog import Contents
from ..formats import (
    PLAIN_DTYPES,
    Tree,
    children_of,
    cut,
    grafted,
    kind_of,
    leaf_names,
    like,
    locate,
    subtree,
    text_of,
)
from ..options import Dtypes
from ..state import (
    UNASKED,
    OptimizerState,
    PerRank,
    Region,
    RNGState,
    Targets,
    Whole,
    empty_like,
    global_size,
)
from .aliases import are_one_view, groups_in_memory
from .entry_shapes import misfit
from .room import check_room


@dataclass(slots=True, kw_only=True)
class Match:
    """How a state and a checkpoint fit."""

    tensors: dict[str, list[Region]] = field(default_factory=dict)
    """To be filled in place."""
    gappy: set[str] = field(default_factory=set)
    """Of these, what may not be contiguous."""
    offered: set[str] = field(default_factory=set)
    """Of these, what need not be filled: a new tensor does as well."""
    resized: set[str] = field(default_factory=set)
    """What is PerRank and was saved by another number of ranks: taken from all of them."""
    leaves: list[str] = field(default_factory=list)
    """To be replaced."""
    fresh: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors made by us, for what is taken as it was saved and in place of meta tensors."""
    nodes: dict[str, Tree] = field(default_factory=dict)
    """The trees of what is taken as it was saved, by name."""
    objects: dict[str, set[str]] = field(default_factory=dict)
    """Name of one of these trees -> the leaves in it that stand for Statefuls. No other does: what a Stateful
    gave may be a leaf itself, under its own name."""
    grown: dict[str, list[tuple[Any, str]]] = field(default_factory=dict)
    """Mapping -> (key, name) of what is taken below it and is not there."""
    like: dict[str, DTensor] = field(default_factory=dict)
    """Leaves that become distributed tensors -> one that lies as they shall."""
    replaced: dict[str, set[str]] = field(default_factory=dict)
    """Optimizers' mappings whose other entries go: mapping -> names of the entries that were saved."""
    absent: set[str] = field(default_factory=set)
    """Statefuls of which nothing was saved: they are not called."""
    kept: list[str] = field(default_factory=list)
    """Options of optimizers that were not saved and stay as they are: reported, but no misfit."""
    aliases: list[list[tuple[str, Region]]] = field(default_factory=list)
    """Targets that share memory, though what is read into them may differ."""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Why names mismatch, in words."""
    convertible: bool = False
    """Whether dtypes="convert" would help some of them."""

    def mismatch(self, name: str, reason: str) -> None:
        """``name`` does not fit because it ``reason``."""
        self.mismatched.append(name)
        self.reasons.append(f"{name} {reason}")


def fresh_tensor(
    meta: TensorStorageMetadata,
    strides: tuple[int, ...] | None,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """An empty tensor for what ``meta`` describes."""
    dtype = dtype or meta.properties.dtype
    if strides is None:
        return torch.empty(meta.size, dtype=dtype, device=device)
    return torch.empty_strided(tuple(meta.size), strides, dtype=dtype, device=device)


def is_raw(
    meta: TensorStorageMetadata | BytesStorageMetadata, name: str, contents: Contents
) -> TypeGuard[TensorStorageMetadata]:
    """Whether ``name`` is a tensor for which an empty one can be made and filled."""
    return (
        isinstance(meta, TensorStorageMetadata)
        and meta.properties.dtype in PLAIN_DTYPES
        and meta.properties.layout is torch.strided
        and name not in contents.exotic
    )


def _is_per_rank(node: Tree) -> bool:
    """Whether ranks saved this for themselves: until it was each rank's own, RNGState was saved once."""
    return any(str(key).startswith(PerRank.key("")) for key, _ in children_of(node))


def _is_gappy(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_contiguous()


def _is_expanded(tensor: torch.Tensor) -> bool:
    return any(step == 0 and extent > 1 for step, extent in zip(tensor.stride(), tensor.shape, strict=True))


def match_state(targets: Targets, contents: Contents, *, dtypes: Dtypes) -> Match:
    """Compare names, kinds, shapes and dtypes. Touches nothing."""
    return _Matcher(targets, contents, dtypes).run()


class _Matcher:
    """One comparison."""

    def __init__(self, targets: Targets, contents: Contents, dtypes: Dtypes) -> None:
        self._targets = targets
        self._contents = contents
        self._dtypes = dtypes
        self._names = contents.names
        self._match = Match()
        self._settled: set[str] = set()
        """Names of the state that are taken care of, whatever the checkpoint has under them."""
        self._misfits: list[tuple[str, str]] = []
        """Entries of parameters that have another size now, and why: said after what became of those."""
        self._surplus: set[str] = set()
        """What is taken although the state has no place of that number."""

    def run(self) -> Match:
        targets, names, match = self._targets, self._names, self._match
        per_rank = (*targets.flat.per_rank, *targets.flat.own)
        if targets.statefuls or per_rank:
            self._known = sorted(targets.tensors.keys() | targets.leaves)
            self._structure = self._contents.structure
            self._match_per_rank()
            for prefix, whole in targets.wholes.items():
                if prefix not in self._settled:
                    self._match_whole(prefix, whole)
            for prefix, groups in targets.named_groups.items():
                if prefix not in self._settled:
                    self._match_named_groups(prefix, groups)
            for prefix, mapping in targets.optimizer_states.items():
                self._match_optimizer_state(prefix, mapping)
            for prefix, accepts in targets.grows.items():
                self._match_grown(prefix, accepts)
        for name, tensor in targets.tensors.items():
            if name not in self._settled:
                self._match_tensor(name, tensor)
        for name in targets.leaves - self._settled:
            meta = names.get(name)
            if meta is None:
                match.missing.append(name)
            elif isinstance(meta, BytesStorageMetadata):
                match.leaves.append(name)
            else:
                match.mismatch(name, "is a tensor in the checkpoint, but not in the state")
        for name, reason in self._misfits:
            match.mismatch(name, reason)
        known = targets.tensors.keys() | targets.leaves | set(match.mismatched)
        inside = tuple(f"{prefix}." for prefix in targets.prefixes)
        others = tuple(f"{prefix}." for prefix in per_rank)  # belongs to other ranks
        taken = (match.fresh.keys() | set(match.leaves)) - self._surplus
        match.unexpected = [
            name
            for name in names
            if name not in known
            and name not in taken
            and (name in targets.prefixes or name.startswith(inside))
            and not name.startswith(others)
        ]
        self._separate_aliases()
        return match

    def _separate_aliases(self) -> None:
        """Find targets that share memory with others, of which more than these names was saved. What is only
        offered gives way to new tensors; what is left is compared when its bytes are read."""
        match = self._match
        for group in groups_in_memory(match.tensors, match.gappy):
            if are_one_view(group) and len({self._places(name) for name, _ in group}) == 1:
                continue
            for name in sorted({name for name, _ in group} & match.offered):
                del match.tensors[name]
                self._take([name])
            left = [(name, region) for name, region in group if name in match.tensors]
            if len(left) > 1:
                match.aliases.append(left)

    def _places(self, name: str) -> tuple[object, ...]:
        """Where the bytes of a tensor lie; names that were saved as one tensor have the same."""
        meta, places = self._names[name], self._contents.places
        chunks = meta.chunks if isinstance(meta, TensorStorageMetadata) else ()
        found = tuple(places.get(MetadataIndex(name, chunk.offsets)) for chunk in chunks)
        return found if found and None not in found else (name,)

    def _misfit(self, name: str, tensor: torch.Tensor, regions: Iterable[Region]) -> str | None:
        """Why what was saved as ``name`` can't be read into ``tensor``, of which ``regions`` lie here."""
        meta = self._names[name]
        if not isinstance(meta, TensorStorageMetadata):
            return "is a tensor in the state, but not in the checkpoint"
        saved = meta.properties.dtype
        size = global_size(tensor)
        if meta.size != size or (saved != tensor.dtype and self._dtypes == "exact"):
            here, there = f"{tuple(size)} {tensor.dtype}", f"{tuple(meta.size)} {saved}"
            return f"is {here} in the state, {there} in the checkpoint"
        if saved != tensor.dtype and not _can_cast(saved, tensor.dtype):
            here = f"{tuple(size)} {tensor.dtype}"
            return f"is {here} in the state; {saved}, as in the checkpoint, can't become that"
        for region in regions:
            if _is_gappy(region.tensor):
                self._match.gappy.add(name)
                if _is_expanded(region.tensor):
                    return "is expanded: its elements share one place; clone() it first"
        return None

    def _regions(self, name: str, tensor: torch.Tensor) -> list[Region]:
        # what lies here is asked, not the tensor itself: a ShardedTensor has few answers
        local = self._targets.local
        return local[name] if name in local else [Region.whole(tensor)]

    def _match_tensor(self, name: str, tensor: torch.Tensor) -> None:
        match, meta = self._match, self._names.get(name)
        if meta is None:
            match.missing.append(name)
            return
        regions = self._regions(name, tensor)
        if (reason := self._misfit(name, tensor, regions)) is not None:
            match.mismatch(name, reason)
            if isinstance(meta, TensorStorageMetadata) and meta.size == global_size(tensor):
                saved = meta.properties.dtype
                castable = saved != tensor.dtype and _can_cast(saved, tensor.dtype)
                match.convertible = match.convertible or castable
            return
        assert isinstance(meta, TensorStorageMetadata)
        if not any(region.tensor.is_meta for region in regions):
            match.tensors[name] = regions
        elif name in self._targets.local:
            match.mismatch(
                name, "is distributed and on the meta device; materialise it first, with to_empty()"
            )
        elif is_raw(meta, name, self._contents):
            check_room(name, meta, self._contents)
            match.fresh[name] = fresh_tensor(meta, None, self._targets.device, tensor.dtype)
        else:
            match.leaves.append(name)

    def _match_per_rank(self) -> None:
        """What is PerRank and was saved by another number of ranks is taken from all of them."""
        match, targets = self._match, self._targets
        for prefix in targets.flat.own:
            self._match_own(prefix)
        for prefix, value in targets.flat.per_rank.items():
            found, node = locate(self._structure, prefix)
            if isinstance(value.value, RNGState) and (value.on_resize is None or not _is_per_rank(node)):
                self._match_own(prefix)
                continue
            saved = len(children_of(node)) if found else 0
            if saved in (0, targets.world_size):
                continue
            self._settled.update(_at_or_below(prefix, self._known))
            others = (*targets.wholes, *targets.named_groups)
            self._settled.update(name for name in others if f"{name}.".startswith(f"{prefix}."))
            if value.on_resize is None:
                match.mismatch(
                    prefix,
                    f"was saved by {saved} ranks, one for each, and there are {targets.world_size} now; "
                    "PerRank(..., on_resize=...) says what each takes",
                )
            else:
                match.resized.add(prefix)
                match.nodes[prefix] = node
                self._take(leaf_names(node, prefix))

    def _match_own(self, prefix: str) -> None:
        """What is each rank's own by itself: one that was saved once, for all, is everybody's, and a rank
        that had no counterpart keeps what it has."""
        match, rank = self._match, self._targets.flat.rank
        found, node = locate(self._structure, prefix)
        keys = [str(key) for key, _ in children_of(node)] if found else []
        if not keys or PerRank.key(rank) in keys:
            return
        match.resized.add(prefix)
        self._settled.update(_at_or_below(prefix, self._known))
        self._settled.add(f"{prefix}.{PerRank.key(rank)}")
        if not _is_per_rank(node):
            match.nodes[prefix] = node
            self._take(leaf_names(node, prefix))

    def _match_whole(self, prefix: str, whole: Whole) -> None:
        """Take all that was saved there; where nothing was, a Stateful is missing."""
        match, targets = self._match, self._targets
        found, node = locate(self._structure, prefix)
        # objects inside of it take their own
        objects = {name for name in targets.statefuls if name.startswith(f"{prefix}.")}
        theirs = {name for head in objects for name in _at_or_below(head, self._known)}
        mine = [name for name in _at_or_below(prefix, self._known) if name not in theirs]
        if not found:
            if whole.is_stateful:
                match.absent.add(prefix)
                self._settled.update(mine)
                if mine or whole.present is UNASKED:  # else it has no state, and had none
                    match.missing.append(prefix)
            elif whole.keeps and not isinstance(whole.present, Mapping):
                match.kept += mine
                self._settled.update(mine)
            return
        node = cut(node, objects, prefix)
        if self._contents.manifest is None and whole.present is not UNASKED:
            node = like(node, whole.present)
        match.nodes[prefix] = node
        match.objects[prefix] = objects
        there = [name for name in leaf_names(node, prefix) if name not in objects]
        self._settled.update(mine)
        strict = targets.strict
        for name in there:
            tensor = targets.tensors.get(name)
            if tensor is None:
                self._take([name])
            elif name in strict:
                self._match_tensor(name, tensor)
            elif self._can_hold(name, tensor):
                match.offered.add(name)
                self._match_tensor(name, tensor)
            else:
                self._take([name])
        if whole.keeps:
            match.kept += sorted(set(mine).difference(there))
        if lacking := sorted(strict.intersection(mine).difference(there)):
            match.missing += lacking
            match.nodes[prefix] = grafted(node, whole.present, set(lacking), prefix)

    def _can_hold(self, name: str, tensor: torch.Tensor) -> bool:
        return not tensor.is_meta and self._misfit(name, tensor, self._regions(name, tensor)) is None

    def _match_named_groups(self, prefix: str, groups: list[Any]) -> None:
        """Take all groups as they were saved. A group finds its own when all is read, so nothing is read into
        the one that happens to have its number; another number of them is a misfit."""
        match = self._match
        _, node = locate(self._structure, prefix)
        if self._contents.manifest is None:
            node = like(node, groups)
        if kind_of(node) != "list":
            return
        saved = len(children_of(node))
        mine = _at_or_below(prefix, self._known)
        there = leaf_names(node, prefix)
        beyond = tuple(f"{prefix}.{number}." for number in range(saved, len(groups)))
        match.missing += [name for name in mine if name.startswith(beyond)]
        self._settled.update(mine)
        beyond = tuple(f"{prefix}.{number}." for number in range(len(groups), saved))
        self._surplus.update(name for name in there if name.startswith(beyond))
        match.nodes[prefix] = node
        self._take(there)

    def _match_optimizer_state(self, prefix: str, mapping: OptimizerState) -> None:
        """An optimizer's state grows with its history: what does not have the saved form gives way to it."""
        match = self._match
        node = subtree(self._structure, prefix)
        kind = kind_of(node)
        if kind is None or kind == "list":
            return
        heads = {f"{prefix}.{key}": (key, child) for key, child in children_of(node)}
        # entries that a parameter had none of when it was saved must not outlive the load
        match.replaced[prefix] = set(heads)
        self._settled.update(_at_or_below(prefix, self._known))
        for head, (key, child) in heads.items():
            was_parameter = f"{mapping.model}.{text_of(key)}" in self._names
            if mapping.takes is not None and not mapping.takes(key, was_parameter):
                continue  # another stage's of a pipeline, or nobody's
            here = _at_or_below(head, self._known)
            there = leaf_names(child, head)
            if (reason := misfit(mapping, self._targets, self._names, key, there)) is not None:
                self._misfits += [(name, reason) for name in there]  # what is there stays
            elif here and set(here) == set(there) and all(map(self._is_of_one_kind, here)):
                self._settled.difference_update(here)
            else:
                self._grow(prefix, key, child)

    def _is_of_one_kind(self, name: str) -> bool:
        return (name in self._targets.tensors) == isinstance(self._names[name], TensorStorageMetadata)

    def _match_grown(self, prefix: str, accepts: Callable[[str], bool]) -> None:
        inside = f"{prefix}."
        there = self._targets.wholes.keys() | self._targets.statefuls.keys()
        _, node = locate(self._structure, prefix)
        for key, child in children_of(node):
            below = f"{inside}{key}"
            if accepts(str(key)) and below not in there and not _at_or_below(below, self._known):
                self._grow(prefix, key, child)

    def _grow(self, prefix: str, key: Any, node: Tree) -> None:
        name = f"{prefix}.{key}"
        self._match.grown.setdefault(prefix, []).append((key, name))
        self._match.nodes[name] = node
        self._take(leaf_names(node, name))

    def _take(self, wanted: Iterable[str]) -> None:
        """Have all of ``wanted`` read, into tensors of our own; those of an optimizer's ``entries`` are cut
        as their parameters are."""
        match, contents = self._match, self._contents
        for name in wanted:
            meta = self._names[name]
            parameter = self._targets.entries.get(name.rpartition(".")[0])
            if is_raw(meta, name, contents):
                check_room(name, meta, contents)
                if parameter is not None and global_size(parameter) == meta.size:
                    match.fresh[name] = empty_like(parameter, meta.properties.dtype)
                else:
                    match.fresh[name] = fresh_tensor(meta, contents.strides.get(name), "cpu")
            else:
                if (
                    isinstance(parameter, DTensor)
                    and isinstance(meta, TensorStorageMetadata)
                    and parameter.shape == meta.size
                ):
                    match.like[name] = parameter
                match.leaves.append(name)


def _can_cast(saved: object, dtype: torch.dtype) -> bool:
    """Whether ``saved``, which a newer torch may have and this one not, can become ``dtype``."""
    return isinstance(saved, torch.dtype) and torch.can_cast(saved, dtype)


def _at_or_below(head: str, names: Sequence[str]) -> list[str]:
    """Those of ``names``, which are sorted, that are ``head`` or lie below it."""
    found = []
    at = bisect_left(names, head)
    if at < len(names) and names[at] == head:
        found.append(head)
    at = bisect_left(names, f"{head}.")
    while at < len(names) and names[at].startswith(f"{head}."):
        found.append(names[at])
        at += 1
    return found
