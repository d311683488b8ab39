"""How a state and a checkpoint fit: which names meet, which are missing, unexpected or of another kind.

Enters: Targets and an opened checkpoint's Contents. Leaves: a Match. Pure: no I/O, and nothing of the state
is touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from .catalog import Contents
from .errors import IncompatibleStateError
from .formats.structure import JSON, children_of, kind_of, mapping_node, subtree
from .formats.zip_item import PLAIN_DTYPES
from .state import Targets


@dataclass(slots=True, kw_only=True)
class Match:
    """How a state and a checkpoint fit."""

    tensors: dict[str, torch.Tensor]
    """To be filled in place."""
    leaves: list[str]
    """To be replaced."""
    open_tensors: dict[str, torch.Tensor]
    """Fresh tensors for mappings that take whatever was saved below them."""
    open_nodes: dict[str, JSON]
    """The trees of those mappings."""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Why names mismatch, in words."""


def fresh_tensor(
    meta: TensorStorageMetadata, strides: tuple[int, ...] | None, device: torch.device | str
) -> torch.Tensor:
    dtype = meta.properties.dtype
    if strides is None:
        return torch.empty(meta.size, dtype=dtype, device=device)
    return torch.empty_strided(tuple(meta.size), strides, dtype=dtype, device=device)


def is_plain_meta(meta: TensorStorageMetadata) -> bool:
    """Whether an empty tensor of its kind can be made and filled."""
    return meta.properties.dtype in PLAIN_DTYPES and meta.properties.layout is torch.strided


def _is_expanded(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_nested:
        return False
    return any(step == 0 and extent > 1 for step, extent in zip(tensor.stride(), tensor.shape, strict=True))


def match_state(targets: Targets, contents: Contents) -> Match:
    """Compare names, kinds, shapes and dtypes. Touches nothing."""
    names = contents.names
    match = Match(tensors={}, leaves=[], open_tensors={}, open_nodes={})
    for name, tensor in targets.tensors.items():
        meta = names.get(name)
        if meta is None:
            match.missing.append(name)
        elif not isinstance(meta, TensorStorageMetadata):
            match.mismatched.append(name)
            match.reasons.append(f"{name} is a tensor in the state, but not in the checkpoint")
        elif meta.size != tensor.shape or meta.properties.dtype != tensor.dtype:
            match.mismatched.append(name)
            match.reasons.append(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} in the state, "
                f"{tuple(meta.size)} {meta.properties.dtype} in the checkpoint"
            )
        elif _is_expanded(tensor):
            match.mismatched.append(name)
            match.reasons.append(f"{name} is expanded: its elements share one place; clone() it first")
        elif tensor.is_meta:
            match.mismatched.append(name)
            match.reasons.append(f"{name} is on the meta device; materialise it first, e.g. with to_empty()")
        else:
            match.tensors[name] = tensor
    for name in targets.leaves:
        meta = names.get(name)
        if meta is None:
            match.missing.append(name)
        elif isinstance(meta, BytesStorageMetadata):
            match.leaves.append(name)
        else:
            match.mismatched.append(name)
            match.reasons.append(f"{name} is a tensor in the checkpoint, but not in the state")
    _match_open(targets, contents, match)
    known = targets.tensors.keys() | targets.leaves
    inside = tuple(f"{prefix}." for prefix in targets.prefixes)
    taken = match.open_tensors.keys() | set(match.leaves)
    match.unexpected = [
        name
        for name in names
        if name not in known and name not in taken and (name in targets.prefixes or name.startswith(inside))
    ]
    # a container that was saved empty has no leaf, so an open mapping that stays empty misses nothing
    return match


def _match_open(targets: Targets, contents: Contents, match: Match) -> None:
    """Open mappings take each child that they lack, whole."""
    known = targets.tensors.keys() | targets.leaves
    strides = contents.manifest.strides if contents.manifest else {}
    exotic = set(contents.manifest.exotic) if contents.manifest else set()
    for prefix in targets.open_mappings:
        node = subtree(contents.structure, prefix)
        kind = kind_of(node)
        if kind is None or kind == "list":
            continue
        lacking = {
            key: child
            for key, child in children_of(node)
            if not any(name == f"{prefix}.{key}" or name.startswith(f"{prefix}.{key}.") for name in known)
        }
        match.open_nodes[prefix] = mapping_node(kind, lacking)
        heads = tuple(f"{prefix}.{key}" for key in lacking)
        inside = tuple(f"{head}." for head in heads)
        for name, meta in contents.names.items():
            if name.startswith(inside) or name in heads:
                if isinstance(meta, TensorStorageMetadata) and is_plain_meta(meta) and name not in exotic:
                    match.open_tensors[name] = fresh_tensor(meta, strides.get(name), "cpu")
                else:
                    match.leaves.append(name)


def check_strict(match: Match, checkpoint_id: str) -> None:
    """Raises IncompatibleStateError unless everything fits."""
    parts = []
    for what, names in (("missing in the checkpoint", match.missing), ("not in the state", match.unexpected)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"{what}: {', '.join(names[:5])}{more}")
    if match.mismatched:
        more = f" and {len(match.reasons) - 5} more" if len(match.reasons) > 5 else ""
        parts.append("; ".join(match.reasons[:5]) + more)
    if parts:
        raise IncompatibleStateError(
            f"checkpoint {checkpoint_id!r} does not fit the state ({'; '.join(parts)}); nothing was loaded. "
            "Fix the state, or pass strict=False to load what fits",
            checkpoint_id=checkpoint_id,
        )
