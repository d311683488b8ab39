"""How a state and a checkpoint fit: which names meet, which are missing, unexpected or of another kind.

Enters: Targets and an opened checkpoint's Contents. Leaves: a Match. Pure: no I/O, and nothing of the state
is touched.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from .app_state import AppState, check_before_touch
from .checkpointable import empty_like, global_size
from .contents import Contents
from .errors import IncompatibleStateError
from .formats.structure import Tree, children_of, kind_of, leaf_names, mapping_node, subtree
from .formats.zip_item import PLAIN_DTYPES
from .state import Region, Targets

Dtypes = Literal["exact", "convert"]


@dataclass(slots=True, kw_only=True)
class Match:
    """How a state and a checkpoint fit."""

    tensors: dict[str, list[Region]] = field(default_factory=dict)
    """To be filled in place."""
    resized: set[str] = field(default_factory=set)
    """What is PerRank and was saved by another number of ranks: taken from all of them."""
    leaves: list[str] = field(default_factory=list)
    """To be replaced."""
    fresh: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors made by us, for mappings that take whatever was saved below them and in place of meta
    tensors."""
    like: dict[str, DTensor] = field(default_factory=dict)
    """Leaves that become distributed tensors -> one that lies as they shall."""
    open_nodes: dict[str, Tree] = field(default_factory=dict)
    """The trees of those mappings."""
    replaced: dict[str, set[str]] = field(default_factory=dict)
    """Optimizers' mappings whose other entries go: mapping -> names of the entries that were saved."""
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


def _is_expanded(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_contiguous():
        return False
    return any(step == 0 and extent > 1 for step, extent in zip(tensor.stride(), tensor.shape, strict=True))


def match_state(targets: Targets, contents: Contents, *, dtypes: Dtypes) -> Match:
    """Compare names, kinds, shapes and dtypes. Touches nothing."""
    names = contents.names
    match = Match()
    given_up = _match_open(targets, contents, match)
    for name, tensor in targets.tensors.items():
        if name not in given_up:
            _match_tensor(name, tensor, names.get(name), contents, match, targets, dtypes=dtypes)
    for name in targets.leaves - given_up:
        meta = names.get(name)
        if meta is None:
            match.missing.append(name)
        elif isinstance(meta, BytesStorageMetadata):
            match.leaves.append(name)
        else:
            match.mismatch(name, "is a tensor in the checkpoint, but not in the state")
    known = targets.tensors.keys() | targets.leaves
    inside = tuple(f"{prefix}." for prefix in targets.prefixes)
    others = tuple(f"{prefix}." for prefix in targets.walk.per_rank)  # belongs to other ranks
    taken = match.fresh.keys() | set(match.leaves)
    match.unexpected = [
        name
        for name in names
        if name not in known
        and name not in taken
        and (name in targets.prefixes or name.startswith(inside))
        and not name.startswith(others)
    ]
    # a container that was saved empty has no leaf, so an open mapping that stays empty misses nothing
    return match


def _match_tensor(
    name: str,
    tensor: torch.Tensor,
    meta: TensorStorageMetadata | BytesStorageMetadata | None,
    contents: Contents,
    match: Match,
    targets: Targets,
    *,
    dtypes: Dtypes,
) -> None:
    if meta is None:
        match.missing.append(name)
        return
    if not isinstance(meta, TensorStorageMetadata):
        match.mismatch(name, "is a tensor in the state, but not in the checkpoint")
        return
    saved = meta.properties.dtype
    # what lies here is asked, not the tensor itself: a ShardedTensor has few answers
    regions = targets.local[name] if name in targets.local else [Region.whole(tensor)]
    size = global_size(tensor)
    here, there = f"{tuple(size)} {tensor.dtype}", f"{tuple(meta.size)} {saved}"
    if meta.size != size:
        match.mismatch(name, f"is {here} in the state, {there} in the checkpoint")
    elif saved != tensor.dtype and dtypes == "exact":
        match.mismatch(name, f"is {here} in the state, {there} in the checkpoint")
        match.convertible = match.convertible or _can_cast(saved, tensor.dtype)
    elif saved != tensor.dtype and not _can_cast(saved, tensor.dtype):
        match.mismatch(name, f"is {here} in the state; {saved}, as in the checkpoint, can't become that")
    elif any(_is_expanded(region.tensor) for region in regions):
        match.mismatch(name, "is expanded: its elements share one place; clone() it first")
    elif not any(region.tensor.is_meta for region in regions):
        match.tensors[name] = regions
    elif name in targets.local:
        match.mismatch(name, "is distributed and on the meta device; materialise it first, with to_empty()")
    elif is_raw(meta, name, contents):
        match.fresh[name] = fresh_tensor(meta, None, targets.device, tensor.dtype)
    else:
        match.leaves.append(name)


def _can_cast(saved: object, dtype: torch.dtype) -> bool:
    """Whether ``saved``, which a newer torch may have and this one not, can become ``dtype``."""
    return isinstance(saved, torch.dtype) and torch.can_cast(saved, dtype)


def _match_per_rank(targets: Targets, structure: Tree, known: Sequence[str], match: Match) -> set[str]:
    """What is PerRank and was saved by another number of ranks is taken from all of them. Gives names of the
    state that this replaces."""
    given_up: set[str] = set()
    for prefix, value in targets.walk.per_rank.items():
        node = subtree(structure, prefix)
        saved = len(children_of(node))
        if saved in (0, targets.world_size):
            continue
        given_up.update(_at_or_below(prefix, known))
        if value.on_resize is None:
            match.mismatch(
                prefix,
                f"was saved by {saved} ranks, one for each, and there are {targets.world_size} now; "
                "PerRank(..., on_resize=...) says what each takes",
            )
        else:
            match.resized.add(prefix)
            match.open_nodes[prefix] = node
    return given_up


def _match_open(targets: Targets, contents: Contents, match: Match) -> set[str]:
    """What is resized is taken from all ranks, and open mappings take each child that they lack, whole. Gives
    names of the state that this replaces."""
    if not targets.open_mappings and not targets.walk.per_rank:
        return set()
    known = sorted(targets.tensors.keys() | targets.leaves)
    structure = contents.structure
    names = contents.names
    given_up = _match_per_rank(targets, structure, known, match)
    for prefix, node in match.open_nodes.items():
        _take(leaf_names(node, prefix), names, contents, match, {})
    for prefix, mapping in targets.open_mappings.items():
        node = subtree(structure, prefix)
        kind = kind_of(node)
        if kind is None or kind == "list":
            continue
        lacking = []
        heads = {f"{prefix}.{key}": (key, child) for key, child in children_of(node)}
        if mapping.is_optimizer_state:
            # entries that a parameter had none of when it was saved must not outlive the load
            match.replaced[prefix] = set(heads)
            given_up.update(_at_or_below(prefix, known))
            for head in heads:
                given_up.difference_update(_at_or_below(head, known))
        for head, (key, child) in heads.items():
            if mapping.takes is not None and not mapping.takes(key):
                continue  # another stage's of a pipeline, or nobody's
            here = _at_or_below(head, known)
            there = leaf_names(child, head)
            # an optimizer grows with its history: what does not have the saved form gives way to it
            if here and not (mapping.is_optimizer_state and set(here) != set(there)):
                continue
            given_up.update(here)
            lacking.append((key, child))
            _take(there, names, contents, match, targets.entries)
        match.open_nodes[prefix] = mapping_node(kind, lacking)
    return given_up


def _take(
    wanted: Iterable[str],
    names: Mapping[str, TensorStorageMetadata | BytesStorageMetadata],
    contents: Contents,
    match: Match,
    entries: Mapping[str, torch.Tensor],
) -> None:
    """Have all of ``wanted`` read, into tensors of our own; those of an optimizer's ``entries`` are cut as
    their parameters are."""
    for name in wanted:
        meta = names[name]
        parameter = entries.get(name.rpartition(".")[0])
        if is_raw(meta, name, contents):
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


def check_groups(targets: Targets, values: Mapping[str, Any], checkpoint_id: str) -> None:
    """Optimizers refuse groups of other sizes, but only when all is read. Raises IncompatibleStateError."""
    for prefix, stateful, _ in targets.walk.statefuls:
        if isinstance(stateful, torch.optim.Optimizer):
            for number, group in enumerate(stateful.param_groups):
                name = f"{prefix}.param_groups.{number}.params"
                saved = values.get(name)
                if isinstance(saved, list) and len(saved) != len(group["params"]):
                    raise IncompatibleStateError(
                        f"checkpoint {checkpoint_id!r} does not fit the state ({prefix}: group {number} "
                        f"has {len(group['params'])} parameters, {len(saved)} in the checkpoint); "
                        "nothing was loaded",
                        checkpoint_id=checkpoint_id,
                    )


def check_app_states(
    targets: Targets, structure: Tree, values: Mapping[str, Any], checkpoint_id: str
) -> None:
    """What was saved of an AppState's optimizers must fit, parameter by parameter and group by group. Raises
    IncompatibleStateError."""
    for prefix, stateful, _ in targets.walk.statefuls:
        if not isinstance(stateful, AppState):
            continue
        entries = [key for key, _ in children_of(subtree(structure, f"{prefix}.{stateful.entries_at}"))]
        groups = []
        for number, _ in enumerate(children_of(subtree(structure, f"{prefix}.optim.param_groups"))):
            params = values.get(f"{prefix}.optim.param_groups.{number}.params")
            if not isinstance(params, list):
                break  # nobody asked for it: the names alone say that groups are missing here
            groups.append({"params": params})
        if problems := check_before_touch(stateful, entries, groups):
            raise IncompatibleStateError(
                f"checkpoint {checkpoint_id!r} does not fit the state ({prefix}: {'; '.join(problems[:5])}); "
                "nothing was loaded. Build the optimizers as they were, or pass strict=False to load what "
                "fits",
                checkpoint_id=checkpoint_id,
            )


def check_fit(match: Match, checkpoint_id: str, *, unexpected: bool) -> None:
    """Raises IncompatibleStateError unless everything fits; ``unexpected`` says whether what is only in the
    checkpoint counts."""
    parts = []
    surplus = match.unexpected if unexpected else []
    for what, names in (("missing in the checkpoint", match.missing), ("not in the state", surplus)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"{what}: {', '.join(names[:5])}{more}")
    if match.mismatched:
        more = f" and {len(match.reasons) - 5} more" if len(match.reasons) > 5 else ""
        parts.append("; ".join(match.reasons[:5]) + more)
    if parts:
        convert = (
            "pass dtypes='convert' to convert where only the dtype differs, " if match.convertible else ""
        )
        raise IncompatibleStateError(
            f"checkpoint {checkpoint_id!r} does not fit the state ({'; '.join(parts)}); nothing was loaded. "
            f"Fix the state, {convert}or pass strict=False to load what fits",
            checkpoint_id=checkpoint_id,
        )
